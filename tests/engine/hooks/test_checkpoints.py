"""Checkpoints of short real trainings on toy scenes, and the end that a signal asks for."""

import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from detectron2.engine.hooks import PreciseBN
from short_runs import checkpoints, train

from gkd_d2.config import detector_config
from gkd_d2.engine.trainer import Trainer

# An iteration that never ends, as where another process died.
HANGING = """
import os, signal, time
from gkd_d2.engine import hooks, sigterm

sigterm.GRACE_SECONDS = 0.2
hooks.SaveOnSigterm().before_train()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(600)
"""


def test_training_in_another_thread(training, caplog):
    """As job servers do; Python handles signals in the main thread alone."""
    trainer = Trainer(training(iterations=1))
    with ThreadPoolExecutor() as pool:
        pool.submit(trainer.train).result()
    assert "SIGTERM will end the process without saving" in caplog.text
    assert trainer.iter == 1


def test_sigterm_does_not_wait_for_ever():
    assert subprocess.run([sys.executable, "-c", HANGING], timeout=300).returncode == 128 + signal.SIGTERM


def test_the_signal_is_free_again_after_a_training(training):
    before = signal.getsignal(signal.SIGTERM)
    train(training(iterations=1))
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_signal_is_free_again_after_an_evaluation_that_fails(training, monkeypatch):
    def fail(*_):
        raise RuntimeError("no evaluation")

    monkeypatch.setattr(Trainer, "test", fail)
    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    cfg = training(iterations=1)
    cfg.DATASETS.TEST = ("toy_kitti_val",)
    with pytest.raises(RuntimeError, match="no evaluation"):
        train(cfg)
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before


@pytest.mark.parametrize(
    ("iterations", "expected"),
    [(5, {"model_0000001.pth": 1, "model_0000003.pth": 3, "model_final.pth": 4}), (2, {"model_final.pth": 1})],
)
def test_checkpoints_are_named_after_their_iteration(iterations, expected, training, tmp_path):
    cfg = detector_config(training(iterations=iterations))
    cfg.defrost()
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    train(cfg)
    assert checkpoints(tmp_path / "output") == set(expected)
    for name, iteration in expected.items():
        assert torch.load(tmp_path / "output" / name)["iteration"] == iteration
    assert (tmp_path / "output" / "last_checkpoint").read_text() == "model_final.pth"


def test_a_period_below_1_is_refused(training):
    cfg = training(iterations=1)
    cfg.SOLVER.CHECKPOINT_PERIOD = 0
    with pytest.raises(ValueError, match="SOLVER.CHECKPOINT_PERIOD is 0, but must be >= 1"):
        Trainer(cfg)


def train_from_one_start(cfg):
    torch.manual_seed(5)
    return train(cfg)


def precise(cfg):
    cfg.TEST.PRECISE_BN.ENABLED, cfg.TEST.PRECISE_BN.NUM_ITER = True, 2
    return cfg


def test_a_distilled_run_ends_with_precise_statistics(training, tmp_path):
    final = tmp_path / "output" / "model_final.pth"
    cfg = training(iterations=3)
    train_from_one_start(cfg)
    plain = torch.load(final)
    trainer = train_from_one_start(precise(cfg))
    saved = torch.load(final)
    assert saved["iteration"] == 2
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(saved["model"][name], value), name
    for name, value in plain["model"].items():
        moved = name.endswith(("running_mean", "running_var"))
        assert moved or "num_batches" in name or torch.equal(saved["model"][name], value), name
        assert not (moved and torch.equal(saved["model"][name], value)), name


def test_precise_statistics_that_fail_leave_the_trained_model(training, tmp_path, monkeypatch):
    cfg = training(iterations=3)
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    train_from_one_start(cfg)
    whole = torch.load(tmp_path / "output" / "model_final.pth")
    shutil.rmtree(tmp_path / "output")
    (tmp_path / "output").mkdir()

    def fail(hook):
        raise OSError("an image can't be read")

    monkeypatch.setattr(PreciseBN, "update_stats", fail)
    with pytest.raises(OSError, match="an image can't be read"):
        train_from_one_start(precise(cfg))
    assert checkpoints(tmp_path / "output") == {"model_0000001.pth", "model_final.pth"}
    left = torch.load(tmp_path / "output" / "model_final.pth")
    assert left["iteration"] == 2
    assert all(torch.equal(left["model"][name], value) for name, value in whole["model"].items())
    states = [checkpoint["trainer"]["_trainer"]["optimizer"]["state"] for checkpoint in (left, whole)]
    assert states[0].keys() == states[1].keys() != set()
