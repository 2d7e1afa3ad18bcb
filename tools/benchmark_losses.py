"""Times the distillation losses: the reference, torch.compile of it, and the extension, side by side in one run.

First every implementation is checked against the reference in float64. Then forward, backward and both are timed, the
implementations taking turns and the inputs rotating, so that neither a busy machine nor a cache favours one. The floor
is the time of the passes over the features of docs/method.md at the copy bandwidth of the same run.

On a GPU the times are the device's own. A call is captured in two CUDA graphs, of forward and of forward with backward,
whose replays are timed behind other work, so that no launch is waited for; backward is their difference, and what is
checked is the result of a replay. The host's time for a call without a graph stands beside them. An implementation that
waits for the device can't be captured: events around its calls time it, waits included, which the table says.

    python tools/benchmark_losses.py --device cpu --shapes kitti --batch 2 --dtype float32
    python tools/benchmark_losses.py --device cuda --shapes coco --batch 4 --dtype float16 --no-sweeps --no-compile
"""

import argparse

from gkd_d2.analysis.benchmark.command_line import add_output_options, write_results
from gkd_d2.analysis.benchmark.inputs import SHAPES, FeatureSpec
from gkd_d2.analysis.benchmark.losses import SETTINGS, measure_losses
from gkd_d2.analysis.benchmark.plots import plot_losses
from gkd_d2.analysis.benchmark.tables import loss_tables
from gkd_d2.analysis.benchmark.timing import Rounds
from gkd_d2.losses import fused
from gkd_d2.utils.command_line import check_at_least, check_device, check_written_files

import torch


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", choices=tuple(SHAPES), default="kitti")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--layout", choices=("contiguous", "channels_last"), default="contiguous")
    parser.add_argument("--boxes", type=int, default=10, help="boxes an image, outside the sweep over them")
    parser.add_argument(
        "--weights",
        choices=tuple(SETTINGS),
        default="all",
        help="all four losses, a config's default, or the authors' losses",
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; the median counts")
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before")
    parser.add_argument("--inputs", type=int, default=3, help="sets of inputs that rotate")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parser.add_argument("--no-sweeps", dest="sweeps", action="store_false", help="one number of boxes, one area")
    add_output_options(parser, "the times")
    args = parser.parse_args()
    check_at_least(parser, args, {"batch": 1, "boxes": 0, "rounds": 1, "warm_up": 0, "inputs": 1})
    check_written_files(parser, args, ("json", "plot"))
    check_device(parser, args)
    if reason := fused.unavailable_reason(torch.device(args.device)):
        parser.error(reason)
    return args


def main() -> None:
    """Run the command."""
    args = parse_args()
    result = measure_losses(
        FeatureSpec(args.shapes, args.batch, getattr(torch, args.dtype), args.layout, args.device),
        boxes=args.boxes,
        weights=args.weights,
        rounds=Rounds(args.rounds, args.warm_up),
        inputs=args.inputs,
        compiled=args.compile,
        sweeps=args.sweeps,
    )
    write_results(args, result, loss_tables(result), plot_losses)


if __name__ == "__main__":
    main()
