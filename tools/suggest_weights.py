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

from gkd_d2.analysis.tuning import Ratio, measure_ratios, suggest_weights, unit_weights
from gkd_d2.config import read_distiller_config
from gkd_d2.engine.preflight import PreflightError, check_inputs
from gkd_d2.engine.trainer import Trainer
from gkd_d2.methods import Term, build_method
from gkd_d2.utils.checkpoint import StudentCheckpointer
from gkd_d2.utils.command_line import parse_options_first
from gkd_d2.utils.progress import track
from gkd_d2.utils.random_streams import seed_everything
from gkd_d2.utils.user_modules import add_import_option

import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate


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
    if args.batches < 1:
        parser.error(f"--batches is {args.batches}, but must be at least 1")
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


def wanted_ratios(args: argparse.Namespace, cfg: CfgNode, terms: list[Term]) -> dict[str, float]:
    """Name of a loss -> the ratio that is asked for, of those that are on or that --term names.

    Raises:
        ValueError: --term names a loss that is not among ``terms``, or no loss is left.
    """
    if not terms:
        raise ValueError(f"GKD.METHOD is {cfg.GKD.METHOD}, which has no loss to weigh")
    names, given = [term.name for term in terms], dict(args.term)
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"--term names {', '.join(unknown)}, but the method's losses are {', '.join(names)}")
    wanted = {term.name: given.get(term.name, args.ratio) for term in terms if term.weight > 0 or term.name in given}
    if not wanted:
        raise ValueError(f"all weights of GKD.METHOD {cfg.GKD.METHOD} are 0: name losses by --term {names[0]}=0.5")
    return wanted


def markdown(terms: list[Term], ratios: dict[str, Ratio], weights: dict[str, float]) -> str:
    """The table of what was measured and what is proposed."""
    rows = []
    for term in terms:
        now, found = term.weight, ratios[term.name]
        levels = " ".join(f"{level} {now * value:.2g}" for level, value in found.levels.items())
        spread = f"{now * found.low:.2g} to {now * found.high:.2g}"
        rows.append([term.name, now, f"{now * found.median:.3g}", spread, levels, weights[term.name]])
    headers = ["loss", "weight", "ratio: median", "10 % to 90 % of the batches", "median by level", "proposed weight"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def yaml_of(terms: list[Term], weights: dict[str, float]) -> str:
    """The weights as they stand in a config file."""
    nested: dict = {}
    for term in terms:
        *path, key = term.key.split(".")
        node = nested
        for name in path:
            node = node.setdefault(name, {})
        node[key] = weights[term.name]
    return yaml.safe_dump(nested, sort_keys=False)


def main() -> None:
    """Run the command."""
    args = parse_args()
    try:
        cfg = read_distiller_config(args.config_file, args.opts, args.imports)
        # Any seed serves to measure; the same one gives the same numbers again.
        cfg.SEED = max(cfg.SEED, 0)
        cfg.freeze()
        terms = list(build_method(cfg).terms.values())
        wanted = wanted_ratios(args, cfg, terms)
        off = [term for term in terms if term.name not in wanted]
        terms = [term for term in terms if term.name in wanted]
        unit = unit_weights(cfg, wanted)
        check_inputs(cfg, eval_only=False, resume=False)
        seed_everything(cfg.SEED)
        distiller = build_model(unit)
        StudentCheckpointer(distiller).load_weights(cfg.MODEL.WEIGHTS)
        batches = itertools.islice(Trainer.build_train_loader(cfg), args.batches)
        ratios = measure_ratios(distiller, track(batches, total=args.batches, title="batches"), cfg.SEED)
    except (PreflightError, ValueError, OSError) as error:
        sys.exit(str(error))
    weights = suggest_weights(ratios, wanted)
    print(f"\n{markdown(terms, ratios, weights)}\n")
    for term in off:
        print(f"Left out: {term.name}, whose weight {term.key} is 0. Measure it by --term {term.name}={args.ratio:g}\n")
    print(f"For {', '.join(f'{t} {r:g}' for t, r in wanted.items())}:\n")
    print(yaml_of(terms, weights), end="")


if __name__ == "__main__":
    main()
