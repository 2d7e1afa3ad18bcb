"""What a run's seed is, and what a resume takes over and notices."""

import json
import logging
import re

import pytest
import torch
from detectron2.utils import comm

from gkd_d2.engine.trainer import Trainer, settle_seed


def test_a_given_seed_stays_and_a_drawn_one_is_kept_at_a_resume(training, tmp_path):
    cfg = training(iterations=1)
    assert settle_seed(cfg, resume=False).SEED == cfg.SEED == 7
    cfg.SEED = -1
    drawn = {settle_seed(cfg, resume=False).SEED for _ in range(3)}
    assert len(drawn) == 3 and min(drawn) >= 0
    (tmp_path / "output" / "config.yaml").write_text("SEED: 12\n")
    assert settle_seed(cfg, resume=True).SEED == 12
    assert settle_seed(cfg, resume=False).SEED != 12


def resume(cfg):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    return trainer


def test_a_resume_takes_over_the_average_and_says_what_changed(training, caplog):
    cfg = training("retinanet", iterations=2)
    trainer = Trainer(cfg)
    trainer.train()
    average = trainer.model.student.loss_normalizer
    assert average != Trainer(cfg).model.student.loss_normalizer

    cfg.SOLVER.MAX_ITER = 4
    again = resume(cfg)
    assert again.start_iter == 2
    assert again.model.student.loss_normalizer == average
    assert "does not continue exactly" not in caplog.text
    momentum = [state["momentum_buffer"] for state in again.optimizer.state_dict()["state"].values()]
    assert all(
        torch.equal(ours, theirs["momentum_buffer"])
        for ours, theirs in zip(momentum, trainer.optimizer.state_dict()["state"].values())
    )

    cfg.SOLVER.IMS_PER_BATCH, cfg.SEED = 2, 8
    resume(cfg)
    assert "does not continue exactly where it was left: SEED was 7 and is 8, SOLVER.IMS_PER_BATCH was 1 and is 2" in (
        caplog.text
    )


def test_machines_must_share_the_output_folder(training, monkeypatch):
    """Another process that finds no checkpoint would start at 0."""
    cfg = training(iterations=1)
    Trainer(cfg).train()
    cfg.SOLVER.MAX_ITER = 2
    trainer = Trainer(cfg)
    monkeypatch.setattr(comm, "all_gather", lambda start: [start, 0])
    with pytest.raises(RuntimeError, match="would start at iterations 1, 0: OUTPUT_DIR .* must be one folder"):
        trainer.resume_or_load(resume=True)


@pytest.mark.parametrize(("start", "iterations", "lines"), [(0, 7, [0, 4, 6]), (0, 1, [0]), (7, 13, [7, 11, 12])])
def test_the_first_lines_come_early(start, iterations, lines, training, tmp_path, caplog, monkeypatch):
    """The first with an estimate of the time left is that of the fifth iteration; metrics.json gets the last alone."""
    cfg = training("retinanet", iterations=iterations)
    cfg.GKD.LOSS_WEIGHTS.ATTENTION = 0.0
    trainer = Trainer(cfg)
    trainer.start_iter = start
    # A tool that ran in this process may have turned it off.
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    caplog.set_level("INFO", "detectron2")
    trainer.train()
    printed = [record.getMessage() for record in caplog.records if record.name == "detectron2.utils.events"]
    assert [int(re.search(r"iter: (\d+)", line)[1]) for line in printed] == lines
    assert all("total_loss: " in line and "loss_bmfi_box: " in line for line in printed)
    assert not any("attention" in line for line in printed)
    assert ["eta: " in line for line in printed[:2]] == [False, True][: len(printed)]
    rows = [json.loads(line) for line in (tmp_path / "output" / "metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "total_loss" in row] == [iterations - 1]
    assert len({row["iteration"] for row in rows}) == len(rows)
    assert not any("attention" in name for row in rows for name in row)
