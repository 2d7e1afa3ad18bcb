#!/usr/bin/env python3
"""Measure each distillation loss's gradient against the detection loss's, and propose weights.

A run of batches goes through teacher and student without any update. The gradients are those of the losses of
GKD.METHOD at the student's features; a ratio of 0.5 means that a loss's is half as large there as that of the detection
losses. The weights are those that GKD.BALANCE calibrate finds over these batches, for the ratios of GKD.RATIOS and the
method, or of --ratio and --term. What is right depends on data and schedule: watch gkd_ratio/* of the run. A loss that
is off, of weight 0 or under calibrate of ratio 0, is left out unless --term names it.
MODEL.WEIGHTS names the student's checkpoint, KEY VALUE pairs at the end override the config. Examples:
    python tools/suggest_weights.py --config-file configs/gkd_frcnn_kitti.yaml --batches 200
    python tools/suggest_weights.py --config-file configs/toy/gkd_frcnn.yaml --batches 20 \\
        --ratio 0.3 --term gradient=1.0 --term attention=0.1
    python tools/suggest_weights.py --config-file configs/gkd_frcnn_kitti.yaml GKD.METHOD fgd
"""

import argparse
import itertools
import sys

from gkd_d2.analysis.gradient_ratios import measure_weights, ratio_table, ratios_as_yaml, to_measure, wanted_ratios
from gkd_d2.config import read_distiller_config, without_backbone_weights
from gkd_d2.engine.exact_trainer import AMP_DTYPES
from gkd_d2.engine.preflight import PreflightError, check_inputs
from gkd_d2.engine.run import YacsRun
from gkd_d2.engine.trainer import Trainer
from gkd_d2.methods import build_method, weights_as_yaml
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
    parser.add_argument(
        "--ratio", type=ratio, metavar="R", help="wanted for every loss (default: each one's own, see GKD.RATIOS)"
    )
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
        method = build_method(cfg)
        wanted = wanted_ratios(cfg, args.ratio, dict(args.term))
        check_inputs(YacsRun(cfg), eval_only=False, resume=False)
        seed_everything(cfg.SEED)
        distiller = build_model(to_measure(cfg, wanted))
        StudentCheckpointer(distiller).load_weights(cfg.MODEL.WEIGHTS)
        batches = itertools.islice(Trainer.build_train_loader(cfg), args.batches)
        batches = track(batches, total=args.batches, title="batches")
        found = measure_weights(distiller, batches, cfg.SEED, AMP_DTYPES[YacsRun(cfg).amp_dtype])
    except (PreflightError, ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"\n{ratio_table(method, wanted, found)}\n")
    terms = method.terms.values()
    for term in terms:
        if term.name not in found and term.name not in dict(args.term):
            key, value = method.setting(term)
            # On by its weight, and of no ratio.
            key = key if value == 0 else term.ratio_key
            print(f"Left out: {term.name}, since {key} is 0. Measure it by --term {term.name}=0.3\n")
    print("Weights for these ratios:\n")
    print(f"# Or, for each training to find its own:  {ratios_as_yaml(terms, wanted)}")
    print(weights_as_yaml(terms, {name: loss.weight for name, loss in found.items()}), end="")


if __name__ == "__main__":
    main()
