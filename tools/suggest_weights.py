#!/usr/bin/env python3
"""Measure each distillation loss's gradient against the detection loss's, and propose GKD.LOSS_WEIGHTS.

A run of batches goes through teacher and student without any update. The gradients are those at the student's
features; a ratio of 0.5 means that a loss pulls half as hard there as the detection losses do. What is right depends
on data and schedule: start with 0.1 to 1 a loss, and watch gkd_ratio/* of the run. MODEL.WEIGHTS names the student's
checkpoint, KEY VALUE pairs at the end override the config. Examples:
    python tools/suggest_weights.py --config-file configs/gkd_frcnn_kitti.yaml --batches 200 --ratio 0.5
    python tools/suggest_weights.py --config-file configs/toy/gkd_frcnn.yaml --batches 20 \\
        --ratio 0.3 --gradient 1.0 --attention 0.1
"""

import argparse
import itertools
import sys

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate

from gkd_d2.checkpoint import StudentCheckpointer
from gkd_d2.config import DISTILLER, read_config
from gkd_d2.engine.preflight import PreflightError, check_inputs
from gkd_d2.engine.trainer import Trainer
from gkd_d2.streams import seed_everything
from gkd_d2.tuning import Ratio, measure_ratios, suggest_weights, unit_weights

TERMS = ("gradient", "box", "attention", "image")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of a distiller")
    parser.add_argument("--batches", type=int, default=200, metavar="N", help="to measure with (default: 200)")
    parser.add_argument("--ratio", type=float, default=0.5, metavar="R", help="wanted for every loss (default: 0.5)")
    for term in TERMS:
        parser.add_argument(f"--{term}", type=float, metavar="R", help=f"wanted for the {term} loss instead")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="override the config")
    args = parser.parse_args()
    if args.batches < 1:
        parser.error(f"--batches is {args.batches}, but must be at least 1")
    for name in ("ratio", *TERMS):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < float("inf"):
            parser.error(f"--{name} is {getattr(args, name)}, but must be a finite number >= 0")
    return args


def markdown(cfg: CfgNode, ratios: dict[str, Ratio], weights: dict[str, float]) -> str:
    """The table of what was measured and what is proposed."""
    rows = []
    for term, ratio in ratios.items():
        now = cfg.GKD.LOSS_WEIGHTS[term.upper()]
        levels = " ".join(f"{level} {now * value:.2g}" for level, value in ratio.levels.items())
        spread = f"{now * ratio.low:.2g} to {now * ratio.high:.2g}"
        rows.append([term, now, f"{now * ratio.median:.3g}", spread, levels, weights[term]])
    headers = ["loss", "weight", "ratio: median", "10 % to 90 % of the batches", "median by level", "proposed weight"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Run the command."""
    args = parse_args()
    try:
        cfg = read_config(args.config_file, args.opts)
        if cfg.MODEL.META_ARCHITECTURE != DISTILLER:
            raise ValueError(f"{args.config_file} is no config of a {DISTILLER}: name one with a teacher")
        # Any seed serves to measure; the same one gives the same numbers again.
        cfg.SEED = max(cfg.SEED, 0)
        cfg.freeze()
        check_inputs(cfg, eval_only=False, resume=False)
        seed_everything(cfg.SEED)
        distiller = build_model(unit_weights(cfg))
        StudentCheckpointer(distiller).load(cfg.MODEL.WEIGHTS)
        batches = itertools.islice(Trainer.build_train_loader(cfg), args.batches)
        ratios = measure_ratios(distiller, batches, cfg.SEED)
    except (PreflightError, ValueError, OSError) as error:
        sys.exit(str(error))
    wanted = {term: args.ratio if getattr(args, term) is None else getattr(args, term) for term in TERMS}
    weights = suggest_weights(ratios, wanted)
    print(f"\n{markdown(cfg, ratios, weights)}\n\nFor {', '.join(f'{t} {r:g}' for t, r in wanted.items())}:\n\nGKD:")
    print("  LOSS_WEIGHTS:\n" + "\n".join(f"    {term.upper()}: {weight!r}" for term, weight in weights.items()))


if __name__ == "__main__":
    main()
