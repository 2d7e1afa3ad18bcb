#!/usr/bin/env python3
"""KITTI's official 2D average precision of any detector's result files.

Only images with a result file count. The rules are those of the benchmark's development kit: docs/datasets.md. Example:
    python tools/evaluate_kitti.py --labels datasets/kitti/training/label_2 --results output/kitti_results
"""

import argparse
import json
import sys
from pathlib import Path

from gkd_d2.evaluation.kitti_evaluation import table
from gkd_d2.evaluation.kitti_results import evaluate_folders


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, required=True, metavar="FOLDER", help="label files, as in label_2")
    parser.add_argument("--results", type=Path, required=True, metavar="FOLDER", help="result files, ID.txt an image")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, in percent, to this file too")
    args = parser.parse_args()
    try:
        result, num_images = evaluate_folders(args.labels, args.results)
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"KITTI average precision in percent, {num_images} images:\n{table(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
