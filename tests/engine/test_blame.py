"""What is blamed for a loss that is not finite: real trainings that diverge, and networks that are not sound."""

import copy
import math

import pytest
import torch
from detectron2.engine.hooks import HookBase
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from tiny import training_batch, watched

from gkd_d2.config import detector_config
from gkd_d2.engine.blame import Blame
from gkd_d2.engine.trainer import Trainer


def failed_training(cfg) -> tuple[Trainer, str]:
    """A training that must not end well, and what it said."""
    trainer = Trainer(cfg)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    return trainer, str(error.value)


RATE = "Lower SOLVER.BASE_LR, or clip the gradients by SOLVER.CLIP_GRADIENTS"
BFLOAT16 = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"]
OVER_THE_IMAGE = ["GKD.MAP_REGION", "image", "GKD.LOSS_WEIGHTS.GRADIENT", 0.02]
DIVERGING = {
    "rate": ("retinanet", ["SOLVER.BASE_LR", 1e6], "learning rate 1e+06"),
    # Of the two images one still has finite losses.
    "rate, in part": ("retinanet", ["SOLVER.BASE_LR", 10.0, *OVER_THE_IMAGE], "learning rate 10;"),
    "rate, bfloat16": ("retinanet", ["SOLVER.BASE_LR", 1e6, *BFLOAT16], "learning rate 1e+06"),
    "rate, faster": ("faster", ["SOLVER.BASE_LR", 1e6], "learning rate 1e+06"),
    "rate, alone": ("faster", ["SOLVER.BASE_LR", 1e6, "GKD.METHOD", "none"], "learning rate 1e+06"),
    "weight": ("retinanet", ["GKD.LOSS_WEIGHTS.IMAGE", 1e6], "or lower GKD.LOSS_WEIGHTS.IMAGE, which is 1e+06"),
    "weight, ratio": ("retinanet", ["GKD.LOSS_WEIGHTS.BOX", 1e30], "gkd_ratio/box inf"),
}


@pytest.mark.parametrize(("kind", "options", "said"), DIVERGING.values(), ids=DIVERGING)
def test_a_training_that_diverges_blames_no_image(kind, options, said, training):
    cfg = training(kind, iterations=20)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.WARMUP_ITERS = 2, 0
    cfg.merge_from_list(options)
    trainer, text = failed_training(cfg)
    assert trainer.iter > 0
    assert ".png" not in text and "GKD.TEACHER" not in text
    assert (
        "with the weights that the run started with at iteration 0 no image of the batch causes it, so it is not the "
        "images' fault. Last seen: total_loss "
    ) in text
    assert f" in iteration {trainer.iter - 1}, of which loss_" in text
    assert said in text and RATE in text
    assert ("gkd_ratio/image" in text) == ("GKD.METHOD" not in options)


def test_a_ratio_is_named_where_weights_are_calibrated(training):
    cfg = training(iterations=20)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.WARMUP_ITERS, cfg.GKD.WATCH_PERIOD = 2, 0, 1
    cfg.GKD.BALANCE, cfg.GKD.RATIOS.IMAGE = "calibrate", 1e8
    _, text = failed_training(cfg)
    assert f"{RATE}, or lower GKD.RATIOS.IMAGE, which is 1e+08" in text and "GKD.LOSS_WEIGHTS" not in text


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_a_weight_that_overflows_at_once_is_named(implementation, training):
    cfg = training(iterations=2)
    cfg.GKD.LOSS_WEIGHTS.BOX, cfg.GKD.IMPLEMENTATION = 1e38, implementation
    cfg.SOLVER.IMS_PER_BATCH = 2
    _, text = failed_training(cfg)
    assert text == (
        "Iteration 0: loss_bmfi_box is inf; every image causes it, so it is not the images' fault. Last seen: learning "
        "rate 1e-06. Lower GKD.LOSS_WEIGHTS.BOX, which is 1e+38"
    )


class Spoil(HookBase):
    """Makes a tensor of the model NaN once an iteration is done."""

    def __init__(self, name, iteration):
        self._name, self._iteration = name, iteration

    def after_step(self):
        if self.trainer.iter == self._iteration:
            with torch.no_grad():
                self.trainer.model.state_dict()[self._name].view(-1)[0] = math.nan


NORM = "backbone.bottom_up.stem.conv1.norm"


@pytest.mark.parametrize(
    ("name", "said"),
    [(f"{NORM}.running_var", "model's running statistics"), (f"{NORM}.weight", "weights themselves")],
    ids=["statistics", "weights"],
)
@pytest.mark.parametrize("distilled", [True, False])
def test_no_checkpoint_is_written_of_a_model_that_is_not_finite(distilled, name, said, training, tmp_path):
    """In training no norm uses its running statistics, so that the losses are finite."""
    cfg = training(iterations=2)
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    if not distilled:
        cfg = detector_config(cfg)
    trainer = Trainer(cfg)
    saver = next(index for index, hook in enumerate(trainer._hooks) if type(hook).__name__ == "PeriodicSaver")
    spoil = Spoil(name, 1)
    spoil.trainer = trainer
    trainer._hooks.insert(saver, spoil)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert str(error.value).startswith(f"After iteration 1 the {said} are not finite (")
    assert name in str(error.value) and "resume an earlier checkpoint" in str(error.value)
    assert (tmp_path / "output" / "model_0000000.pth").exists()
    assert not (tmp_path / "output" / "model_final.pth").exists()


def images(count):
    return [{**x, "file_name": f"image_{i}.png"} for i, x in enumerate(training_batch(((64, 96),) * count))]


def make_blame(model, cfg):
    return Blame(model, build_optimizer(cfg, model), lambda: torch.autocast("cpu", enabled=False), from_scratch=False)


def overflow(module, args, features):
    """Forward hook of a backbone."""
    features["p4"][:, 0] = math.inf


@pytest.mark.parametrize("kind", ["faster", "retinanet"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_teacher_that_overflows_on_every_image(count, kind, distiller_config):
    """Its weights are finite."""
    cfg = distiller_config(kind)
    model = build_model(cfg).train()
    model.teacher.backbone.register_forward_hook(overflow)
    asked = make_blame(model, cfg)
    asked.start(0)
    with EventStorage():
        text = asked.of_batch(images(count))
    assert "The teacher's features, or the gradients of its losses, are not finite, although its weights are" in text
    assert "BASE_LR" not in text and text.count(".png") == (count == 1)


def test_tensors_are_looked_at_before_images(distiller_config):
    """The teacher's first, then the weights, then the statistics that a norm in evaluation uses."""
    cfg = distiller_config("retinanet")
    model = build_model(cfg).train()
    norm = model.student.backbone.bottom_up.stem.conv1.norm
    asked = make_blame(model, cfg)
    asked.start(0)
    batch = images(2)
    with EventStorage():
        model(batch)
        batch[0]["image"][0, 3, 4] = math.nan
        norm.running_mean[0] = math.nan
        assert asked.of_batch(batch).endswith("these cause it by themselves: image_0.png")
        norm.eval()
        said = [asked.of_batch(batch)]
        norm.weight.data[1] = math.inf
        said.append(asked.of_batch(batch))
        model.teacher.pixel_std[0] = math.nan
        said.append(asked.of_batch(batch))
    assert said[0].startswith("the model's running statistics are not finite (student.backbone.bottom_up.stem.conv1.n")
    assert said[1].startswith(
        "the weights themselves are not finite (student.backbone.bottom_up.stem.conv1.norm.weight"
    )
    assert said[2].startswith("the teacher's weights are not finite (pixel_std)")
    assert not any(".png" in text for text in said)


def test_the_trials_leave_no_trace(distiller_config):
    cfg = distiller_config("retinanet", channels=8)
    model = build_model(cfg).train()
    measurement = watched(model)
    batch = images(2)
    batch[1]["image"][0, 3, 4] = math.nan
    asked = make_blame(model, cfg)
    asked.start(3)
    with EventStorage(5) as storage:
        model(images(1))
        # Another state than the first one, which the trials load.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
        before = copy.deepcopy(dict(model.state_dict()))
        scalars, average, stream = dict(storage.latest()), model.student.loss_normalizer, torch.get_rng_state()
        report = measurement.report
        text = asked.of_batch(batch)
        assert text.endswith("of the 2 images of the batch, these cause it by themselves: image_1.png")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert dict(storage.latest()) == scalars
    assert model.student.loss_normalizer == average
    assert torch.equal(torch.get_rng_state(), stream)
    assert model.listeners == [measurement] and measurement.report == report
