"""Checkpoints and the watch over the distillation losses, in real short trainings on toy scenes."""

import itertools
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import TrainingSampler
from detectron2.engine.hooks import PreciseBN
from tiny import TOY_SCENES

from gkd_d2.config import detector_config
from gkd_d2.data.kitti import load_kitti
from gkd_d2.engine.hooks import DeadLossError
from gkd_d2.engine.trainer import Trainer

TERMS = {
    "gradient": "loss_gkd_gradient",
    "box": "loss_bmfi_box",
    "attention": "loss_bmfi_attention",
    "image": "loss_bmfi_image",
}


@pytest.fixture
def without_boxes(datasets):
    """A function that registers the toy scenes, some of them without their boxes."""
    name = "toy_kitti_without_boxes"

    def register(cfg, empty):
        records = load_kitti(datasets / "toy_kitti", "train")
        for index in empty:
            records[index]["annotations"] = []
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).thing_classes = MetadataCatalog.get("toy_kitti_train").thing_classes
        cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = (name,), False

    yield register
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def train(cfg):
    trainer = Trainer(cfg)
    trainer.train()
    return trainer


def history(trainer, name):
    """Iteration -> value of a scalar."""
    return {iteration: value for value, iteration in trainer.storage.history(name).values()}


def metrics(tmp_path):
    """Iteration -> what metrics.json says of it."""
    rows = [json.loads(line) for line in (tmp_path / "output" / "metrics.json").read_text().splitlines()]
    return {row["iteration"]: row for row in rows}


def checkpoints(tmp_path):
    return {path.name for path in (tmp_path / "output").glob("*.pth")}


# --- checkpoints and signals

# An iteration that never ends, as where another process died.
HANGING = """
import os, signal, time
from gkd_d2.engine import hooks

hooks.GRACE_SECONDS = 0.2
hooks.SaveOnSigterm().before_train()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(600)
"""


def test_sigterm_does_not_wait_for_ever():
    assert subprocess.run([sys.executable, "-c", HANGING], timeout=300).returncode == 128 + signal.SIGTERM


def test_the_signal_is_free_again_after_a_training(training):
    before = signal.getsignal(signal.SIGTERM)
    train(training(iterations=1))
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("iterations", "expected"),
    [(5, {"model_0000001.pth": 1, "model_0000003.pth": 3, "model_final.pth": 4}), (2, {"model_final.pth": 1})],
)
def test_checkpoints_are_named_after_their_iteration(iterations, expected, training, tmp_path):
    cfg = detector_config(training(iterations=iterations))
    cfg.defrost()
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    train(cfg)
    assert checkpoints(tmp_path) == set(expected)
    for name, iteration in expected.items():
        assert torch.load(tmp_path / "output" / name)["iteration"] == iteration
    assert (tmp_path / "output" / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize("key", ["SOLVER.CHECKPOINT_PERIOD", "GKD.WATCH_PERIOD", "GKD.WATCH_PATIENCE"])
def test_periods_below_1_are_refused(key, training):
    cfg = training(iterations=1)
    cfg.merge_from_list([key, 0])
    with pytest.raises(ValueError, match=f"{key} is 0, but must be >= 1"):
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
    assert checkpoints(tmp_path) == {"model_0000001.pth", "model_final.pth"}
    left = torch.load(tmp_path / "output" / "model_final.pth")
    assert left["iteration"] == 2
    assert all(torch.equal(left["model"][name], value) for name, value in whole["model"].items())
    states = [checkpoint["trainer"]["_trainer"]["optimizer"]["state"] for checkpoint in (left, whole)]
    assert states[0].keys() == states[1].keys() != set()


# --- the watch


def test_the_watch_writes_values_and_ratios(training, tmp_path):
    cfg = training("faster", iterations=20)
    cfg.GKD.WATCH_PERIOD = 8
    trainer = train(cfg)
    measured = [0, 7, 15]
    values = {f"gkd_value/{term}/{level}" for term in TERMS for level in ("p3", "p4")}
    ratios = {f"gkd_ratio/{term}{level}" for term in TERMS for level in ("", "/p3", "/p4")}
    for name in values | ratios:
        assert list(history(trainer, name)) == measured, name
    for term, loss in TERMS.items():
        for iteration in measured:
            levels = sum(history(trainer, f"gkd_value/{term}/{level}")[iteration] for level in ("p3", "p4"))
            assert levels == pytest.approx(history(trainer, loss)[iteration], rel=1e-5)
    # Detectron2 writes the latest value of every scalar once in 20 iterations.
    row = metrics(tmp_path)[15]
    assert values | ratios <= row.keys()
    assert all(row[name] > 0 for name in ratios)
    for name in values:
        assert row[name] == history(trainer, name)[15]


def test_no_watch_without_distillation(training, tmp_path):
    cfg = training(iterations=2)
    cfg.merge_from_list([item for term in TERMS for item in (f"GKD.LOSS_WEIGHTS.{term.upper()}", 0.0)])
    train(cfg)
    assert not any(name.startswith("gkd_") for row in metrics(tmp_path).values() for name in row)


def test_a_dead_level_stops_the_run_and_keeps_its_checkpoints(training, tmp_path):
    """Of a map of one cell nothing can be learnt."""
    cfg = training(iterations=30)
    cfg.GKD.FEATURES = ["p4", "p7"]
    cfg.INPUT.MAX_SIZE_TRAIN = 100
    cfg.GKD.WATCH_PATIENCE = 3
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    with pytest.raises(DeadLossError) as error:
        train(cfg)
    text = str(error.value)
    assert text.startswith(
        "the gradient of the gradient loss (GKD.LOSS_WEIGHTS.GRADIENT) at the student's p7 was exactly 0 in the last 3 "
        "iterations, up to iteration 2: "
    )
    assert "Take p7 out of GKD.FEATURES" in text
    # Every scalar is written before the end.
    assert metrics(tmp_path)[2]["gkd_ratio/gradient/p7"] == 0
    assert metrics(tmp_path)[2]["gkd_ratio/image/p7"] > 0
    assert checkpoints(tmp_path) == {"model_0000001.pth", "model_stopped.pth"}
    assert torch.load(tmp_path / "output" / "model_stopped.pth")["iteration"] == 2
    assert (tmp_path / "output" / "last_checkpoint").read_text() == "model_0000001.pth"
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2


@pytest.mark.parametrize("kind", ["faster", "retinanet"])
def test_a_run_without_boxes_is_stopped(kind, training, without_boxes):
    cfg = training(kind, iterations=10)
    without_boxes(cfg, range(TOY_SCENES))
    cfg.GKD.WATCH_PATIENCE = 2
    with pytest.raises(
        DeadLossError, match=r"box loss \(GKD.LOSS_WEIGHTS.BOX\) at the student's p3 was exactly 0 in"
    ) as error:
        train(cfg)
    assert "the last 2 iterations, up to iteration 1" in str(error.value)


@pytest.mark.parametrize("patience", [2, 3])
def test_only_as_many_iterations_in_a_row_stop_a_run(patience, training, without_boxes):
    """Iterations 1 and 2 of 6 see images without boxes."""
    cfg = training(iterations=6)
    order = list(itertools.islice(TrainingSampler(TOY_SCENES, seed=cfg.SEED), 6))
    without_boxes(cfg, order[1:3])
    cfg.GKD.WATCH_PERIOD, cfg.GKD.WATCH_PATIENCE = 2, patience
    trainer = Trainer(cfg)
    if patience == 2:
        with pytest.raises(DeadLossError, match="up to iteration 2"):
            trainer.train()
        return
    trainer.train()
    assert trainer.iter == 6
    values = history(trainer, "gkd_value/box/p3")
    # The first, every second, and all until the loss is seen alive.
    assert list(values) == [0, 1, 2, 3, 5]
    assert [iteration for iteration, value in values.items() if value == 0] == [1, 2]


def test_a_gradient_that_is_not_finite_stops_the_run(training, tmp_path):
    """With float16 and too large a scale, which the trainer by itself would go on lowering."""
    cfg = training(iterations=10)
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, "float16"
    cfg.GKD.WATCH_PATIENCE = 2
    trainer = Trainer(cfg)
    step = trainer._trainer
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60).state_dict()
    step.load_state_dict({**step.state_dict(), "grad_scaler": scaler})
    with pytest.raises(
        DeadLossError, match="at the student's p3 was not finite in the last 2 iterations, up to iteration 1"
    ):
        trainer.train()
    saved = torch.load(tmp_path / "output" / "model_stopped.pth")["model"]
    assert all(value.isfinite().all() for value in saved.values())
    assert not (tmp_path / "output" / "last_checkpoint").exists()
