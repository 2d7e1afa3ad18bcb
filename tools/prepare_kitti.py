#!/usr/bin/env python3
"""Check a folder of KITTI's form, unpack the official archives into it, write its split, and count its objects.

Examples:
    python tools/prepare_kitti.py --archives data_object_image_2.zip data_object_label_2.zip
    python tools/prepare_kitti.py --root /data/mine --coco /data/mine/coco
"""

import argparse
import sys
from pathlib import Path

from gkd_d2.data.datasets.builtin import resolve_root
from gkd_d2.data.datasets.kitti import SPLITS, check_kitti_root, load_kitti
from gkd_d2.data.datasets.kitti_labels import DIFFICULTIES
from gkd_d2.data.prepare.kitti import check_images, coco_paths, count_objects, export_coco, unpack, write_split
from gkd_d2.utils.files import check_writable
from gkd_d2.utils.progress import track
from gkd_d2.utils.text import counted

from tabulate import tabulate


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--root", type=Path, metavar="FOLDER", help="default: kitti below $DETECTRON2_DATASETS, or below ./datasets"
    )
    parser.add_argument(
        "--archives", type=Path, nargs="+", default=(), metavar="ZIP", help="official archives to unpack into it"
    )
    parser.add_argument("--coco", type=Path, metavar="FOLDER", help="write kitti_{train,val}.json in COCO's form there")
    parser.add_argument("--quick", action="store_true", help="do not decode the images, look at their headers only")
    parser.add_argument("--force", action="store_true", help="replace files that archives or --coco hold differently")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for, with the counts on the standard output."""
    root = args.root or resolve_root("$DETECTRON2_DATASETS/kitti")
    if args.coco is not None:
        coco_paths(args.coco, force=args.force)
        check_writable(args.coco, "--coco")
    for archive in args.archives:
        print(f"{archive}: {counted(unpack(archive, root, force=args.force), 'file')} written to {root}", flush=True)
    check_kitti_root(root)
    for split in SPLITS:
        records = load_kitti(root, split)
        if not args.quick:
            modes = check_images(track(records, total=len(records), title=f"{split}: images checked"))
            for mode, number in sorted(modes.items()):
                # Pillow clips 16-bit values to 255 where it makes them 8-bit: such images turn white.
                note = ", whose values above 255 are clipped" if mode.startswith(("I", "F")) else ""
                if mode != "RGB":
                    print(f"{split}: {counted(number, 'image')} of mode {mode}, converted by Detectron2{note}")
        counts = count_objects(records)
        rows = [[kind, *(found.get(column) for column in ("all", *DIFFICULTIES))] for kind, found in counts.items()]
        print(
            f"\n{split}: {counted(len(records), 'image')}\n{tabulate(rows, headers=['objects', 'all', *DIFFICULTIES])}"
        )
    # Only now that all is checked.
    written = write_split(root)
    print(f"\nsplit: {'written to' if written else 'as it stands in'} {root / 'ImageSets'}")
    if args.coco is not None:
        print("\n" + "\n".join(str(path) for path in export_coco(root, args.coco, force=args.force)))


def main() -> int:
    """Run the command."""
    try:
        run(parse_args())
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
