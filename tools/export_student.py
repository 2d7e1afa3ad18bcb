#!/usr/bin/env python3
"""Write the student of a run for where it is used: stock Detectron2, TorchScript, ONNX.

The folder --output gets model.pth, the student's weights alone, and config.yaml, which stock Detectron2 of the version
that runs this merges into get_cfg(), for a backbone of timm after gkd_d2.add_gkd_config(cfg). Its MODEL.WEIGHTS is the
full path of model.pth: set it anew where you move that.
With --onnx it gets model.onnx, which onnxruntime runs without Detectron2 and PyTorch: docs/deployment.md. Examples:
    python tools/export_student.py --weights output/gkd_frcnn_kitti --output output/student
    python tools/export_student.py --weights output/gkd_frcnn_kitti --output output/student --force --torchscript
    python tools/export_student.py --weights output/gkd_frcnn_kitti --output output/student --onnx \\
        --int8 datasets/kitti/training/image_2 --evaluate
    python tools/export_student.py --config-file configs/gkd_retinanet_kitti.yaml \\
        --weights output/gkd_retinanet_kitti/model_0009999.pth --output output/student --fp16
"""

import argparse
import sys
from pathlib import Path

from gkd_d2.config import read_config
from gkd_d2.export import ExportError, Forms, export_student, pictures_in, sample_pictures
from gkd_d2.export.measure import check_test_sets, describe_forms, measure_forms
from gkd_d2.export.pictures import fit
from gkd_d2.export.quantize import CALIBRATION_LIMIT
from gkd_d2.export.write import EVALUATION, FILES
from gkd_d2.utils.command_line import check_at_least, parse_options_first
from gkd_d2.utils.files import check_writable, write_whole
from gkd_d2.utils.timm_models import has_timm_backbone
from gkd_d2.utils.user_modules import add_import_option

from detectron2.config import CfgNode
from torch import Tensor


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
        "--ema",
        action="store_true",
        help="use the averaged weights (MODEL_EMA) for config.yaml and all other files; model_ema.pth is written in "
        "any case",
    )
    parser.add_argument(
        "--torchscript",
        action="store_true",
        help="write model.ts too, traced on the CPU by Detectron2's exporter. It takes one image, float, C,H,W, "
        "resized as INPUT says, and returns boxes, classes, scores and the image size. Its detections are compared "
        "with the model's: an error if they differ",
    )
    parser.add_argument(
        "--onnx",
        action="store_true",
        help="write model.onnx too, for batches of one image; compared in the same way. Needs pip install -e .[export]",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="fix the input of model.onnx to this size (default: any)",
    )
    parser.add_argument(
        "--int8",
        type=Path,
        metavar="FOLDER",
        help="write model_int8.onnx too, with activation ranges from the images in FOLDER (at most the first "
        f"{CALIBRATION_LIMIT}): take images like those you will detect on, but not those you evaluate on",
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="evaluate each file on DATASETS.TEST, and write export.md with a table"
    )
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="image to compare the files on, may be repeated (default: the first images of DATASETS.TEST)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help="timed runs of each file, whose median counts (default: 10)",
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    add_import_option(parser)
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="override the config, as the run was started with"
    )
    args = parse_options_first(parser)
    if not args.onnx and (args.size or args.int8):
        parser.error("--size and --int8 require --onnx")
    if not (args.onnx or args.torchscript or args.evaluate) and (args.image or args.repeats):
        parser.error("--image and --repeats require --onnx, --torchscript or --evaluate")
    if args.size and min(args.size) < 1:
        parser.error(f"--size is {args.size[0]} {args.size[1]}, but must be two numbers of pixels above 0")
    if args.repeats is None:
        args.repeats = 10
    check_at_least(parser, args, {"repeats": 1})
    return args


def run_config(args: argparse.Namespace) -> CfgNode:
    """The config that the command line names."""
    if not args.weights.exists():
        raise FileNotFoundError(f"--weights is {args.weights}, which does not exist")
    folder = args.weights if args.weights.is_dir() else args.weights.parent
    path = args.config_file or folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"there is no config {path}: name the one of the run by --config-file")
    if path.resolve().parent == args.output.resolve():
        raise ValueError(f"--output is the folder of {path}, which an export would replace: choose another folder")
    return read_config(str(path), args.opts, args.imports)


def main() -> int:
    """Run the command."""
    args = parse_args()
    try:
        check_writable(args.output, "--output")
        cfg = run_config(args)
        if args.evaluate:
            check_test_sets(cfg)
        measured = args.torchscript or args.onnx or args.evaluate
        pictures = sample_pictures(cfg, args.image) if measured else []
        forms = Forms(
            half=args.fp16,
            ema=args.ema,
            torchscript=args.torchscript,
            onnx=args.onnx,
            size=tuple(args.size) if args.size else None,
            calibration=pictures_in(args.int8, CALIBRATION_LIMIT) if args.int8 else (),
        )
        written = export_student(cfg, args.weights, args.output, forms, pictures=pictures, force=args.force)
    except (OSError, ValueError, ExportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, path in written.items():
        print(f"{name}: {path}" + ("" if name == "config" else f", {path.stat().st_size / 1e6:.1f} MB"))
    if has_timm_backbone(cfg):
        print("Its backbone is timm's: to read the config, call gkd_d2.add_gkd_config(cfg) after get_cfg().")
    if not measured:
        return 0
    print(f"Compared with the student on {len(pictures)} pictures: {', '.join(compared(forms)) or 'nothing'}.")
    try:
        write_table(cfg, args, forms, written, pictures[0])
    except (OSError, ValueError, ExportError) as error:
        print(f"error: the files above are whole, but measuring them failed: {error}", file=sys.stderr)
        return 1
    return 0


def write_table(cfg: CfgNode, args: argparse.Namespace, forms: Forms, written: dict[str, Path], picture: Tensor):
    """Measure the files, print the table, and write it beside them."""
    if forms.size:
        picture, _ = fit(picture, forms.size, cfg.MODEL.PIXEL_MEAN)
    folder = args.output / EVALUATION if args.evaluate else None
    found = measure_forms(cfg, written, picture, repeats=args.repeats, folder=folder)
    table = describe_forms(found, picture, args.repeats, cfg.DATASETS.TEST)
    if forms.ema:
        table += "\nAll but the checkpoint are of the averaged weights.\n"
    write_whole({args.output / FILES["table"]: table})
    print(f"\n{table}")


def compared(forms: Forms) -> list[str]:
    """What of the forms was compared with the student."""
    return [name for name, wanted in (("TorchScript", forms.torchscript), ("ONNX", forms.onnx)) if wanted]


if __name__ == "__main__":
    sys.exit(main())
