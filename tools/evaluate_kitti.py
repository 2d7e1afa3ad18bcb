#!/usr/bin/env python3
"""KITTI's official 2D average precision, and VOC's at IoU 0.5, of any detector's result files.

Only images with a result file count, as in the benchmark's development kit, whose rules are in docs/datasets.md. Where
a detector writes no file for an image without detections, give --missing-as-empty, and --list where the folder of
labels holds other images too. Examples:
    python tools/evaluate_kitti.py --labels datasets/kitti/training/label_2 --results output/kitti_results
    python tools/evaluate_kitti.py --labels datasets/kitti/training/label_2 --results output/kitti_results \\
        --list datasets/kitti/ImageSets/val.txt --missing-as-empty
"""

import argparse
import json
import sys
from pathlib import Path

from gkd_d2.data.datasets.kitti_labels import read_lines
from gkd_d2.evaluation.kitti_report import table
from gkd_d2.evaluation.kitti_results import evaluate_folders, images_without_result
from gkd_d2.utils.files import check_file_writable, naming
from gkd_d2.utils.text import counted


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, required=True, metavar="FOLDER", help="label files, as in label_2")
    parser.add_argument("--results", type=Path, required=True, metavar="FOLDER", help="result files, ID.txt an image")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, in percent, to this file too")
    parser.add_argument(
        "--list",
        type=Path,
        metavar="FILE",
        help="ids of the images to evaluate, one a line (default: all)",
    )
    parser.add_argument(
        "--missing-as-empty",
        action="store_true",
        help="count an image without a result file as one without detections, rather than leave it out",
    )
    parser.add_argument(
        "--voc-strict",
        action="store_true",
        help="for VOC's metric: count detections on Van, Person_sitting and DontCare as false positives, as the "
        "authors' code does, rather than ignore them",
    )
    return parser.parse_args()


def main() -> int:
    """Run the command."""
    args = parse_args()
    try:
        if args.json is not None:
            check_file_writable(args.json, "--json")
        image_ids = None if args.list is None else {line.strip() for line in read_lines(args.list)} - {""}
        missing = len(images_without_result(args.labels, args.results, image_ids))
        result, num_images = evaluate_folders(
            args.labels,
            args.results,
            image_ids=image_ids,
            missing_as_empty=args.missing_as_empty,
            voc_strict=args.voc_strict,
        )
        if args.json is not None:
            with naming(args.json):
                args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if missing and not args.missing_as_empty:
        print(
            f"warning: {counted(missing, 'image')} without a result file left out. If the detector wrote none because "
            "it found nothing, the numbers are too high: see --missing-as-empty and --list",
            file=sys.stderr,
        )
    shown = table(result, voc_strict=args.voc_strict)
    print(f"KITTI average precision in percent, {counted(num_images, 'image')}:\n{shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
