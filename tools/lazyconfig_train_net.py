#!/usr/bin/env python3
"""Train or evaluate a detector of a Detectron2 LazyConfig, a .py file: distilled, or a teacher or student alone.

The arguments are those of Detectron2's own tool of this name; key=value at the end overrides the config. Examples:
    python tools/lazyconfig_train_net.py --config-file configs/lazy/gkd_retinanet_kitti.py --num-gpus 4
    python tools/lazyconfig_train_net.py --config-file configs/lazy/gkd_retinanet_kitti.py --num-gpus 4 --resume
    python tools/lazyconfig_train_net.py --config-file configs/lazy/gkd_retinanet_kitti.py --eval-only \\
        train.init_checkpoint=output/lazy/gkd_retinanet_kitti/model_final.pth
    python tools/lazyconfig_train_net.py --config-file configs/lazy/gkd_retinanet_kitti.py --num-gpus 2 train.device=cpu
    torchrun --nproc-per-node 4 tools/lazyconfig_train_net.py --config-file configs/lazy/gkd_retinanet_kitti.py
On a CPU --num-gpus is the number of processes. A run that SIGTERM stops saves its state and ends with status 143.
"""

import argparse
import sys

from gkd_d2.config.lazy_spec import plain_model, without_lazy_backbone_weights
from gkd_d2.engine.launch import count_processes, launch
from gkd_d2.engine.model_ema import loaded_ema
from gkd_d2.engine.preflight import PreflightError, check_inputs
from gkd_d2.engine.resume import ResumeError
from gkd_d2.engine.sentences import ending_in_a_sentence
from gkd_d2.engine.setup import set_up_run
from gkd_d2.lazy.methods import places_of_methods
from gkd_d2.lazy.names import in_lazy_words, speaking_lazily
from gkd_d2.lazy.read import read_lazy, warn_of_keys_without_effect
from gkd_d2.lazy.run import LazyRun
from gkd_d2.lazy.trainer import LazyTrainer, evaluate, settle_lazy_seed
from gkd_d2.utils.checkpoint import CompleteCheckpointer
from gkd_d2.utils.command_line import parse_options_first
from gkd_d2.utils.finite import check_finite
from gkd_d2.utils.last_checkpoint import has_checkpoint

from detectron2.config import instantiate
from detectron2.engine import default_argument_parser
from omegaconf import DictConfig


def read(args: argparse.Namespace) -> DictConfig:
    """The config of the run; an evaluation is that of the plain student, for which no teacher is built."""
    cfg = read_lazy(args.config_file, args.opts, eval_only=args.eval_only)
    if args.eval_only:
        cfg.model = plain_model(cfg.model)
        cfg = without_lazy_backbone_weights(cfg)
    return cfg


def main(args: argparse.Namespace):
    """Train or evaluate, in each process of the run."""
    # A LazyConfig can hold what can't be sent to another process: each reads it.
    cfg = read(args)
    folder = cfg.train.output_dir
    with speaking_lazily(places_of_methods(cfg.model)):
        with ending_in_a_sentence(folder, OSError, ResumeError, ValueError):
            settle_lazy_seed(cfg, resume=args.resume)
            set_up_run(LazyRun(cfg), args)
            warn_of_keys_without_effect(cfg)
            if not args.eval_only:
                resumed = args.resume and has_checkpoint(folder)
                # The file that a backbone once started with may be gone since.
                trainer = LazyTrainer(without_lazy_backbone_weights(cfg) if resumed else cfg)
                trainer.resume_or_load(resume=args.resume)
            else:
                model = instantiate(cfg.model).to(cfg.train.device)
                reader = CompleteCheckpointer(model, folder)
                rest = reader.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
                ema = loaded_ema(LazyRun(cfg).model_ema, model, rest)
                check_finite(model, "the detector's")
        with ending_in_a_sentence(folder, ArithmeticError, OSError, RuntimeError, ValueError):
            return evaluate(cfg, model, ema) if args.eval_only else trainer.train()


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    args = parse_options_first(parser)
    if not args.config_file:
        parser.error("--config-file is missing: name one of configs/lazy")
    try:
        cfg = read(args)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    try:
        processes = count_processes(args, device=cfg.train.device)
        run = LazyRun(cfg, eval_only=args.eval_only)
        check_inputs(run, eval_only=args.eval_only, resume=args.resume, processes=processes, writes=True)
    except (PreflightError, OSError, ValueError) as error:
        sys.exit(in_lazy_words(str(error), places_of_methods(cfg.model)))
    launch(main, args, (args,), device=cfg.train.device)
