#!/usr/bin/env python3
"""Write the annotations of COCO-Traffic from those of COCO 2017; images are not copied.

The datasets coco_traffic_train and coco_traffic_val, with --classes nine coco_traffic9_train and coco_traffic9_val,
are then ready. Examples:
    python tools/prepare_coco_traffic.py
    python tools/prepare_coco_traffic.py --annotations /data/coco/annotations --splits val --classes nine
"""

import argparse
import sys
from pathlib import Path

from gkd_d2.data.datasets.builtin import COCO_TRAFFIC_PREFIXES, resolve_root
from gkd_d2.data.datasets.coco_traffic import CLASS_SETS, SPLITS
from gkd_d2.data.prepare.coco_traffic import prepare_coco_traffic
from gkd_d2.utils.files import check_writable


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FOLDER",
        help="holds instances_train2017.json and instances_val2017.json (default: coco/annotations below "
        "$DETECTRON2_DATASETS, or below ./datasets)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where instances_train.json and instances_val.json go (default: coco_traffic/annotations, for nine "
        "classes coco_traffic9/annotations, in the same place)",
    )
    parser.add_argument("--classes", choices=CLASS_SETS, default="thirteen", help="default: thirteen")
    parser.add_argument("--splits", choices=SPLITS, nargs="+", default=SPLITS, help="default: both")
    args = parser.parse_args()
    source = args.annotations or resolve_root("$DETECTRON2_DATASETS/coco/annotations")
    target = args.output or resolve_root(f"$DETECTRON2_DATASETS/{COCO_TRAFFIC_PREFIXES[args.classes]}/annotations")
    try:
        check_writable(target, "--output" if args.output else "the default of --output")
        for split in args.splits:
            path = target / f"instances_{split}.json"
            summary = prepare_coco_traffic(source / f"instances_{split}2017.json", path, args.classes)
            print(f"{path}\n{summary.text()}", flush=True)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
