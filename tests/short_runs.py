"""Short real trainings by the project's own trainer, and what they leave in their folders."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine.hooks import CallbackHook

from gkd_d2.engine.trainer import Trainer


def train(cfg: CfgNode) -> Trainer:
    """A whole training; the trainer as it is afterwards."""
    trainer = Trainer(cfg)
    trainer.train()
    return trainer


def killed(cfg: CfgNode, iteration: int) -> None:
    """A training that is killed at the end of an iteration; for a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trainer = Trainer(cfg)

    def kill(trainer):
        if trainer.iter == iteration:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.register_hooks([CallbackHook(after_step=kill)])
    trainer.train()


def metrics(folder: str | Path) -> dict[int, dict[str, float]]:
    """Iteration -> what metrics.json says of it."""
    rows = [json.loads(line) for line in Path(folder, "metrics.json").read_text(encoding="utf-8").splitlines()]
    return {row["iteration"]: row for row in rows}


def checkpoints(folder: str | Path) -> set[str]:
    """Names of the checkpoints that a run has left."""
    return {path.name for path in Path(folder).glob("*.pth")}
