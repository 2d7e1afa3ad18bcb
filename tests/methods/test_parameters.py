"""Parameters of a method: they are built once, train with the student, and are no part of it."""

import copy
import pickle

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet, build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from levels import random_level
from tiny import ARCHITECTURES, train, training_batch, watched
from torch import nn
from torch.nn import functional as F

from gkd_d2 import METHOD_REGISTRY, LevelwiseMethod, Method, Term
from gkd_d2.config import detector_config
from gkd_d2.export import export_student
from gkd_d2.modeling.student import load_student
from gkd_d2.utils.checkpoint import StudentCheckpointer

RELATION = {
    "gkd": ("loss_bmfi_relation", ("GKD.LOSS_WEIGHTS.RELATION", 1e-5)),
    "fgd": ("loss_fgd_relation", ("GKD.METHOD", "fgd", "GKD.FGD.RELATION_WEIGHT", 1e-5)),
}
PARTS = (
    *("attention", "squeeze.weight", "squeeze.bias", "norm.weight", "norm.bias"),
    *("expand.weight", "expand.bias"),
)


def related(cfg, name="gkd"):
    """The config with the relation loss of a method."""
    cfg.merge_from_list(list(RELATION[name][1]))
    return cfg


def names_of_blocks(levels):
    return {
        f"method.relation.{level}.{network}.{part}"
        for level in levels
        for network in ("student", "teacher")
        for part in PARTS
    }


def step(model, batch):
    """Gradients of one training step, by name."""
    torch.manual_seed(1)
    model.student.loss_normalizer = 100
    model.zero_grad()
    with EventStorage():
        sum(model(batch).values()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("name", RELATION)
def test_blocks_train_with_the_student(name, kind, distiller_config):
    cfg = related(distiller_config(kind, channels=8), name)
    # In a level of one cell there is nothing to weigh.
    cfg.GKD.FEATURES = ["p3", "p4", "p5"]
    cfg.SOLVER.BASE_LR = 0.02
    # What moves is moved by gradients.
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    distiller = build_model(cfg)
    measurement = watched(distiller)
    before = {key: value.clone() for key, value in distiller.state_dict().items()}
    assert {key for key in before if key.startswith("method.")} == names_of_blocks(distiller.student_features)
    history = train(distiller, cfg, training_batch(), 20)
    for key, parameter in distiller.method.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), key
        # At a level of few cells steps may be smaller than float32 resolves beside a value that did not start at 0.
        fine = key.startswith(f"relation.{distiller.student_features[0]}.")
        assert not (fine or "expand" in key) or not torch.equal(parameter, before[f"method.{key}"]), key
    key, _ = RELATION[name]
    first, last = (sum(losses[key] for losses in part) for part in (history[:3], history[-3:]))
    assert 0 < last < 0.8 * first
    # The watch has measured it at every level, and the sum over them is the loss.
    values = [measurement.report.values["relation", level] for level in distiller.student_features]
    assert sum(values) == pytest.approx(history[-1][key], rel=1e-5)
    assert all(measurement.report.norms["relation", level] > 0 for level in distiller.student_features)


def test_they_change_no_other_draw(distiller_config):
    """Student and align convolutions start the same with and without them, and the next draw is the same."""
    cfg = distiller_config("faster", channels=8)
    results = []
    for weight in (0.0, 1e-5):
        cfg.GKD.LOSS_WEIGHTS.RELATION = weight
        torch.manual_seed(5)
        results.append((build_model(cfg).state_dict(), torch.rand(4)))
    (without, draw), (with_blocks, other_draw) = results
    assert with_blocks.keys() - without.keys() == names_of_blocks(("p2", "p3", "p4", "p5"))
    assert all(torch.equal(value, with_blocks[name]) for name, value in without.items())
    assert torch.equal(draw, other_draw)
    # They depend on the seed alone.
    again = build_model(cfg).state_dict()
    assert all(torch.equal(again[name], value) for name, value in with_blocks.items() if name.startswith("method."))


def test_where_no_loss_trains_them_nothing_is_built(distiller_config):
    cfg = distiller_config("retinanet", channels=8)
    cfg.merge_from_list(["GKD.METHOD", "fgd"])
    for key in ("FOREGROUND", "BACKGROUND", "ATTENTION", "RELATION"):
        cfg.GKD.FGD[f"{key}_WEIGHT"] = 0.0
    assert build_model(cfg).state_dict().keys() == build_model(detector_config(cfg)).state_dict().keys()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_trains_with_parameters_of_its_own(copied, distiller_config):
    distiller = build_model(related(distiller_config("retinanet", channels=8))).train()
    other = copied(distiller)
    assert not {id(p) for p in distiller.parameters()} & {id(p) for p in other.parameters()}
    batch = training_batch()
    ours, theirs = step(distiller, batch), step(other, batch)
    assert ours.keys() == theirs.keys() and any(name.startswith("method.") for name in ours)
    assert all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_checkpoints_go_both_ways_and_exports_have_none(kind, distiller_config, tmp_path, caplog):
    cfg = related(distiller_config(kind, channels=8), "fgd")
    distiller = build_model(cfg)
    train(distiller, cfg, training_batch(), 2)
    state = distiller.state_dict()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(cfg.dump())
    StudentCheckpointer(distiller, str(tmp_path / "run")).save("model_final")
    path = tmp_path / "run" / "model_final.pth"
    beside = {name for name in state if name.startswith(("align.", "method."))}
    assert names_of_blocks(distiller.student_features) < beside

    # The plain student takes its own tensors out of the distiller's checkpoint.
    student = load_student(cfg, path).state_dict()
    assert student.keys() == state.keys() - beside
    assert all(torch.equal(value, state[name]) for name, value in student.items())
    exported = export_student(cfg, path, tmp_path / "out")["checkpoint"]
    assert torch.load(exported)["model"].keys() == student.keys()

    # The distiller takes all of the student from the export, and warns of nothing but what no plain detector has.
    caplog.clear()
    other = build_model(cfg)
    checkpointer = StudentCheckpointer(other)
    checkpointer.load_weights(str(exported))
    assert set(checkpointer.unset) == beside
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    lines = [line.strip() for text in told for line in text.splitlines()[1:]]
    assert lines and all("align.p" in line or "method.relation.p" in line for line in lines)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in student.items())

    # And all of itself from its own.
    checkpointer.load_weights(str(path))
    assert checkpointer.unset == ()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())


class Regressed(Method):
    """A convolution of the student's feature against the teacher's; for a loss of weight 0 there is none."""

    def __init__(self, weight):
        super().__init__({"loss_regressed": Term("regressed", weight, "GKD.METHOD_OPTIONS.WEIGHT")})
        self.asked = []

    def build_parameters(self, channels):
        self.asked.append(dict(channels))
        self.convs = nn.ModuleDict({name: nn.Conv2d(count, count, 1) for name, count in channels.items()})

    def __call__(self, levels, factor=1.0):
        losses = [F.mse_loss(self.convs[level.name](level.student), level.teacher) for level in levels]
        return {"loss_regressed": factor * self.terms["loss_regressed"].weight * sum(losses)}


@pytest.fixture
def regressed(monkeypatch, distiller_config):
    """The config of a distiller by a method of the user's own."""
    monkeypatch.setattr(METHOD_REGISTRY, "_obj_map", dict(METHOD_REGISTRY._obj_map))

    @METHOD_REGISTRY.register()
    def regressed(cfg):
        return Regressed(cfg.GKD.METHOD_OPTIONS.WEIGHT)

    def make(weight=1.0, **options):
        cfg = distiller_config("retinanet", channels=8, **options)
        cfg.GKD.METHOD = "regressed"
        cfg.GKD.METHOD_OPTIONS.WEIGHT = weight
        return cfg

    return make


def test_it_is_asked_once_for_the_teachers_channels(regressed):
    cfg = regressed(teacher_channels=24)
    distiller = build_model(cfg)
    assert distiller.method.asked == [{f"p{level}": 24 for level in range(3, 8)}]
    assert build_model(regressed(weight=0.0)).method.asked == []
    held = {id(p) for group in build_optimizer(cfg, distiller).param_groups for p in group["params"]}
    assert held == {id(p) for p in distiller.parameters()} > {id(p) for p in distiller.method.parameters()} != set()
    before = {name: value.clone() for name, value in distiller.method.state_dict().items()}
    history = train(distiller, cfg, training_batch(), 5)
    assert 0 < history[-1]["loss_regressed"] < history[0]["loss_regressed"]
    assert len(before) == 10
    assert not any(torch.equal(value, before[name]) for name, value in distiller.method.state_dict().items())
    assert {parameter.dtype for parameter in distiller.double().method.parameters()} == {torch.float64}


@META_ARCH_REGISTRY.register()
class RetinaNetWithMethod(RetinaNet):
    """Holds a tensor under a name that a distiller's checkpoint uses for another purpose."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.method = nn.Linear(1, 1)


def test_a_student_that_takes_the_name_is_refused(distiller_config):
    cfg = distiller_config("retinanet")
    cfg.GKD.STUDENT.META_ARCHITECTURE = "RetinaNetWithMethod"
    with pytest.raises(ValueError, match="the student RetinaNetWithMethod holds method.weight, but in a distiller's"):
        build_model(cfg)


class Sums(LevelwiseMethod):
    """Returns the losses that it is told to, of which one has the weight 0."""

    def __init__(self, keys):
        super().__init__({f"loss_{n}": Term(n, w, "GKD.X") for n, w in (("on", 1.0), ("off", 0.0))})
        self.keys = keys

    def level_losses(self, level):
        return {key: level.student.sum() for key in self.keys}


@pytest.mark.parametrize(
    ("keys", "accepted"),
    [
        (("loss_on", "loss_off"), True),
        (("loss_on",), True),
        (("loss_off",), False),
        (("loss_on", "loss_other"), False),
    ],
)
def test_a_loss_of_weight_0_may_be_left_out(keys, accepted):
    method = Sums(keys)
    if accepted:
        assert list(method([random_level()])) == ["loss_on"]
    else:
        with pytest.raises(ValueError, match=f"returned {', '.join(keys)}, but its terms are loss_on, loss_off"):
            method([random_level()])
