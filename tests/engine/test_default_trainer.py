"""What Detectron2's own trainer gives to a distillation, with the hooks that can be added to it and without."""

import os
import signal
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.engine import AMPTrainer, DefaultTrainer
from detectron2.engine.hooks import CallbackHook, EvalHook, LRScheduler, PeriodicCheckpointer, PeriodicWriter
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from short_runs import metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import training_batch
from torch.optim.swa_utils import AveragedModel

from gkd_d2.config import detector_config
from gkd_d2.engine.hooks import (
    DeadLossError,
    GradientScale,
    LossWatch,
    PeriodicSaver,
    SaveOnSigterm,
    add_distillation_hooks,
)
from gkd_d2.engine.trainer import Trainer

NOT_WATCHED = "Nothing watches this distillation"
NOT_AVERAGED = "MODEL_EMA.ENABLED is True, but only gkd_d2.engine.trainer.Trainer"


@pytest.fixture(autouse=True)
def _logger(caplog):
    """DefaultTrainer sets Detectron2's logger up where it is silent, and so for all later tests."""
    caplog.set_level("INFO", logger="detectron2")


class UsersTrainer(DefaultTrainer):
    """With a hook between the evaluation and the writers, as many projects have."""

    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, is_train=True))

    def build_hooks(self):
        hooks = super().build_hooks()
        hooks.insert(-1, CallbackHook(after_step=lambda trainer: trainer.storage.put_scalar("validation_loss", 1.0)))
        return hooks


@pytest.mark.parametrize("kind", [DefaultTrainer, UsersTrainer])
def test_the_hooks_make_a_plain_trainer_watch(kind, training, caplog):
    """Every scalar of an iteration in which Detectron2 writes is written, ratios are logged, and pictures drawn."""
    cfg = training(iterations=21)
    cfg.GKD.VIS_PERIOD = 20
    trainer = kind(cfg)
    add_distillation_hooks(trainer)
    with caplog.at_level("INFO", logger="gkd_d2.engine.hooks"):
        trainer.train()
    rows = metrics(cfg.OUTPUT_DIR)
    losses = {f"gkd_ratio/{name}" for name in ("gradient", "box", "attention", "image")}
    assert losses | {"gkd_value/box/p3", "gkd_ratio/image/p4"} <= rows[19].keys() & rows[20].keys()
    assert sum(line.startswith("gkd_ratio at iteration ") for line in caplog.messages) == 3
    assert NOT_WATCHED not in caplog.text
    events = EventAccumulator(cfg.OUTPUT_DIR, size_guidance={"images": 0})
    events.Reload()
    assert [image.step for image in events.Images("gkd/maps_and_detections")] == [0, 20]


def test_the_model_can_be_copied_in_a_training(training):
    """As by hooks that average its weights."""
    cfg = training(iterations=2)
    cfg.GKD.VIS_PERIOD = 1
    trainer = DefaultTrainer(cfg)
    add_distillation_hooks(trainer)
    copies = []

    def copy_model(trainer):
        average = AveragedModel(trainer.model)
        average.update_parameters(trainer.model)
        copies.append(average.module)

    trainer.register_hooks([CallbackHook(after_step=copy_model)])
    trainer.train()
    assert [model.listeners for model in copies] == [None, None]
    last = trainer.model.state_dict()
    assert all(torch.equal(value, last[name]) for name, value in copies[-1].state_dict().items())


def test_a_second_training_of_a_model_is_measured_as_the_first(training, monkeypatch):
    cfg = training(iterations=7)
    cfg.GKD.WATCH_PERIOD, cfg.GKD.VIS_PERIOD = 5, 3
    model, counts = build_model(cfg), []
    monkeypatch.setattr(UsersTrainer, "build_model", classmethod(lambda *_: model))
    for _ in range(2):
        trainer = UsersTrainer(cfg)
        add_distillation_hooks(trainer)
        trainer.train()
        ratios, pictures = trainer.storage.history("gkd_ratio/box").values(), trainer.storage._vis_data
        counts.append(([iteration for _, iteration in ratios], len(pictures)))
        assert model.listeners is None
    assert counts[0] == counts[1] and counts[0][0] == [0, 4, 6]


def test_a_hook_that_lets_nobody_listen_stops_no_training(training, caplog):
    trainer = DefaultTrainer(training(iterations=2))
    add_distillation_hooks(trainer)
    trainer.register_hooks([CallbackHook(before_train=lambda trainer: setattr(trainer.model, "listeners", []))])
    trainer.train()
    assert trainer.iter == 2 and "gkd_ratio/box" not in trainer.storage.latest()
    assert trainer.model.listeners == []
    assert NOT_WATCHED not in caplog.text


@pytest.mark.parametrize("method", ["gkd", "none"])
def test_a_negative_period_of_pictures_is_refused(method, training):
    cfg = training(iterations=1)
    cfg.GKD.METHOD, cfg.GKD.VIS_PERIOD = method, -1
    with pytest.raises(ValueError, match="GKD.VIS_PERIOD is -1, but must be >= 0"):
        Trainer(cfg)


@pytest.mark.parametrize(("kind", "saver"), [(DefaultTrainer, PeriodicCheckpointer), (Trainer, PeriodicSaver)])
def test_the_hooks_come_before_checkpoints_and_evaluation_once(kind, saver, training):
    trainer = kind(training(iterations=1))
    add_distillation_hooks(trainer)
    add_distillation_hooks(trainer)
    kinds = [type(hook) for hook in trainer._hooks]
    assert kinds.count(LossWatch) == kinds.count(SaveOnSigterm) == 1
    places = [kinds.index(hook) for hook in (LRScheduler, LossWatch, SaveOnSigterm, saver, EvalHook, PeriodicWriter)]
    assert places == sorted(places)
    assert all(hook.trainer.max_iter == 1 for hook in trainer._hooks)


def test_a_plain_detector_gets_no_watch(training):
    trainer = DefaultTrainer(detector_config(training(iterations=1)))
    add_distillation_hooks(trainer)
    kinds = [type(hook) for hook in trainer._hooks]
    assert SaveOnSigterm in kinds and LossWatch not in kinds


@pytest.mark.parametrize("kind", [DefaultTrainer, Trainer])
@pytest.mark.parametrize(("last", "name"), [(1, "model_0000001.pth"), (4, "model_final.pth")])
def test_sigterm_saves_a_state_that_is_resumed(kind, last, name, training):
    cfg = training(iterations=5)
    trainer = kind(cfg)
    add_distillation_hooks(trainer)

    def end(trainer):
        if trainer.iter == last:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.register_hooks([CallbackHook(before_step=end)])
    with pytest.raises(SystemExit) as error:
        trainer.train()
    assert error.value.code == 128 + signal.SIGTERM
    assert sorted(path.name for path in Path(cfg.OUTPUT_DIR).glob("*.pth")) == [name]
    resumed = kind(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == last + 1
    assert all(
        torch.equal(value, resumed.model.state_dict()[name]) for name, value in trainer.model.state_dict().items()
    )


def test_a_dead_level_stops_a_plain_trainer(training):
    cfg = training(iterations=5)
    cfg.GKD.FEATURES, cfg.INPUT.MAX_SIZE_TRAIN = ["p4", "p7"], 100
    cfg.GKD.WATCH_PATIENCE, cfg.SOLVER.CHECKPOINT_PERIOD = 2, 1
    trainer = DefaultTrainer(cfg)
    add_distillation_hooks(trainer)
    with pytest.raises(DeadLossError, match="A resumed run continues from the last checkpoint"):
        trainer.train()
    resumed = DefaultTrainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 1


def test_the_distiller_learns_the_scale_of_amp(training):
    """AMPTrainer itself runs on a GPU alone."""
    trainer = DefaultTrainer(training(iterations=1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer._trainer = AMPTrainer(trainer.model, trainer.data_loader, trainer.optimizer, grad_scaler=scaler)
    add_distillation_hooks(trainer)
    scaler.scale(torch.ones(()))
    next(hook for hook in trainer._hooks if isinstance(hook, GradientScale)).before_step()
    assert trainer.model.gradient_scale == 1024


# --- without the hooks


def test_a_distiller_that_nobody_watches_says_so_once(training, caplog):
    DefaultTrainer(training(iterations=3)).train()
    (warning,) = [record.getMessage() for record in caplog.records if NOT_WATCHED in record.getMessage()]
    assert (
        "    from gkd_d2.engine.hooks import add_distillation_hooks\n    add_distillation_hooks(trainer)\n" in warning
    )


def test_an_average_that_nobody_keeps_is_said(training, caplog):
    cfg = training(iterations=1)
    cfg.MODEL_EMA.ENABLED = True
    for config in (cfg, detector_config(cfg)):
        trainer = DefaultTrainer(config)
        with pytest.raises(ValueError, match="MODEL_EMA.ENABLED is True, but this trainer keeps no average of the wei"):
            add_distillation_hooks(trainer)
    assert NOT_AVERAGED not in caplog.text
    DefaultTrainer(cfg).train()
    assert caplog.text.count(NOT_AVERAGED) == 1


@pytest.mark.parametrize("add", [True, False])
def test_parts_of_a_batch_are_refused(add, training):
    cfg = training(iterations=1)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE_STEPS = 4, 2
    trainer = DefaultTrainer(cfg)
    if add:
        add_distillation_hooks(trainer)
    with pytest.raises(ValueError, match="ACCUMULATE_STEPS is 2, but this trainer computes the whole batch of .* 4 at"):
        trainer.train()


@pytest.mark.parametrize(
    ("wanted", "autocast", "refused"),
    [
        ("bfloat16", torch.float16, True),
        ("bfloat16", torch.bfloat16, False),
        ("bfloat16", None, False),
        ("float16", torch.bfloat16, False),
        ("float16", torch.float16, False),
    ],
)
def test_float16_where_bfloat16_was_asked_for_is_refused(wanted, autocast, refused, distiller_config):
    cfg = distiller_config("retinanet")
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, wanted
    distiller = build_model(cfg).train()
    with EventStorage(), torch.autocast("cpu", autocast, enabled=autocast is not None):
        if refused:
            with pytest.raises(ValueError, match="SOLVER.AMP.DTYPE is bfloat16, but this trainer computes in float16"):
                distiller(training_batch())
        else:
            assert "loss_bmfi_box" in distiller(training_batch())


@pytest.mark.parametrize("images", [1, 2, 3, 4])
def test_what_is_no_whole_batch_is_not_refused(images, distiller_config):
    """Parts of it, and a loader of the user's own."""
    cfg = distiller_config("retinanet")
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE_STEPS = 4, 4
    distiller = build_model(cfg).train()
    batch = training_batch([(90, 120)] * images)
    with EventStorage():
        if images == 4:
            with pytest.raises(ValueError, match="ACCUMULATE_STEPS"):
                distiller(batch)
        else:
            distiller(batch)
