#!/usr/bin/env python3
"""Times a distilled training step against what it cannot avoid: the student's own step and the teacher's forward.

The networks of a distiller's config are built with random weights and given random images and boxes, so that neither
checkpoints nor data are needed. In every setting the student's own step, the teacher's forward with its heads and the
distilled step take turns in one process, so that a busy machine favours none; the ratio is the median of the rounds'
ratios. The phases of a step add up to it. Memory is the peak of what torch's allocator holds in a step, the weights and
the optimizer's state that the step needs included. On a CPU, run it with an allocator that keeps freed memory, as
docs/benchmarks.md shows: fresh memory costs more than much of the arithmetic, and not in every step alike. Examples:
    python tools/benchmark_step.py --config-file configs/gkd_frcnn_kitti.yaml --json step.json --plot step.png
    python tools/benchmark_step.py --config-file configs/gkd_retinanet_kitti.yaml --setting default --batch 1 \\
        --size 128 416 --rounds 3
"""

import argparse
import sys

from gkd_d2.analysis.benchmark.command_line import add_output_options, write_results
from gkd_d2.analysis.benchmark.plots import plot_step
from gkd_d2.analysis.benchmark.step import measure_step
from gkd_d2.analysis.benchmark.tables import step_tables
from gkd_d2.analysis.benchmark.timing import Rounds
from gkd_d2.config import read_distiller_config
from gkd_d2.utils.command_line import (
    check_at_least,
    check_config_file,
    check_device,
    check_written_files,
    parse_options_first,
)
from gkd_d2.utils.user_modules import add_import_option


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of a distiller")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=2, help="images (default: 2)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=[384, 1248], metavar=("H", "W"), help="of the images (default: 384 1248)"
    )
    parser.add_argument("--boxes", type=int, default=10, help="boxes an image (default: 10)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before (default: 2)")
    parser.add_argument(
        "--setting", action="append", metavar="NAME", help="may be given several times (default: all that apply)"
    )
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME",
        help="method to time beside the config's own, such as crosskd or gkd+crosskd; may be given several times",
    )
    add_output_options(parser, "the phases")
    add_import_option(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="override the config")
    args = parse_options_first(parser)
    # A first step makes the optimizer's state, which is no part of a step's cost.
    check_at_least(parser, args, {"batch": 1, "boxes": 1, "rounds": 1, "warm_up": 1})
    check_written_files(parser, args, ("json", "plot"))
    if min(args.size) < 1:
        parser.error(f"--size is {args.size}, but both numbers must be at least 1")
    check_config_file(parser, args)
    check_device(parser, args)
    return args


def main() -> None:
    """Run the command."""
    args = parse_args()
    try:
        cfg = read_distiller_config(args.config_file, args.opts, args.imports)
        cfg.MODEL.DEVICE = args.device
        result = measure_step(
            cfg,
            args.config_file,
            batch=args.batch,
            size=args.size,
            boxes=args.boxes,
            rounds=Rounds(args.rounds, args.warm_up),
            settings=args.setting or (),
            methods=args.method or (),
        )
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    write_results(args, result, step_tables(result), plot_step)


if __name__ == "__main__":
    main()
