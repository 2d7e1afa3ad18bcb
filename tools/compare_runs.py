#!/usr/bin/env python3
"""Compare finished runs: a Markdown table, the gain of distillation, and pictures of AP and losses over iterations.

Teacher, student alone and student distilled are told apart by the runs' configs. The folder --output gets report.md and
curves.png. Example:
    python tools/compare_runs.py --output output/comparison \\
        output/teachers/frcnn_kitti output/baselines/frcnn_kitti output/gkd_frcnn_kitti
"""

import argparse
import sys
from pathlib import Path

from gkd_d2.analysis.comparison import gain_table, markdown_table, notes
from gkd_d2.analysis.cost import measure_costs
from gkd_d2.analysis.plots import plot_curves, plot_detections
from gkd_d2.analysis.roles import find_roles
from gkd_d2.analysis.runs import find_runs, shared_dataset
from gkd_d2.utils.files import check_writable, naming
from gkd_d2.utils.user_modules import add_import_option, import_modules

import torch


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="FOLDER", help="OUTPUT_DIR of a finished run")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the report goes")
    parser.add_argument("--dataset", metavar="NAME", help="needed where all runs are evaluated on several datasets")
    parser.add_argument(
        "--input-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the random image that GFLOPs and time are measured on (default: INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST "
        "of the first run)",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to measure the time on"
    )
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="of the time's measurement (default: 10)")
    parser.add_argument("--no-speed", action="store_true", help="do not measure the time")
    parser.add_argument(
        "--images",
        type=int,
        default=0,
        metavar="N",
        help="draw the detections on the N validation images with most objects, into detections.png (default: 0)",
    )
    add_import_option(parser)
    args = parser.parse_args()
    if args.repeats < 1 or min(args.input_size or [1]) < 1 or args.images < 0:
        parser.error("--repeats and --input-size must be at least 1, --images at least 0")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device is {args.device}, but torch {torch.__version__} finds no GPU")
    return args


def compare(args: argparse.Namespace) -> None:
    """Write the report and print its text."""
    runs = find_runs(args.runs)
    dataset = args.dataset or shared_dataset(runs)
    gains = gain_table(runs, dataset)
    test = runs[0].config.INPUT
    size = tuple(args.input_size or (test.MIN_SIZE_TEST, test.MAX_SIZE_TEST))
    costs, measured = measure_costs(runs, size, device=None if args.no_speed else args.device, repeats=args.repeats)
    table = markdown_table(runs, dataset, roles=find_roles(runs), costs=costs)
    args.output.mkdir(parents=True, exist_ok=True)
    with naming(args.output):
        plot_curves(runs, dataset, args.output / "curves.png")
        parts = [f"# Runs on {dataset}", f"AP in percent, of the last evaluation of every run.\n\n{table}", measured]
        parts += [gains] if gains else []
        parts += ["\n".join(f"- {note}" for note in notes(runs))] if notes(runs) else []
        parts += [
            "![AP and losses over iterations](curves.png)",
            "total_loss is the sum of all terms: of a distilled run it holds the distillation losses too.",
        ]
        if args.images:
            plot_detections(runs, dataset, args.output / "detections.png", images=args.images)
            parts.append("![Detections](detections.png)")
        text = "\n\n".join(parts) + "\n"
        (args.output / "report.md").write_text(text, encoding="utf-8")
    print(f"{text}\nReport: {args.output / 'report.md'}")


def main() -> int:
    """Run the command."""
    args = parse_args()
    try:
        import_modules(args.imports, "--import")
        check_writable(args.output, "--output")
        compare(args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
