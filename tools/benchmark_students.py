#!/usr/bin/env python3
"""What students cost: parameters, operations, and the time for one image on the CPU, side by side.

They are built with random weights, so that neither checkpoints nor data are needed. Their batch norms get the
statistics of the image, of random pixels, and every score passes the threshold, so that the heads are given as many
proposals, and non-maximum suppression as many detections, as the config allows: a trained detector has no more to do.
Of a distiller's config the student is measured. With --onnx, onnxruntime takes turns with PyTorch.
Example:
    python tools/benchmark_students.py --onnx --output students.md \\
        --student "Faster R-CNN, ResNet-50" configs/baselines/frcnn_kitti.yaml \\
        --student "Faster R-CNN, ResNet-18" configs/baselines/frcnn_kitti.yaml \\
            MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64
"""

import argparse
import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from gkd_d2.analysis.comparison import markdown
from gkd_d2.analysis.cost import gflops, random_image
from gkd_d2.analysis.random_student import random_student
from gkd_d2.config import read_config
from gkd_d2.export import ExportError
from gkd_d2.export.onnx import OnnxDetector, trace_onnx
from gkd_d2.utils.command_line import check_at_least, check_written_files
from gkd_d2.utils.progress import track
from gkd_d2.utils.text import counted
from gkd_d2.utils.timing import milliseconds
from gkd_d2.utils.user_modules import add_import_option

import torch
from detectron2.config import CfgNode
from fvcore.nn import parameter_count


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--student",
        dest="students",
        action="append",
        required=True,
        nargs="+",
        metavar=("NAME", "CONFIG [KEY VALUE ...]"),
        help="its name in the table, its config file, and what overrides that; give it once for each student",
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=[384, 1248], metavar=("H", "W"), help="of the image (default: 384 1248)"
    )
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="turns; the median counts (default: 10)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: as many as PyTorch chooses)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    parser.add_argument("--onnx", action="store_true", help="time onnxruntime, too: pip install -e .[export]")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there, too")
    add_import_option(parser)
    args = parser.parse_args()
    names = [student[0] for student in args.students]
    for name, *config in args.students:
        if not config:
            parser.error(f"--student {name} has no config: give NAME CONFIG [KEY VALUE ...]")
        if names.count(name) > 1:
            parser.error(f"--student {name} is given {names.count(name)} times: give each a name of its own")
    if min(args.size) < 32:
        parser.error(f"--size is {args.size[0]} {args.size[1]}, but must be at least 32 32")
    check_at_least(parser, args, {"repeats": 1})
    if args.threads is not None:
        check_at_least(parser, args, {"threads": 1})
        torch.set_num_threads(args.threads)
    check_written_files(parser, args, ["output"])
    return args


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Have an error name the student."""
    try:
        yield
    except (OSError, ValueError, ImportError, ExportError) as error:
        raise ValueError(f"--student {name}: {error}") from error


def read_configs(args: argparse.Namespace) -> dict[str, CfgNode]:
    """Name -> config of every student."""
    configs = {}
    for name, path, *pairs in args.students:
        with naming(name):
            configs[name] = read_config(path, pairs, args.imports)
    return configs


def measure(configs: dict[str, CfgNode], args: argparse.Namespace) -> str:
    """The table, and how it was measured."""
    image = random_image(tuple(args.size))
    columns: dict[str, list[str]] = {"": list(configs), "parameters (M)": [], "GFLOPs": []}
    runtimes: dict[str, list] = {"PyTorch": []} | ({"onnxruntime": []} if args.onnx else {})
    for name, cfg in track(configs.items(), total=len(configs), title="students built"):
        with naming(name):
            model = random_student(cfg, image, args.seed)
            exported = trace_onnx(model, cfg, image) if args.onnx else None
        columns["parameters (M)"].append(f"{parameter_count(model)[''] / 1e6:.2f}")
        columns["GFLOPs"].append(f"{gflops(model, image):.2f}")
        runtimes["PyTorch"].append(functools.partial(model, [{"image": image}]))
        if exported:
            detector = OnnxDetector(exported.SerializeToString())
            runtimes["onnxruntime"].append(functools.partial(detector.detect, image))
    with torch.no_grad():
        times = milliseconds(sum(runtimes.values(), []), repeats=args.repeats)
    for number, runtime in enumerate(runtimes):
        of_runtime = times[number * len(configs) : (number + 1) * len(configs)]
        columns[f"{runtime} (ms)"] = [f"{value:.1f}" for value in of_runtime]
    return (
        f"{markdown(columns, left=1)}\n\n"
        f"Random weights, one image of random pixels, {args.size[0]} x {args.size[1]}. GFLOPs are billions of "
        f"multiply-adds by fvcore's counter. ms is the median of {counted(args.repeats, 'time')} on the CPU (threads: "
        f"{torch.get_num_threads()}), all in turn. The heads work on as many proposals as the config allows, and no "
        "score is below the threshold.\n"
    )


def main() -> int:
    """Run the command."""
    args = parse_args()
    try:
        text = measure(read_configs(args), args)
        if args.output:
            args.output.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
