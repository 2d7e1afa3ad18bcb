"""Write toy data in KITTI's form: seeded street scenes with cars, pedestrians and cyclists.

example:
    python tools/make_toy_kitti.py --train 300 --val 100
        makes the datasets toy_kitti_train and toy_kitti_val usable
    python tools/make_toy_kitti.py --output /data/big_toy --train 4000 --val 500 --size 640x256
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from gkd_d2.data.datasets.builtin import resolve_root
from gkd_d2.data.toy import make_toy_kitti
from gkd_d2.utils.files import check_writable


def image_size(text: str) -> tuple[int, int]:
    """Parse WIDTHxHEIGHT."""
    try:
        width, height = (int(number) for number in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 320x128") from None
    return width, height


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="folder to write (default: toy_kitti below $DETECTRON2_DATASETS, or below ./datasets)",
    )
    parser.add_argument("--train", type=int, default=300, metavar="N", help="training images (default: 300)")
    parser.add_argument("--val", type=int, default=100, metavar="N", help="validation images (default: 100)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="other seeds, other scenes (default: 0)")
    parser.add_argument(
        "--size", type=image_size, default=(320, 128), metavar="WxH", help="size of an image (default: 320x128)"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace toy data made with other arguments; nothing else is replaced"
    )
    return parser.parse_args()


def main() -> int:
    """Run the command."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = args.output or resolve_root("$DETECTRON2_DATASETS/toy_kitti")
    try:
        check_writable(output, "--output" if args.output else "the default of --output")
        make_toy_kitti(output, args.train, args.val, args.seed, args.size, args.force)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
