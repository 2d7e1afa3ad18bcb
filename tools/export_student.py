#!/usr/bin/env python3
"""Write the student of a run as a plain Detectron2 model, which needs nothing of gkd_d2.

The folder --output gets model.pth, the student's weights alone, and config.yaml, which stock Detectron2 of the version
that runs this merges into get_cfg(). Its MODEL.WEIGHTS is the full path of model.pth: set it anew where you move that.
Examples:
    python tools/export_student.py --weights output/gkd_frcnn_kitti --output output/student
    python tools/export_student.py --weights output/gkd_frcnn_kitti --output output/student --force --torchscript
    python tools/export_student.py --config-file configs/gkd_retinanet_kitti.yaml \\
        --weights output/gkd_retinanet_kitti/model_0009999.pth --output output/student --fp16
"""

import argparse
import sys
from pathlib import Path

from gkd_d2.config import read_config
from gkd_d2.export import ExportError, export_student, sample_image
from gkd_d2.utils.command_line import parse_options_first
from gkd_d2.utils.files import check_writable
from gkd_d2.utils.user_modules import add_import_option

from detectron2.config import CfgNode


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights",
        type=Path,
        required=True,
        metavar="PATH",
        help="a checkpoint, or a run's OUTPUT_DIR, of which the last checkpoint is taken",
    )
    parser.add_argument(
        "--config-file", type=Path, metavar="FILE", help="the run's config (default: config.yaml beside the checkpoint)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the files go")
    parser.add_argument(
        "--fp16",
        action="store_true",
        help="store floating tensors in 16 bits, which halves model.pth. Weights keep 11 significant bits, those below "
        "3e-8 become 0, so that scores and boxes change a little. Loading converts back: nothing runs faster",
    )
    parser.add_argument(
        "--torchscript",
        action="store_true",
        help="write model.ts too, traced on the CPU by Detectron2's exporter. It takes one image, float, C,H,W, "
        "resized as INPUT says, and returns boxes, classes, scores and the image size. Its detections are compared "
        "with the model's: an error if they differ",
    )
    parser.add_argument(
        "--image", type=Path, metavar="FILE", help="to compare on (default: the first image of DATASETS.TEST)"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    add_import_option(parser)
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="override the config, as the run was started with"
    )
    return parse_options_first(parser)


def run_config(args: argparse.Namespace) -> CfgNode:
    """The config that the command line names."""
    if not args.weights.exists():
        raise FileNotFoundError(f"--weights is {args.weights}, which does not exist")
    folder = args.weights if args.weights.is_dir() else args.weights.parent
    path = args.config_file or folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"there is no config {path}: name the one of the run by --config-file")
    return read_config(str(path), args.opts, args.imports)


def main() -> int:
    """Run the command."""
    args = parse_args()
    try:
        check_writable(args.output, "--output")
        cfg = run_config(args)
        image = sample_image(cfg, args.image) if args.torchscript else None
        written = export_student(cfg, args.weights, args.output, half=args.fp16, image=image, force=args.force)
    except (OSError, ValueError, ExportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, path in written.items():
        print(f"{name}: {path}, {path.stat().st_size / 1e6:.1f} MB")
    if args.torchscript:
        print("The TorchScript detects on the sample image what the model does.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
