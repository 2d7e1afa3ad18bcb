"""What a run's seed is, and what a resume takes over and notices."""

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
