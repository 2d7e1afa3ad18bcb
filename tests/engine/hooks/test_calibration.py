"""Weights calibrated to ratios of gradients, in short real trainings on toy scenes."""

import copy
import itertools
import logging
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, default_argument_parser
from detectron2.engine.hooks import CallbackHook
from detectron2.utils.events import EventStorage, get_event_storage
from distributed_steps import calibrated_run, comparable
from short_runs import checkpoints, killed, train
from tiny import ARCHITECTURES
from torch import multiprocessing, nn

from gkd_d2.engine.hooks import Calibration, CalibrationError, DeadLossError, add_distillation_hooks
from gkd_d2.engine.launch import launch
from gkd_d2.engine.resume import ResumeError
from gkd_d2.engine.trainer import Trainer
from gkd_d2.methods import METHOD_REGISTRY, LevelwiseMethod, Method, Term
from gkd_d2.utils.random_streams import mix_seed, seed_everything


@pytest.fixture
def calibrating(training):
    """A function that makes the config of a short training whose weights are calibrated."""

    def make(kind="retinanet", *, iterations, start=0, iters=3, **options):
        cfg = training(kind, iterations=iterations, **options)
        cfg.SOLVER.WARMUP_ITERS = start
        cfg.SOLVER.BASE_LR = 0.01
        cfg.GKD.BALANCE, cfg.GKD.BALANCE_ITERS = "calibrate", iters
        return cfg

    return make


@pytest.fixture
def registered(monkeypatch):
    """A function that gives a config a method of the user's own; other tests list the methods."""

    def choose(cfg, build):
        monkeypatch.setattr(METHOD_REGISTRY, "_obj_map", METHOD_REGISTRY._obj_map | {"own": build})
        cfg.GKD.METHOD = "own"

    return choose


@pytest.fixture
def _logger(caplog):
    """DefaultTrainer sets Detectron2's logger up where it is silent, and so for all later tests."""
    caplog.set_level("INFO", logger="detectron2")


class Sums(LevelwiseMethod):
    """Sums of the student's features, whose gradients are known: ``scale`` in each cell, or twice that in half of them.

    Args:
        scale: of the losses in an iteration.
    """

    def __init__(self, scale=lambda iteration: -0.5):
        terms = {f"loss_{name}": Term(name, 7.0, "GKD.METHOD_OPTIONS.WEIGHT") for name in ("all", "half")}
        super().__init__(terms)
        self.scale = scale

    def level_losses(self, level):
        scale, half = self.scale(get_event_storage().iter), level.student.shape[1] // 2
        return {"loss_all": scale * level.student.sum(), "loss_half": 2 * scale * level.student[:, :half].sum()}


def history(trainer, name):
    """Iteration -> value of a scalar."""
    return {iteration: value for value, iteration in trainer.storage.history(name).values()}


def calibration_of(trainer) -> Calibration:
    return next(hook for hook in trainer._hooks if isinstance(hook, Calibration))


def resume(cfg, checkpoint=None):
    """A trainer with the state of a checkpoint, by default of the last one."""
    if checkpoint is not None:
        (Path(cfg.OUTPUT_DIR) / "last_checkpoint").write_text(checkpoint)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    return trainer


def weights_in(cfg) -> dict:
    """What calibrated_weights.yaml gives each loss of gkd."""
    written = yaml.safe_load((Path(cfg.OUTPUT_DIR) / "calibrated_weights.yaml").read_text())
    assert written["GKD"].pop("BALANCE") == "fixed"
    return {name.lower(): weight for name, weight in written["GKD"]["LOSS_WEIGHTS"].items()}


def final(cfg) -> dict:
    """The model, the calibration and its file, at the end of a run."""
    state = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)
    return state["model"], state["trainer"]["hooks"]["Calibration"], weights_in(cfg)


def assert_equal(ours, theirs):
    (model, calibration, weights), (other, *rest) = ours, theirs
    assert model.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in model.items())
    assert [calibration, weights] == rest


# --- what the weights are


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_factors_follow_from_gradients_known_in_closed_form(kind, calibrating, registered):
    """The detection loss's gradients come from a copy of the student, run by itself on each batch."""
    cfg = calibrating(kind, iterations=7, start=2, iters=3)
    cfg.GKD.WARMUP_ITERS = 5
    cfg.GKD.RATIOS.HALF = 0.1
    registered(cfg, lambda cfg: Sums())
    trainer = Trainer(cfg)
    detections, sums, cells = [], [], []

    def look(model, args):
        student, features = copy.deepcopy(model.student), {}
        student.backbone.register_forward_hook(lambda module, args, output: features.update(output))
        with torch.random.fork_rng(), EventStorage():
            loss = sum(student(*args).values())
        levels = [features[name] for name in ("p3", "p4")]
        gradients = torch.autograd.grad(loss, levels)
        detections.append(math.sqrt(sum(gradient.square().sum().item() for gradient in gradients)))
        sums.append(sum(level.sum().item() for level in levels))
        cells.append(sum(level.numel() for level in levels))

    trainer.model.register_forward_pre_hook(look)
    trainer.train()
    wanted = {"all": 0.3, "half": 0.1}
    norms = {"all": 0.5 * math.sqrt(cells[0]), "half": math.sqrt(cells[0] / 2)}
    assert len(set(cells)) == 1 and len(set(detections)) == 7
    for name, ratio in wanted.items():
        samples = np.log(detections[2:5]) - math.log(norms[name])
        factors = [n / 3 * ratio * math.exp(np.median(samples[:n])) for n in (1, 2, 3)]
        found = history(trainer, f"gkd_weight/{name}")
        assert list(found) == [2, 3, 4]
        assert list(found.values()) == pytest.approx(factors, rel=1e-4)
        assert trainer.model.factors[name] == found[4]
    # The loss of an iteration is what it is at weight 1, times the factor of the iterations before and the warm-up.
    factors = [0.0, 0.0, 0.0, *history(trainer, "gkd_weight/all").values(), trainer.model.factors["all"]]
    losses = history(trainer, "loss_all")
    for iteration in range(7):
        warmup = min(1.0, (iteration + 1) / 5)
        expected = warmup * factors[iteration] * -0.5 * sums[iteration]
        assert losses[iteration] == pytest.approx(expected, rel=1e-3, abs=1e-12), iteration


class Pair(Method):
    """Two losses by a forward of its own, of which one has parameters that train."""

    def __init__(self):
        super().__init__({f"loss_{n}": Term(n, 1.0, f"GKD.METHOD_OPTIONS.{n.upper()}") for n in ("near", "mapped")})

    def build_parameters(self, channels):
        self.maps = nn.ModuleDict({name: nn.Conv2d(count, count, 1) for name, count in channels.items()})

    def forward(self, levels, factor=1.0):
        near = sum((level.student - level.teacher).abs().sum() for level in levels)
        mapped = sum((self.maps[level.name](level.student) - level.teacher).square().mean() for level in levels)
        weight = factor * self.terms["loss_near"].weight
        return {"loss_near": weight * near, "loss_mapped": factor * self.terms["loss_mapped"].weight * mapped}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("method", ["gkd", "fitnet", "fgfi", "fgd", "pkd", "own", "gkd + fgd + fitnet"])
def test_every_method_reaches_its_ratios(method, kind, calibrating, registered):
    """Through the training's own graph: its losses on the batches that were measured, with the weights that were found.

    Without a learning rate the student stays as it was; what moves beside its weights is set as it was.
    """
    cfg = calibrating(kind, iterations=4, channels=8)
    cfg.SOLVER.BASE_LR = 0.0
    cfg.GKD.METHODS = method.split(" + ")
    if method == "gkd":
        cfg.GKD.RATIOS.RELATION = cfg.GKD.RATIOS.ATTENTION = 0.2
    if method == "own":
        registered(cfg, lambda cfg: Pair())
    if method == "gkd + fgd + fitnet":
        cfg.GKD.RATIOS.GKD_ATTENTION, cfg.GKD.RATIOS.FGD_RELATION = 0.2, 0.4
    trainer = Trainer(cfg)
    model, seen = trainer.model, []

    def record(model, args):
        seen.append((args[0], getattr(model.student, "loss_normalizer", None)))

    handle = model.register_forward_pre_hook(record)
    trainer.train()
    handle.remove()
    state, weights = calibration_of(trainer).state_dict(), model.factors
    features = {}
    model.student.backbone.register_forward_hook(lambda module, args, output: features.update(output))
    ratios = {name: [] for name in weights}
    for iteration, (batch, normalizer) in enumerate(seen[:3]):
        if normalizer is not None:
            model.student.loss_normalizer = normalizer
        seed_everything(mix_seed(cfg.SEED, iteration, 0))
        with EventStorage(iteration):
            losses = model(batch)
        levels = [features[name] for name in ("p3", "p4")]

        def norm(loss, levels=levels):
            gradients = torch.autograd.grad(loss, levels, retain_graph=True)
            return math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))

        own = norm(sum(loss for key, loss in losses.items() if key not in model.method.terms))
        for key, name in model.method.active().items():
            ratios[name].append(norm(losses[key]) / own)
    assert ratios.keys() == state["samples"].keys()
    for term in model.method.terms.values():
        if term.name in ratios:
            expected = [weights[term.name] * math.exp(-sample) for sample in state["samples"][term.name]]
            assert ratios[term.name] == pytest.approx(expected, rel=1e-3)
            assert np.median(ratios[term.name]) == pytest.approx(term.ratio, rel=1e-3) and term.ratio > 0


def test_the_parameters_of_a_calibrated_method_train(calibrating, registered):
    cfg = calibrating(iterations=5)
    registered(cfg, lambda cfg: Pair())
    trainer = Trainer(cfg)
    before = copy.deepcopy(trainer.model.method.state_dict())
    trainer.train()
    assert not any(torch.equal(value, before[name]) for name, value in trainer.model.method.state_dict().items())


def test_two_processes_equal_one(calibrating, tmp_path):
    """That computes the same batches in two parts; all anchors and proposals are taken, so that nothing is drawn."""
    cfg = calibrating("faster", iterations=6, start=1, change=comparable)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR = 2, 1e-4
    launch(calibrated_run, default_argument_parser().parse_args(["--num-gpus", "2"]), (cfg,), device="cpu")
    model, calibration, weights = final(cfg)
    assert all(len(samples) == 3 for samples in calibration["samples"].values())
    cfg.SOLVER.ACCUMULATE_STEPS, cfg.OUTPUT_DIR = 2, str(tmp_path / "one")
    (tmp_path / "one").mkdir()
    calibrated_run(cfg)
    alone, other, other_weights = final(cfg)
    for name, samples in calibration["samples"].items():
        assert samples == pytest.approx(other["samples"][name], abs=1e-4), name
    assert weights == pytest.approx(other_weights, rel=1e-3)
    for name, value in model.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-5, msg=name)


def test_batches_without_objects_do_not_count(calibrating):
    """There the detection losses of this RetinaNet have next to no gradient, and so would the weights."""
    cfg = calibrating(iterations=5, iters=5)
    trainer = Trainer(cfg)

    def strip(model, args):
        if get_event_storage().iter >= 2:
            for image in args[0]:
                image["instances"] = image["instances"][:0]

    trainer.model.register_forward_pre_hook(strip)
    trainer.train()
    state = calibration_of(trainer).state_dict()
    assert state["taken"] == 5 and state["frozen"]
    assert {name: len(samples) for name, samples in state["samples"].items()} == dict.fromkeys(state["samples"], 2)


# --- how it goes on


def test_a_killed_run_and_resumed_ones_end_bit_for_bit_as_a_whole_one(calibrating, tmp_path):
    """Killed in the middle; resumed after the weights are frozen, and between two measurements of a cap that holds."""
    cfg = calibrating(iterations=12, start=1, channels=8)
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.GKD.WATCH_PERIOD, cfg.GKD.BALANCE_MAX = 3, 4, 0.2
    torch.manual_seed(0)
    trainer = train(cfg)
    factors = [history(trainer, "gkd_weight/box")[iteration] for iteration in (3, 7, 11)]
    assert factors[1] < factors[0] and factors[1] != factors[2]
    expected = final(cfg)
    for checkpoint in ("model_0000005.pth", "model_0000008.pth"):
        again = resume(cfg, checkpoint)
        assert again.start_iter == int(checkpoint[6:13]) + 1
        again.train()
        assert_equal(final(cfg), expected)

    cfg.OUTPUT_DIR = str(tmp_path / "killed")
    (tmp_path / "killed").mkdir()
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(cfg, 4))
    process.start()
    process.join()
    assert process.exitcode == -9
    assert checkpoints(cfg.OUTPUT_DIR) == {"model_0000002.pth"}
    again = resume(cfg)
    assert again.start_iter == 3 and calibration_of(again).state_dict()["taken"] == 2
    again.train()
    assert_equal(final(cfg), expected)


def test_a_resumed_run_applies_another_ratio_to_the_same_samples(calibrating, caplog):
    cfg = calibrating(iterations=6)
    cfg.SOLVER.CHECKPOINT_PERIOD = 4
    before, samples = train(cfg).model.factors, final(cfg)[1]["samples"]
    weights = weights_in(cfg)
    assert weights["attention"] == 0
    cfg.GKD.RATIOS.BOX, cfg.GKD.RATIOS.IMAGE = 2.0, 0.0
    caplog.set_level(logging.INFO, logger="gkd_d2.engine.hooks")
    again = resume(cfg, "model_0000003.pth")
    again.train()
    assert again.model.factors == {"gradient": before["gradient"], "box": pytest.approx(2 * before["box"])}
    state = calibration_of(again).state_dict()
    assert state["samples"] == {name: samples[name] for name in ("gradient", "box")} and state["taken"] == 3
    assert weights_in(cfg) == pytest.approx({**weights, "box": 2 * weights["box"], "image": 0.0}, rel=1e-3)
    assert "The calibration of the checkpoint is kept: gradient " in caplog.text


def test_a_resumed_run_changes_the_way_of_its_weights(calibrating, caplog):
    """From fixed ones to calibrated ones, and back."""
    cfg = calibrating(iterations=6)
    cfg.GKD.BALANCE, cfg.SOLVER.CHECKPOINT_PERIOD = "fixed", 2
    train(cfg)
    cfg.GKD.BALANCE = "calibrate"
    caplog.set_level(logging.INFO, logger="gkd_d2.engine.hooks")
    again = resume(cfg, "model_0000001.pth")
    assert "GKD.BALANCE was fixed and is calibrate" in caplog.text
    again.train()
    assert "are calibrated in iterations 2 to 4, over which they ramp up" in caplog.text
    assert list(history(again, "gkd_weight/box")) == [2, 3, 4]

    cfg.GKD.BALANCE = "fixed"
    caplog.clear()
    back = resume(cfg, "model_0000003.pth")
    assert "GKD.BALANCE was calibrate and is fixed" in caplog.text
    assert re.search(r"that were calibrated in .*model_0000003.pth are dropped: GKD.BALANCE is not calib", caplog.text)
    assert "Cannot find the hook" not in caplog.text
    back.train()
    assert back.start_iter == 4 and back.iter == 6
    assert history(back, "loss_bmfi_box")[4] > 0


def test_a_resume_with_another_loss_of_the_same_name_is_refused(calibrating):
    cfg = calibrating(iterations=4)
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    for name in ("GRADIENT", "BOX", "IMAGE"):
        cfg.GKD.RATIOS[name] = 0.0
    cfg.GKD.RATIOS.ATTENTION = 0.1
    train(cfg)
    cfg.GKD.METHOD = "fgd"
    cfg.GKD.RATIOS = CfgNode({"FOREGROUND": 0.0, "BACKGROUND": 0.0, "RELATION": 0.0}, new_allowed=True)
    message = "its attention loss is that of GKD.LOSS_WEIGHTS.ATTENTION, .* that of GKD.FGD.ATTENTION_WEIGHT"
    with pytest.raises(ResumeError, match=message):
        resume(cfg, "model_final.pth")


def test_a_resume_without_a_sample_of_a_loss_is_refused(calibrating, run_here, tmp_path):
    cfg = calibrating(iterations=4)
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.GKD.RATIOS.BOX = 2, 0.0
    train(cfg)
    cfg.GKD.RATIOS.BOX = 0.3
    for checkpoint in ("model_0000001.pth", "model_final.pth"):
        with pytest.raises(ResumeError, match="were calibrated without the box loss: set GKD.RATIOS.BOX to 0, or star"):
            resume(cfg, checkpoint)
    (tmp_path / "run.yaml").write_text(cfg.dump())
    status, printed = run_here("train_net.py", "--config-file", tmp_path / "run.yaml", "--resume")
    assert status == 1 and "Traceback" not in printed
    assert "The checkpoint can't be resumed: the weights of the losses were calibrated without the box" in printed


def test_a_run_that_ends_too_soon_says_so(calibrating, caplog):
    cfg = calibrating(iterations=3, start=1, iters=3)
    caplog.set_level(logging.INFO, logger="gkd_d2.engine.hooks")
    train(cfg)
    assert "calibrated in iterations 1 to 3, over which they ramp up; until then nothing is imitated" in caplog.text
    assert "The run ends at iteration 2, before the weights are calibrated" in caplog.text
    assert not (Path(cfg.OUTPUT_DIR) / "calibrated_weights.yaml").exists()
    # By what is lacking, with fewer iterations, the next one settles it.
    cfg.SOLVER.MAX_ITER, cfg.GKD.BALANCE_ITERS = 4, 1
    caplog.clear()
    again = resume(cfg)
    again.train()
    assert "calibrated in iterations 3 to 3, after 2 iterations before, over which" in caplog.text
    assert "before the weights" not in caplog.text
    assert calibration_of(again).state_dict()["taken"] == 3 and weights_in(cfg)["box"] > 0


# --- float16


def overflow(trainer, parameter, iteration):
    """Let a step's gradient overflow in an iteration."""
    parameter.register_hook(lambda gradient: gradient * (math.inf if trainer.iter == iteration else 1))


@pytest.mark.parametrize("method", ["gkd", "fgd", 1e-9, 1e6])
def test_float16_samples_are_those_of_float32(method, calibrating, registered):
    """The scale is no part of them, and at weight 1 neither do small gradients vanish nor large ones overflow."""
    cfg = calibrating("faster", iterations=1, iters=1, channels=8)
    if isinstance(method, float):
        registered(cfg, lambda cfg: Sums(lambda iteration: method))
    else:
        cfg.GKD.METHOD, cfg.GKD.RATIOS.RELATION = method, 0.3
    samples = []
    for scale in (None, 2.0**8, 2.0**12):
        if scale:
            cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, "float16"
        torch.manual_seed(3)
        trainer = Trainer(cfg)
        if scale:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale).state_dict()
            trainer._trainer.load_state_dict({**trainer._trainer.state_dict(), "grad_scaler": scaler})
        trainer.train()
        assert not scale or trainer._trainer._scaler.get_scale() == scale
        samples.append({name: found for name, (found,) in calibration_of(trainer).state_dict()["samples"].items()})
    assert samples[1] == pytest.approx(samples[2], abs=1e-3)
    # The map loss is that of a gradient, whose small values float16 rounds.
    assert samples[2] == pytest.approx(samples[0], abs=0.3)


def test_a_step_that_is_left_out_does_not_count(calibrating):
    cfg = calibrating(iterations=5)
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, "float16"
    trainer = Trainer(cfg)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8).state_dict()
    trainer._trainer.load_state_dict({**trainer._trainer.state_dict(), "grad_scaler": scaler})
    overflow(trainer, trainer.model.student.head.cls_score.bias, 1)
    trainer.train()
    assert trainer._trainer._scaler.get_scale() == 2.0**7
    weights = history(trainer, "gkd_weight/box")
    assert list(weights) == [0, 1, 2, 3] and weights[0] == weights[1] < weights[2]
    state = calibration_of(trainer).state_dict()
    assert state["taken"] == 3 and all(len(samples) == 3 for samples in state["samples"].values())


class AMPTrainerOnCPU(AMPTrainer):
    """Detectron2's, whose step asks for a GPU."""

    def run_step(self):
        with torch.autocast("cpu", torch.float16):
            losses = self.model(next(self._data_loader_iter))
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


@pytest.mark.usefixtures("_logger")
def test_a_step_that_detectron2_leaves_out_does_not_count(calibrating):
    cfg = calibrating(iterations=5)
    trainer = DefaultTrainer(cfg)
    # It grows, too.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    trainer._trainer = AMPTrainerOnCPU(trainer.model, trainer.data_loader, trainer.optimizer, grad_scaler=scaler)
    add_distillation_hooks(trainer)
    overflow(trainer, trainer.model.student.head.cls_score.bias, 2)
    trainer.train()
    assert scaler.get_scale() == 2.0**9
    weights = history(trainer, "gkd_weight/box")
    assert list(weights) == [0, 1, 2, 3] and weights[1] == weights[2]
    state = calibration_of(trainer).state_dict()
    assert state["taken"] == 3 and all(len(samples) == 3 for samples in state["samples"].values())


# --- Detectron2's own trainer


@pytest.mark.usefixtures("_logger")
def test_a_plain_trainer_calibrates_and_resumes(calibrating):
    cfg = calibrating(iterations=5)
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    trainer = DefaultTrainer(cfg)
    add_distillation_hooks(trainer)
    trainer.train()
    state = calibration_of(trainer).state_dict()
    assert state["frozen"] and weights_in(cfg)["box"] == pytest.approx(trainer.model.factors["box"], rel=1e-3)

    (Path(cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000001.pth")
    again = DefaultTrainer(cfg)
    add_distillation_hooks(again)
    again.resume_or_load(resume=True)
    resumed = calibration_of(again).state_dict()
    assert resumed["taken"] == 2 and not resumed["frozen"]
    assert resumed["samples"] == {name: samples[:2] for name, samples in state["samples"].items()}
    again.train()
    assert calibration_of(again).state_dict()["taken"] == 3 and again.model.factors["box"] > 0

    late = DefaultTrainer(cfg)
    late.resume_or_load(resume=True)
    with pytest.raises(ValueError, match="call add_distillation_hooks before resume_or_load"):
        add_distillation_hooks(late)


@pytest.mark.usefixtures("_logger")
def test_nothing_trains_without_a_calibration(calibrating):
    cfg = calibrating(iterations=1)
    with pytest.raises(RuntimeError, match="GKD.BALANCE is calibrate, but nothing calibrates the weights of the loss"):
        DefaultTrainer(cfg).train()
    # Nor where another hook has taken the measurement away.
    trainer = Trainer(cfg)
    trainer.register_hooks([CallbackHook(before_train=lambda trainer: setattr(trainer.model, "listeners", []))])
    with pytest.raises(CalibrationError, match="iteration 0 was not measured, as GKD.BALANCE calibrate requires"):
        trainer.train()


# --- the cap, and the watch


def test_the_cap_holds_the_ratios_and_lets_go(calibrating, registered, caplog):
    """Losses that are a thousand times as large in the iterations 4 to 8 as when they were calibrated."""
    cfg = calibrating(iterations=12, iters=2)
    # Else such losses would end the student.
    cfg.SOLVER.BASE_LR = 0.0
    cfg.GKD.WATCH_PERIOD, cfg.GKD.BALANCE_MAX, cfg.GKD.WATCH_MAX_RATIO = 2, 2.0, 1e6
    registered(cfg, lambda cfg: Sums(lambda iteration: 500.0 if 4 <= iteration <= 8 else 0.5))
    trainer = train(cfg)
    factors = {name: history(trainer, f"gkd_weight/{name}") for name in ("all", "half")}
    ratios = {i: sum(history(trainer, f"gkd_ratio/{name}")[i] for name in factors) for i in (3, 5, 7, 9, 11)}
    weights = {name: found[1] for name, found in factors.items()}
    assert ratios[3] < 2 and ratios[5] > 100
    for name, found in factors.items():
        assert list(found) == [0, 1, 3, 5, 7, 9, 11]
        assert [found[i] for i in (3, 9, 11)] == [weights[name]] * 3
        # By the ratios of an iteration, which the factors before it were part of, the cap would have held in it.
        for before, after in itertools.pairwise((3, 5, 7)):
            assert ratios[after] * found[after] / found[before] == pytest.approx(2.0, rel=1e-4)
    # One iteration's ratios are the next one's to some tens of per cent.
    assert ratios[7] < 2 * 2.0 and ratios[9] < 0.1
    told = [message for message in caplog.messages if "GKD.BALANCE_MAX" in message]
    assert len(told) == 1
    assert re.match(
        rf"At iteration 5 the losses' gradients at the student's features have {ratios[5]:.3g} times the norm of "
        r"those of the detection losses, more than GKD.BALANCE_MAX 2\. ",
        told[0],
    )


def test_ratios_that_the_cap_will_not_allow_are_named(calibrating, caplog):
    cfg = calibrating(iterations=1)
    cfg.GKD.BALANCE_MAX, cfg.GKD.RATIOS.BOX = 5.0, 6.0
    train(cfg)
    told = (
        "GKD.RATIOS add up to 6.6, more than GKD.BALANCE_MAX 5, which will hold the losses below their ratios: raise it"
    )
    assert told in caplog.text
    cfg.GKD.RATIOS.BOX = 0.3
    caplog.clear()
    train(cfg)
    assert "add up to" not in caplog.text


class Patchy(LevelwiseMethod):
    """Imitation of all cells alike, without a gradient in some iterations."""

    def __init__(self, dead):
        super().__init__({"loss_patchy": Term("patchy", 1e-3, "GKD.METHOD_OPTIONS.WEIGHT")})
        self.dead = dead

    def level_losses(self, level):
        alive = get_event_storage().iter not in self.dead
        return {"loss_patchy": alive * (level.student - level.teacher).square().mean()}


def test_a_loss_that_waits_for_its_calibration_is_not_dead(calibrating, registered):
    cfg = calibrating(iterations=8, start=4)
    cfg.GKD.WATCH_PERIOD, cfg.GKD.WATCH_PATIENCE = 1, 2
    registered(cfg, lambda cfg: Patchy(()))
    ratios = history(train(cfg), "gkd_ratio/patchy")
    assert [ratios[i] for i in range(5)] == [0.0] * 5 and all(ratios[i] > 0 for i in (5, 6, 7))


def test_a_dead_loss_is_found_while_its_factor_is_0(calibrating, registered, tmp_path):
    cfg = calibrating(iterations=8, start=4)
    cfg.GKD.WATCH_PERIOD, cfg.GKD.WATCH_PATIENCE = 1, 2
    registered(cfg, lambda cfg: Patchy(range(8)))
    with pytest.raises(DeadLossError) as error:
        train(cfg)
    text = str(error.value)
    assert text.startswith("the gradient of the patchy loss (GKD.RATIOS.PATCHY) at the student's p3 was exactly 0 in")
    assert "without p3, or set GKD.RATIOS.PATCHY to 0. " in text and "up to iteration 1" in text
    assert "METHOD_OPTIONS" not in text


def test_a_loss_that_swamps_detection_is_warned_of_by_its_ratio(calibrating, registered, caplog):
    cfg = calibrating(iterations=5, iters=2)
    cfg.GKD.WATCH_PERIOD, cfg.GKD.WATCH_MAX_RATIO, cfg.GKD.BALANCE_MAX = 1, 1e-2, 1e6
    registered(cfg, lambda cfg: Patchy(()))
    train(cfg)
    (told,) = [message for message in caplog.messages if "swamps the detection" in message]
    # In the first iteration that it has a weight in.
    assert told.startswith("The patchy loss swamps the detection losses: at iteration 1 ")
    assert told.endswith(". Lower GKD.RATIOS.PATCHY, which is 0.3: a run that is resumed takes the new ratio")


def test_a_loss_that_can_not_be_calibrated_ends_the_run(calibrating, registered, run_here, tmp_path):
    cfg = calibrating(iterations=8, start=1)
    registered(cfg, lambda cfg: Patchy(range(8)))
    (tmp_path / "run.yaml").write_text(cfg.dump())
    status, printed = run_here("train_net.py", "--config-file", tmp_path / "run.yaml")
    assert status == 1
    assert printed.endswith(
        "the weight of the patchy loss can't be calibrated: in all 3 iterations up to 3 there was no object, or its "
        "gradient at the student's features, or that of the detection losses, was 0 or not finite. Look at the data, "
        "set GKD.RATIOS.PATCHY to 0, or raise GKD.BALANCE_ITERS where objects are rare. The state is saved as "
        "model_stopped.pth; --resume continues from the checkpoint before it"
    )
    assert checkpoints(tmp_path / "output") == {"model_stopped.pth"}
    assert not (tmp_path / "output" / "calibrated_weights.yaml").exists()
    with pytest.raises(CalibrationError, match="the weight of the patchy loss can't be calibrated"):
        train(cfg)
