"""Several methods in one run: each does what it would alone."""

import copy
import dataclasses
import pickle

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from levels import random_level
from tiny import ARCHITECTURES, train, training_batch, watched
from torch import nn

from gkd_d2 import METHOD_REGISTRY, LevelwiseMethod, Method, Term, add_gkd_config
from gkd_d2.config import method_names, method_title
from gkd_d2.losses import LossOptions
from gkd_d2.methods import (
    FGD,
    FGFI,
    GKD,
    PKD,
    CrossKD,
    FitNet,
    Logits,
    Nothing,
    Several,
    build_method,
    keys_without_effect,
    settle_weights,
    weights_as_yaml,
)
from gkd_d2.modeling.summary import Summary


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_gkd_config(cfg)
    return cfg


def named(method):
    """Key of a loss -> its name."""
    return {key: term.name for key, term in method.terms.items()}


class Own(LevelwiseMethod):
    """A method of the user's own, with the names and the weight that it is given."""

    needs_anchors = True

    def __init__(self, *names, weight=2.0, prefix="loss_own_"):
        super().__init__({f"{prefix}{n}": Term(n, weight, f"GKD.METHOD_OPTIONS.{n.upper()}") for n in names})
        self.given = []

    def level_losses(self, level):
        self.given.append(level)
        return {key: level.student.sum() for key in self.terms}


# --- in the distiller


def first_step(cfg):
    """The losses of one training step, the gradients it gives, and the method's state before it."""
    torch.manual_seed(5)
    distiller = build_model(cfg).train()
    state = copy.deepcopy(distiller.method.state_dict())
    torch.manual_seed(6)
    with EventStorage():
        losses = distiller(training_batch(((90, 120), (96, 100), (64, 64))))
        sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in distiller.method.named_parameters()}
    return {key: loss.detach() for key, loss in losses.items()}, gradients, state


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize(
    "names", [("gkd", "fitnet"), ("fgfi", "fgd", "gkd"), ("gkd", "crosskd"), ("logits", "fitnet", "crosskd")]
)
def test_losses_and_parameters_are_those_of_each_method_alone(names, kind, distiller_config):
    """Bit for bit, the relation blocks of two methods and the gradients that they get included."""
    cfg = distiller_config(kind, channels=8)
    cfg.GKD.WARMUP_ITERS = 4
    cfg.GKD.LOSS_WEIGHTS.RELATION = 1e-5 if "fgd" in names else 0.0
    expected, gradients, state = {}, {}, {}
    for name in names:
        cfg.GKD.METHOD = name
        losses, found, before = first_step(cfg)
        expected |= losses
        gradients |= {f"{name}.{key}": value for key, value in found.items()}
        state |= {f"{name}.{key}": value for key, value in before.items()}
    assert len(state) == (2 * 14 * len(build_model(cfg).student_features) if "fgd" in names else 0)
    cfg.GKD.METHOD, cfg.GKD.METHODS = "gkd", list(names)
    losses, found, before = first_step(cfg)
    for ours, alone in ((losses, expected), (found, gradients), (before, state)):
        assert ours.keys() == alone.keys()
        assert all(torch.equal(value, alone[key]) for key, value in ours.items())


def test_a_checkpoint_holds_each_method_under_its_name(distiller_config):
    cfg = distiller_config("retinanet", channels=8)
    cfg.GKD.FEATURES, cfg.GKD.LOSS_WEIGHTS.RELATION = ["p3"], 1e-5
    cfg.GKD.METHODS = ["gkd", "fgd", "pkd"]
    distiller = build_model(cfg)
    names = {name for name in distiller.state_dict() if name.startswith("method.")}
    assert {name.split(".relation.")[0] for name in names} == {"method.gkd", "method.fgd"} and len(names) == 28
    assert type(distiller.method.fgd) is FGD and list(distiller.method.parts) == ["gkd", "fgd", "pkd"]
    # A list of one is that method.
    cfg.GKD.METHODS = ["fgd"]
    single = build_model(cfg)
    assert type(single.method) is FGD
    assert {n.replace("method.fgd.", "method.") for n in names if "fgd" in n} == {
        name for name in single.state_dict() if name.startswith("method.")
    }
    for copied in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        other = copied(distiller)
        assert list(other.method.parts) == ["gkd", "fgd", "pkd"] and named(other.method) == named(distiller.method)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_all_of_them_train_and_are_measured_apart(kind, distiller_config):
    cfg = distiller_config(kind, channels=8)
    cfg.GKD.METHODS = ["gkd", "fgd", "fitnet"]
    cfg.SOLVER.BASE_LR = 0.02
    cfg.GKD.FGD.FOREGROUND_WEIGHT = cfg.GKD.FGD.BACKGROUND_WEIGHT = cfg.GKD.FGD.ATTENTION_WEIGHT = 5e-4
    cfg.GKD.FGD.RELATION_WEIGHT, cfg.GKD.FITNET.WEIGHT = 1e-5, 0.2
    distiller = build_model(cfg).train()
    measurement = watched(distiller)
    history = train(distiller, cfg, training_batch(), 20)
    for key, name in distiller.method.active().items():
        values = [measurement.report.values[name, level] for level in distiller.student_features]
        assert sum(values) == pytest.approx(history[-1][key], rel=1e-5)
    for key in ("loss_fitnet", "loss_fgd_relation", "loss_fgd_attention"):
        assert 0 < history[-1][key] < 0.8 * history[0][key], key
    scalars = measurement.report.scalars()
    assert scalars["gkd_ratio/gkd_attention"] > 0 and scalars["gkd_ratio/fgd_attention/p3"] > 0
    assert "gkd_ratio/box" in scalars and "gkd_ratio/attention" not in scalars


# --- names


def test_a_name_that_is_shared_gets_the_name_of_its_method_in_front():
    method = Several(gkd=GKD(), fgd=FGD(), fitnet=FitNet())
    assert named(method) == {
        "loss_gkd_gradient": "gradient",
        "loss_bmfi_box": "box",
        "loss_bmfi_attention": "gkd_attention",
        "loss_bmfi_image": "image",
        "loss_bmfi_relation": "gkd_relation",
        "loss_fgd_foreground": "foreground",
        "loss_fgd_background": "background",
        "loss_fgd_attention": "fgd_attention",
        "loss_fgd_relation": "fgd_relation",
        "loss_fitnet": "fitnet",
    }
    # As GKD.RATIOS compares them, without capitals.
    assert named(Several(one=Own("Near", prefix="loss_a"), two=Own("near", prefix="loss_b"))) == {
        "loss_aNear": "one_Near",
        "loss_bnear": "two_near",
    }
    assert named(method).keys() - method.active().keys() == {"loss_bmfi_attention", "loss_bmfi_relation"}


def test_ratios_are_given_by_these_names(cfg):
    cfg.GKD.METHODS, cfg.GKD.BALANCE = ["gkd", "fgd"], "calibrate"
    cfg.GKD.RATIOS.GKD_ATTENTION, cfg.GKD.RATIOS.fgd_attention, cfg.GKD.RATIOS.BOX = 0.25, 0, 0.5
    method = build_method(cfg)
    assert method.by_ratio and method.gkd.by_ratio and method.fgd.by_ratio
    ratios = {term.name: (term.ratio, term.weight) for term in method.terms.values()}
    assert ratios == {
        "gradient": (0.3, 1.0),
        "box": (0.5, 1.0),
        "gkd_attention": (0.25, 1.0),
        "image": (0.3, 1.0),
        "gkd_relation": (0.0, 0.0),
        "foreground": (0.1, 1.0),
        "background": (0.1, 1.0),
        "fgd_attention": (0, 0.0),
        "fgd_relation": (0.1, 1.0),
    }
    # What computes the losses has the same weights.
    assert (method.gkd.weights.attention, method.gkd.weights.box) == (1, 1)
    assert "loss_fgd_attention" not in method.fgd.active() and "loss_fgd_attention" not in method.active()
    for key, term in method.terms.items():
        part = method.gkd if key in method.gkd.terms else method.fgd
        assert part.terms[key] == term
        assert method.setting(term) == (f"GKD.RATIOS.{term.name.upper()}", term.ratio)


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        (
            {"ATTENTION": 0.5},
            "GKD.RATIOS.ATTENTION is set, but several of the methods gkd, fgd have a loss of this name: set "
            "GKD.RATIOS.GKD_ATTENTION or GKD.RATIOS.FGD_ATTENTION",
        ),
        ({"relation": 0.5}, "GKD.RATIOS.RELATION is set, but several .* GKD.RATIOS.GKD_RELATION or"),
        ({"BOXX": 0.5}, "GKD.RATIOS.BOXX is set, but no loss has this name: .*, fgd_relation: did you mean box?"),
        ({"FGD_ATTENTION": -1}, "^GKD.RATIOS.FGD_ATTENTION is -1, but must be a finite number >= 0"),
    ],
)
def test_ratios_that_can_not_be(ratios, message):
    with pytest.raises(ValueError, match=message):
        settle_weights(Several(gkd=GKD(), fgd=FGD()), "calibrate", ratios)


def test_weights_stand_at_the_keys_of_each_method(cfg):
    cfg.GKD.METHODS = ["fitnet", "fgfi"]
    cfg.GKD.FITNET.WEIGHT = 0.25
    method = build_method(cfg)
    assert [method.setting(term) for term in method.terms.values()] == [
        ("GKD.FITNET.WEIGHT", 0.25),
        ("GKD.FGFI.WEIGHT", 0.01),
    ]
    assert weights_as_yaml(method.terms.values(), {"fitnet": 0.5, "fgfi": 0.125}) == (
        "GKD:\n  BALANCE: fixed\n  FITNET:\n    WEIGHT: 0.5\n  FGFI:\n    WEIGHT: 0.125\n"
    )
    given = {"GKD.FITNET.WEIGHT": 0.25, "GKD.FGFI.WEIGHT": 0.01}
    assert keys_without_effect(method, given, {"FGFI": 0.5}) == [
        "GKD.RATIOS.FGFI is 0.5, which has no effect under GKD.BALANCE fixed: set GKD.FGFI.WEIGHT, which is 0.01, "
        "instead, or GKD.BALANCE to calibrate"
    ]
    settle_weights(method, "calibrate", {})
    assert keys_without_effect(method, given, {}) == [
        "GKD.FITNET.WEIGHT is 0.25, which has no effect under GKD.BALANCE calibrate: set GKD.RATIOS.FITNET, which is "
        "1, instead"
    ]


# --- what the methods ask for, and are given


def test_it_needs_what_the_methods_that_are_on_need():
    needs = [name for name in vars(Method) if name.startswith("needs_")]
    assert {"needs_student_grad", "needs_teacher_grad", "needs_cell_grads", "needs_anchors"} <= set(needs)

    def wanted(**methods):
        method = Several(**methods)
        return {name for name in needs if getattr(method, name)}

    features, gradients = {"needs_features"}, {"needs_features", "needs_student_grad", "needs_teacher_grad"}
    assert wanted(fitnet=FitNet(), pkd=PKD()) == features
    assert wanted(fitnet=FitNet(), fgfi=FGFI()) == features | {"needs_anchors"}
    assert wanted(gkd=GKD(), fgfi=FGFI()) == gradients | {"needs_anchors"}
    assert wanted(gkd=GKD(), fgfi=FGFI(0.0)) == gradients
    assert wanted(fitnet=FitNet(), crosskd=CrossKD()) == features | {"needs_cross_predictions", "needs_predictions"}
    assert wanted(fitnet=FitNet(0.0), logits=Logits()) == {"needs_student_predictions", "needs_predictions"}
    assert "needs_cell_grads" in wanted(fitnet=FitNet(), gkd=GKD(importance="element"))
    # The ratios decide under calibrate.
    method = Several(gkd=GKD({"gradient": 0, "box": 0, "image": 0}), fgfi=FGFI())
    assert not method.needs_student_grad
    method.weigh_by_ratio({"fgfi": 0})
    assert method.needs_student_grad and not method.needs_anchors


def test_each_is_given_what_it_would_be_alone():
    level = dataclasses.replace(random_level(), anchors=[torch.zeros(11, 19, 1, 4)])
    assert level.student_grad is not None
    own, other = Own("sum"), Own("other", prefix="loss_other_")
    other.needs_anchors, other.needs_student_grad = False, True
    Several(own=own, other=other)([level])
    assert own.given[0].anchors is not None and own.given[0].student_grad is None
    assert other.given[0].anchors is None and other.given[0].student_grad is not None


def test_one_that_is_off_is_not_called():
    own, off = Own("sum"), Own("other", weight=0.0, prefix="loss_other_")
    off.level_losses = off.build_parameters = off.describe = None
    method = Several(off=off, own=own)
    method.build_parameters({"p3": 8})
    level = random_level()
    assert {key: loss.item() for key, loss in method([level], 0.5).items()} == {
        "loss_own_sum": pytest.approx(level.student.sum().item())
    }
    assert method and method.describe() == ""
    assert not Several(off=off) and Several(off=off).active() == {}


class Overlapping(Method):
    """Also returns what is none of its losses, which a method may."""

    def __init__(self):
        super().__init__({"loss_sums": Term("sums", 1.0, "GKD.METHOD_OPTIONS.WEIGHT")})

    def forward(self, levels, factor=1.0):
        return {"loss_sums": levels[0].student.sum(), "loss_fitnet": torch.tensor(7.0)}


def test_no_method_replaces_a_loss_of_another():
    level = random_level()
    losses = Several(fitnet=FitNet(), own=Overlapping())([level])
    assert losses["loss_fitnet"] == FitNet()([level])["loss_fitnet"] and len(losses) == 2


def test_maps_are_drawn_by_the_options_of_the_first_that_compares_gradients():
    relu = GKD(rectifier="relu")
    assert Several(fitnet=FitNet(), gkd=relu).map_options is relu.options
    assert Several(fitnet=FitNet(), pkd=PKD()).map_options == LossOptions()


# --- configs


def test_names_of_a_config(cfg):
    assert (method_names(cfg), method_title(cfg)) == (["gkd"], "gkd")
    cfg.GKD.METHOD = "pkd"
    assert method_names(cfg) == ["pkd"]
    cfg.GKD.METHODS = ["fitnet", "pkd"]
    assert (method_names(cfg), method_title(cfg)) == (["fitnet", "pkd"], "fitnet + pkd")
    assert list(build_method(cfg).parts) == ["fitnet", "pkd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["gkd", "fitnet", "gkd"], r"GKD.METHODS is \['gkd', 'fitnet', 'gkd'\], which has gkd twice"),
        (["gkd", "fitnett"], "GKD.METHODS names 'fitnett', which is not registered: did you mean fitnet"),
        (["gkd", "none"], "GKD.METHODS has none, which has no loss, beside gkd: leave it out, or the others"),
        (["gkd", 3], r"GKD.METHODS is \['gkd', 3\], but must be a list of names of methods, and 3 is none"),
    ],
)
def test_lists_that_can_not_be(options, message, cfg):
    cfg.GKD.METHODS = options
    with pytest.raises(ValueError, match=message):
        build_method(cfg)


@pytest.mark.parametrize("one", ["pkd", "none"])
def test_a_method_that_the_list_would_silently_replace_is_refused(one, cfg):
    cfg.GKD.METHODS, cfg.GKD.METHOD = ["gkd", "fitnet"], one
    message = (
        rf"GKD.METHOD is '{one}', but GKD.METHODS is \['gkd', 'fitnet'\], which takes its place: set GKD.METHODS to "
        rf"\[\] for {one} alone, or leave GKD.METHOD out"
    )
    with pytest.raises(ValueError, match=message):
        build_method(cfg)


def test_methods_that_do_not_go_together():
    with pytest.raises(ValueError, match="GKD.METHODS has fitnet and mine, which both call a loss loss_fitnet: they"):
        Several(fitnet=FitNet(), mine=Own("fitnet", prefix="loss_"))
    with pytest.raises(ValueError, match="GKD.METHODS has none, which has no loss, beside pkd"):
        Several(pkd=PKD(), none=Nothing())
    with pytest.raises(ValueError, match="GKD.METHODS can't have a method of the name 'forward': register it under"):
        Several(forward=PKD(), fitnet=FitNet())
    with pytest.raises(TypeError, match="the method pkd is Linear.*, but must be a Method"):
        Several(pkd=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="name at least one"):
        Several()


def test_options_are_checked_in_each_method(cfg):
    cfg.GKD.METHODS, cfg.GKD.IMPORTANCE_FLOOR, cfg.GKD.WEIGHTING = ["fitnet", "gkd"], 0.5, "uniform"
    with pytest.raises(ValueError, match="importance_floor 0.5, which changes no loss"):
        build_method(cfg)


def test_methods_of_ones_own(monkeypatch, cfg):
    monkeypatch.setattr(METHOD_REGISTRY, "_obj_map", dict(METHOD_REGISTRY._obj_map))

    @METHOD_REGISTRY.register()
    def mine(cfg):
        return Own("box", weight=cfg.GKD.METHOD_OPTIONS.WEIGHT)

    cfg.GKD.METHODS, cfg.GKD.METHOD_OPTIONS.WEIGHT = ["gkd", "mine"], 0.5
    method = build_method(cfg)
    assert method.terms["loss_own_box"] == Term("mine_box", 0.5, "GKD.METHOD_OPTIONS.BOX")
    assert method.terms["loss_bmfi_box"].name == "gkd_box" and method.needs_anchors


def test_the_first_line_of_a_run(distiller_config):
    cfg = distiller_config()
    cfg.GKD.METHODS = ["gkd", "fitnet"]
    cfg.GKD.LOSS_WEIGHTS.ATTENTION = 0.0
    summary = build_model(cfg)._announce
    assert isinstance(summary, Summary)
    assert summary._method() == (
        "gkd + fitnet, weights gradient 0.002, box 0.001, image 0.001, fitnet 1 (off: attention, relation); gkd: "
        "weighting gradient, maps in the boxes, importance channel"
    )
    assert summary.method.implementation(torch.device("cpu")).endswith("on cpu (gkd); PyTorch (fitnet)")
