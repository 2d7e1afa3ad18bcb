#!/usr/bin/env python3
"""Train or evaluate a detector of a Detectron2 config: distilled, or a teacher or student alone.

The arguments are Detectron2's own, KEY VALUE pairs at the end override the config. Examples:
    python tools/train_net.py --config-file configs/gkd_frcnn_kitti.yaml --num-gpus 4
    python tools/train_net.py --config-file configs/gkd_frcnn_kitti.yaml --num-gpus 4 --resume
    python tools/train_net.py --config-file configs/gkd_frcnn_kitti.yaml --eval-only \\
        MODEL.WEIGHTS output/gkd_frcnn_kitti/model_final.pth
    python tools/train_net.py --config-file configs/toy/gkd_retinanet.yaml --num-gpus 2 MODEL.DEVICE cpu
    torchrun --nproc-per-node 4 tools/train_net.py --config-file configs/gkd_frcnn_kitti.yaml
    srun --ntasks-per-node 4 --gpus-per-node 4 python tools/train_net.py --config-file configs/gkd_frcnn_kitti.yaml
On a CPU --num-gpus is the number of processes. A run that SIGTERM stops saves its state and ends with status 143.
"""

import argparse
import sys

from gkd_d2.config import detector_config, read_config, without_backbone_weights
from gkd_d2.engine.launch import count_processes, launch
from gkd_d2.engine.model_ema import loaded_ema
from gkd_d2.engine.preflight import PreflightError, check_inputs
from gkd_d2.engine.resume import ResumeError, settle_seed
from gkd_d2.engine.run import YacsRun
from gkd_d2.engine.sentences import ending_in_a_sentence
from gkd_d2.engine.setup import set_up_run
from gkd_d2.engine.trainer import Trainer
from gkd_d2.utils.checkpoint import CompleteCheckpointer
from gkd_d2.utils.command_line import parse_options_first
from gkd_d2.utils.finite import check_finite
from gkd_d2.utils.last_checkpoint import has_checkpoint
from gkd_d2.utils.user_modules import add_import_option, import_modules

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm


def main(cfg: CfgNode, args: argparse.Namespace):
    """Train or evaluate, in each process of the run."""
    # A process that was started for this knows nothing of what the first one imported.
    import_modules(cfg.GKD.IMPORTS, "GKD.IMPORTS")
    with ending_in_a_sentence(cfg.OUTPUT_DIR, OSError, ResumeError, ValueError):
        cfg = settle_seed(cfg, resume=args.resume)
        set_up_run(YacsRun(cfg), args)
        if not args.eval_only:
            resumed = args.resume and has_checkpoint(cfg.OUTPUT_DIR)
            # The file that the backbone once started with may be gone since.
            trainer = Trainer(without_backbone_weights(cfg) if resumed else cfg)
            trainer.resume_or_load(resume=args.resume)
        else:
            model = Trainer.build_model(cfg)
            reader = CompleteCheckpointer(model, cfg.OUTPUT_DIR)
            rest = reader.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
            ema = loaded_ema(YacsRun(cfg).model_ema, model, rest)
            check_finite(model, "the detector's")
    with ending_in_a_sentence(cfg.OUTPUT_DIR, ArithmeticError, OSError, RuntimeError, ValueError):
        if not args.eval_only:
            return trainer.train()
        results = Trainer.test(cfg, model)
        if ema is not None:
            results.update(Trainer.test_with_EMA(cfg, model, ema))
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_TTA(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    add_import_option(parser)
    args = parse_options_first(parser)
    if not args.config_file:
        parser.error("--config-file is missing: name one of configs/")
    try:
        cfg = read_config(args.config_file, args.opts, args.imports)
        if args.eval_only:
            # The student is evaluated as the plain detector it is: no teacher is built.
            cfg = without_backbone_weights(detector_config(cfg))
        cfg.freeze()
        processes = count_processes(args, device=cfg.MODEL.DEVICE)
        check_inputs(YacsRun(cfg), eval_only=args.eval_only, resume=args.resume, processes=processes, writes=True)
    except PreflightError as error:
        sys.exit(str(error))
    except (OSError, ValueError) as error:
        sys.exit(f"This run can't start:\n- {error}")
    launch(main, args, (cfg, args), device=cfg.MODEL.DEVICE)
