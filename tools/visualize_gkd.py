#!/usr/bin/env python3
"""Draw what teacher and student see in images of a dataset: gradient maps, box context masks and detections.

Writes a PNG for each image and a page of them, index.html. The config is a distiller's; MODEL.WEIGHTS names the
checkpoint of the student, KEY VALUE pairs at the end override the config. Examples:
    python tools/visualize_gkd.py --config-file configs/gkd_frcnn_kitti.yaml --count 8 \\
        MODEL.WEIGHTS output/gkd_frcnn_kitti/model_final.pth
    python tools/visualize_gkd.py --config-file configs/toy/gkd_frcnn.yaml --image 500003 --image 500007 \\
        --output output/pictures MODEL.WEIGHTS output/toy/gkd_frcnn/model_final.pth
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gkd_d2.config import read_distiller_config
from gkd_d2.data.mapper import FileNamingMapper
from gkd_d2.engine.pictures import take_picture
from gkd_d2.engine.preflight import PreflightError, check_inputs
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.modeling.teacher import hold_norms
from gkd_d2.utils.checkpoint import StudentCheckpointer
from gkd_d2.utils.command_line import parse_options_first
from gkd_d2.utils.files import check_writable, naming
from gkd_d2.utils.random_streams import seed_everything, separate_random_stream
from gkd_d2.utils.text import counted
from gkd_d2.utils.user_modules import add_import_option
from gkd_d2.visualize.draw import draw
from gkd_d2.visualize.page import write_page
from gkd_d2.visualize.picture import Picture

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of a distiller")
    parser.add_argument("--dataset", metavar="NAME", help="default: the first of DATASETS.TEST")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--image", action="append", metavar="NAME", help="id or file name of an image; may be given several times"
    )
    which.add_argument("--count", type=int, default=4, metavar="N", help="the first N images with objects (default: 4)")
    parser.add_argument(
        "--score", type=float, default=0.5, metavar="S", help="detections below it are left out (default: 0.5)"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: visualize below OUTPUT_DIR")
    add_import_option(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="override the config")
    args = parse_options_first(parser)
    if args.count < 1:
        parser.error(f"--count is {args.count}, but must be at least 1")
    if not Path(args.config_file).is_file():
        parser.error(f"--config-file {args.config_file} is no file")
    return args


def dataset_config(args: argparse.Namespace) -> CfgNode:
    """The distiller's config, with the dataset to draw as its only one."""
    cfg = read_distiller_config(args.config_file, args.opts, args.imports)
    if not (args.dataset or cfg.DATASETS.TEST):
        raise ValueError(f"{args.config_file}: DATASETS.TEST is empty: name the dataset to draw by --dataset")
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (args.dataset or cfg.DATASETS.TEST[0],)
    cfg.freeze()
    return cfg


def choose_images(dataset: str, names: list[str] | None, count: int) -> list[dict]:
    """Records of the images asked for, or of the first ``count`` with objects."""
    records = DatasetCatalog.get(dataset)
    if any("annotations" not in record for record in records):
        raise ValueError(
            f"dataset {dataset} has images without ground truth, which the gradients of the losses need: name another "
            "by --dataset"
        )
    if not names:
        chosen = [r for r in records if any(not a.get("iscrowd", 0) for a in r["annotations"])][:count]
        if not chosen:
            raise ValueError(
                f"no object in the {counted(len(records), 'image')} of dataset {dataset}: name an image by --image"
            )
        return chosen
    by_name: dict[str, dict] = {}
    for record in records:
        path = Path(record["file_name"])
        for name in (str(record["image_id"]), path.stem, path.name):
            by_name.setdefault(name, record)
    for name in names:
        if name not in by_name:
            some = ", ".join(str(record["image_id"]) for record in records[:3])
            raise ValueError(
                f"dataset {dataset} has no image {name!r} among its {len(records)}: name one by its id ({some}, ...) "
                "or its file name"
            )
    return [by_name[name] for name in names]


def picture(distiller: GKDDistiller, mapper: FileNamingMapper, record: dict, seed: int) -> Picture:
    """The picture of one image, whatever was drawn before."""
    batch = [mapper(record)]
    with EventStorage(), separate_random_stream(distiller.device, seed):
        seen = distiller.observe(batch, student_grad=True, teacher_grad=True)
    return take_picture(distiller, seen)


def main() -> None:
    """Run the command."""
    args = parse_args()
    try:
        cfg = dataset_config(args)
        output = args.output or Path(cfg.OUTPUT_DIR) / "visualize"
        check_writable(output, "--output" if args.output else "the default of --output")
        check_inputs(cfg, eval_only=False, resume=False)
        (dataset,) = cfg.DATASETS.TEST
        records = choose_images(dataset, args.image, args.count)
        seed = max(cfg.SEED, 0)
        seed_everything(seed)
        distiller = build_model(cfg)
        checkpointer = StudentCheckpointer(distiller)
        checkpointer.load_weights(cfg.MODEL.WEIGHTS)
        distiller.check_finite()
    except (PreflightError, ValueError, OSError) as error:
        sys.exit(str(error))
    student = cfg.MODEL.WEIGHTS or "random weights: MODEL.WEIGHTS is empty"
    # Pictures show features before their alignment.
    random = [name for name in checkpointer.unset if not name.startswith("align.")]
    if random:
        student += f", which leaves {counted(len(random), 'tensor')} of the student random, such as {random[0]}"
        print(f"MODEL.WEIGHTS is {student}", file=sys.stderr)
    # Seen as in evaluation; the heads of the student return losses in training mode only.
    hold_norms(distiller.train())
    mapper = FileNamingMapper(cfg, is_train=True, augmentations=build_augmentation(cfg, is_train=False))
    output.mkdir(parents=True, exist_ok=True)
    captions = {}
    facts = {
        "config": args.config_file,
        "dataset": dataset,
        "teacher": cfg.GKD.TEACHER.WEIGHTS,
        "student": student,
    }
    try:
        with naming(output):
            for number, record in enumerate(records, start=1):
                path = Path(record["file_name"])
                seen = picture(distiller, mapper, record, seed)
                figure = draw(
                    seen,
                    class_names=MetadataCatalog.get(dataset).get("thing_classes", ()),
                    score=args.score,
                    title=path.name,
                )
                name = f"{number:02d}_{path.stem}.png"
                figure.savefig(output / name)
                captions[name] = f"{path.name}, objects: {len(seen.truth)}"
                print(f"{number} of {len(records)}: {output / name}", flush=True)
            write_page(output / "index.html", "What teacher and student see", facts, captions)
    except OSError as error:
        sys.exit(str(error))
    print(f"Page: {output / 'index.html'}")


if __name__ == "__main__":
    main()
