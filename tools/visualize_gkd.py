#!/usr/bin/env python3
"""Draw what teacher and student see in images of a dataset: gradient maps, box context masks and detections.

Writes a PNG for each image and a page of them, index.html. With --importance-report the pictures show instead what each
GKD.IMPORTANCE makes of the cells, beside the teacher's score, and a table, also in importance.md and importance.json,
says how much of it lies in the ground-truth boxes.
The config is a distiller's; MODEL.WEIGHTS names the checkpoint of the student, KEY VALUE pairs at the end override the
config. Examples:
    python tools/visualize_gkd.py --config-file configs/gkd_frcnn_kitti.yaml --count 8 \\
        MODEL.WEIGHTS output/gkd_frcnn_kitti/model_final.pth
    python tools/visualize_gkd.py --config-file configs/toy/gkd_frcnn.yaml --image 500003 --image 500007 \\
        --output output/pictures MODEL.WEIGHTS output/toy/gkd_frcnn/model_final.pth
    python tools/visualize_gkd.py --config-file configs/toy/gkd_frcnn.yaml --importance-report --count 40 \\
        --output output/importance MODEL.WEIGHTS output/toy/gkd_frcnn/model_final.pth
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gkd_d2.analysis.dataset_images import choose_images, has_objects, observe_images
from gkd_d2.analysis.importance_maps import take_importance_picture
from gkd_d2.analysis.importance_report import ImportanceReport, report_text, write_report
from gkd_d2.config import read_distiller_config, without_backbone_weights
from gkd_d2.engine.hooks.pictures import take_picture
from gkd_d2.engine.preflight import PreflightError, check_inputs
from gkd_d2.engine.run import YacsRun
from gkd_d2.modeling.state_names import is_students
from gkd_d2.utils.checkpoint import StudentCheckpointer
from gkd_d2.utils.command_line import check_at_least, check_config_file, parse_options_first
from gkd_d2.utils.files import check_writable, naming
from gkd_d2.utils.random_streams import seed_everything
from gkd_d2.utils.text import counted
from gkd_d2.utils.user_modules import add_import_option
from gkd_d2.visualize.draw import draw, draw_importances
from gkd_d2.visualize.legend import COLUMNS
from gkd_d2.visualize.page import write_page

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

# Images, where --count does not say how many.
PICTURES, REPORTED = 4, 40


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of a distiller")
    parser.add_argument("--dataset", metavar="NAME", help="default: the first of DATASETS.TEST")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--image", action="append", metavar="NAME", help="id or file name of an image; may be given several times"
    )
    which.add_argument(
        "--count",
        type=int,
        metavar="N",
        help=f"the first N images with objects (default: {PICTURES}; {REPORTED} for a report)",
    )
    parser.add_argument(
        "--score", type=float, default=0.5, metavar="S", help="detections below it are left out (default: 0.5)"
    )
    parser.add_argument(
        "--importance-report", action="store_true", help="how much of each importance of a cell lies in objects"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="default: visualize below OUTPUT_DIR, or importance for a report",
    )
    add_import_option(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="override the config")
    args = parse_options_first(parser)
    if args.count is None:
        args.count = REPORTED if args.importance_report else PICTURES
    check_at_least(parser, args, {"count": 1})
    check_config_file(parser, args)
    return args


def dataset_config(args: argparse.Namespace) -> CfgNode:
    """The distiller's config, with the dataset to draw as its only one."""
    cfg = read_distiller_config(args.config_file, args.opts, args.imports)
    if not (args.dataset or cfg.DATASETS.TEST):
        raise ValueError(f"{args.config_file}: DATASETS.TEST is empty: name the dataset to draw by --dataset")
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (args.dataset or cfg.DATASETS.TEST[0],)
    cfg.freeze()
    return without_backbone_weights(cfg) if cfg.MODEL.WEIGHTS else cfg


def main() -> None:
    """Run the command."""
    args = parse_args()
    try:
        cfg = dataset_config(args)
        output = args.output or Path(cfg.OUTPUT_DIR) / ("importance" if args.importance_report else "visualize")
        check_writable(output, "--output" if args.output else "the default of --output")
        check_inputs(YacsRun(cfg), eval_only=False, resume=False)
        (dataset,) = cfg.DATASETS.TEST
        records = choose_images(dataset, args.image, args.count)
        if args.importance_report and not any(map(has_objects, records)):
            raise ValueError("none of the images of --image has an object, so there is nothing to report of them")
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
    random = list(filter(is_students, checkpointer.unset))
    if random:
        student += f", which leaves {counted(len(random), 'tensor')} of the student random, such as {random[0]}"
        print(f"MODEL.WEIGHTS is {student}", file=sys.stderr)
    output.mkdir(parents=True, exist_ok=True)
    classes = MetadataCatalog.get(dataset).get("thing_classes", ())
    captions, report = {}, ImportanceReport()
    facts = {
        "config": args.config_file,
        "dataset": dataset,
        "teacher": cfg.GKD.TEACHER.WEIGHTS,
        "student": student,
    }
    take, paint = (take_importance_picture, draw_importances) if args.importance_report else (take_picture, draw)
    try:
        with naming(output):
            observed = observe_images(distiller, cfg, records, seed)
            for number, (record, seen) in enumerate(zip(records, observed), start=1):
                path, picture = Path(record["file_name"]), take(distiller, seen)
                if args.importance_report:
                    report.add(picture.levels)
                figure = paint(picture, class_names=classes, score=args.score, title=path.name)
                name = f"{number:02d}_{path.stem}.png"
                figure.savefig(output / name)
                captions[name] = f"{path.name}, objects: {len(picture.truth)}"
                print(f"{number} of {len(records)}: {output / name}", flush=True)
            if args.importance_report:
                print(f"\n{report_text(report.result())}\n")
                write_report(output, report.result(), facts, captions)
            else:
                write_page(output / "index.html", "What teacher and student see", facts, captions, COLUMNS)
    except OSError as error:
        sys.exit(str(error))
    print(f"Page: {output / 'index.html'}")


if __name__ == "__main__":
    main()
