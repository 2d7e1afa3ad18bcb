#!/usr/bin/env python3
"""Measure each distillation loss's gradient against the detection loss's, and propose weights.

A run of batches goes through teacher and student without any update. The gradients are those of the losses of
GKD.METHOD at the student's features; a ratio of 0.5 means that a loss pulls half as hard there as the detection losses
do. What is right depends on data and schedule: start with 0.1 to 1 a loss, and watch gkd_ratio/* of the run. A loss of
weight 0 is off and left out unless --term names it.
MODEL.WEIGHTS names the student's checkpoint, KEY VALUE pairs at the end override the config. Examples:
    python tools/suggest_weights.py --config-file configs/gkd_frcnn_kitti.yaml --batches 200 --ratio 0.5
    python tools/suggest_weights.py --config-file configs/toy/gkd_frcnn.yaml --batches 20 \\
        --ratio 0.3 --term gradient=1.0 --term attention=0.1
    python tools/suggest_weights.py --config-file configs/gkd_frcnn_kitti.yaml GKD.METHOD fgd
"""

import argparse
import itertools
import sys

from gkd_d2.analysis.gradient_ratios import (
    measure_ratios,
    ratio_table,
    suggest_weights,
    unit_weights,
    wanted_ratios,
    weights_as_yaml,
)
from gkd_d2.config import read_distiller_config, without_backbone_weights
from gkd_d2.engine.preflight import PreflightError, check_inputs
from gkd_d2.engine.run import YacsRun
from gkd_d2.engine.trainer import Trainer
from gkd_d2.methods import build_method
from gkd_d2.utils.checkpoint import StudentCheckpointer
from gkd_d2.utils.command_line import check_at_least, parse_options_first
from gkd_d2.utils.progress import track
from gkd_d2.utils.random_streams import seed_everything
from gkd_d2.utils.user_modules import add_import_option

from detectron2.modeling import build_model


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of a distiller")
    parser.add_argument("--batches", type=int, default=200, metavar="N", help="to measure with (default: 200)")
    parser.add_argument("--ratio", type=ratio, default=0.5, metavar="R", help="wanted for every loss (default: 0.5)")
    parser.add_argument(
        "--term",
        type=term_ratio,
        action="append",
        default=[],
        metavar="NAME=R",
        help="wanted for one loss instead, named as in gkd_ratio/NAME, also for one that is off; may be given several "
        "times",
    )
    add_import_option(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="override the config")
    args = parse_options_first(parser)
    check_at_least(parser, args, {"batches": 1})
    return args


def ratio(text: str) -> float:
    """The type of --ratio."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a finite number >= 0")
    return value


def term_ratio(text: str) -> tuple[str, float]:
    """The type of --term: NAME=R."""
    name, _, value = text.partition("=")
    return name, ratio(value)


def main() -> None:
    """Run the command."""
    args = parse_args()
    try:
        cfg = read_distiller_config(args.config_file, args.opts, args.imports)
        # Any seed serves to measure; the same one gives the same numbers again.
        cfg.SEED = max(cfg.SEED, 0)
        cfg.freeze()
        if cfg.MODEL.WEIGHTS:
            cfg = without_backbone_weights(cfg)
        terms = list(build_method(cfg).terms.values())
        wanted = wanted_ratios(cfg.GKD.METHOD, terms, args.ratio, dict(args.term))
        off = [term for term in terms if term.name not in wanted]
        terms = [term for term in terms if term.name in wanted]
        unit = unit_weights(cfg, wanted)
        check_inputs(YacsRun(cfg), eval_only=False, resume=False)
        seed_everything(cfg.SEED)
        distiller = build_model(unit)
        StudentCheckpointer(distiller).load_weights(cfg.MODEL.WEIGHTS)
        batches = itertools.islice(Trainer.build_train_loader(cfg), args.batches)
        ratios = measure_ratios(distiller, track(batches, total=args.batches, title="batches"), cfg.SEED)
    except (PreflightError, ValueError, OSError) as error:
        sys.exit(str(error))
    weights = suggest_weights(ratios, wanted)
    print(f"\n{ratio_table(terms, ratios, weights)}\n")
    for term in off:
        print(f"Left out: {term.name}, whose weight {term.key} is 0. Measure it by --term {term.name}={args.ratio:g}\n")
    print(f"For {', '.join(f'{t} {r:g}' for t, r in wanted.items())}:\n")
    print(weights_as_yaml(terms, weights), end="")


if __name__ == "__main__":
    main()
