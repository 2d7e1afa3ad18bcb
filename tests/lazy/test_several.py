"""Several methods at once in a LazyConfig."""

import logging

import pytest
import torch
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from lazy_configs import model_text, write_distilled
from omegaconf import OmegaConf
from short_runs import metrics
from tiny import training_batch

from gkd_d2.config.lazy_spec import load_lazy
from gkd_d2.engine.preflight import PreflightError, check_inputs
from gkd_d2.lazy import distil
from gkd_d2.lazy.methods import _METHODS, method_call, places_of_methods, title_of
from gkd_d2.lazy.names import in_lazy_words, lazy_name, speaking_lazily
from gkd_d2.lazy.run import LazyRun
from gkd_d2.lazy.trainer import LazyTrainer, settle_lazy_seed
from gkd_d2.methods import FGD, GKD, FitNet, Several


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_distilled(tmp_path_factory.mktemp("several"), options='method=["gkd", "fitnet"]')


def test_each_method_is_reached_by_its_name(config):
    model = load_lazy(str(config)).model
    assert list(model.method) == ["gkd", "fitnet", "_target_"]
    LazyConfig.apply_overrides(model, ["method.gkd.weights.box=0.5", "method.fitnet.weight=0.25"])
    distiller = instantiate(model)
    assert type(distiller.method) is Several and title_of(distiller.method) == "gkd + fitnet"
    assert (distiller.method.gkd.weights.box, distiller.method.gkd.weights.image) == (0.5, 1e-3)
    assert distiller.method.terms["loss_fitnet"].weight == 0.25
    first = distiller._announce._method()
    assert first.startswith("gkd + fitnet, weights gradient 0.002, box 0.5, image 0.001, fitnet 0.25 (off: attention")
    with EventStorage():
        losses = distiller.train()(training_batch())
    assert distiller.method.active().keys() < losses.keys()


def test_the_methods_are_those_of_a_config_of_yacs(tmp_path, distiller_config):
    """With the parameters that a seed gives them."""
    cfg = distiller_config("retinanet", channels=8)
    cfg.GKD.METHODS = ["gkd", "fgd"]
    (tmp_path / "student.py").write_text(model_text("retinanet", channels=8))
    student = load_lazy(str(tmp_path / "student.py")).model
    weights = {name.lower(): value for name, value in cfg.GKD.LOSS_WEIGHTS.items()}
    relation = weights.pop("relation")
    method = {"gkd": LazyCall(GKD)(weights=weights, relation=relation), "fgd": "fgd"}
    model = distil(student, teacher=cfg.GKD.TEACHER.CONFIG_FILE, teacher_weights=cfg.GKD.TEACHER.WEIGHTS, method=method)
    model.seed = cfg.SEED
    ours, theirs = build_model(cfg).method, instantiate(model).method
    assert ours.terms == theirs.terms and ours.state_dict().keys() == theirs.state_dict().keys()
    state = theirs.state_dict()
    assert len(state) == 2 * 7 * 5 and all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


class MyFitNet(FitNet):
    """One of the user's own."""


def test_names_of_keys_are_those_of_each_method():
    model = OmegaConf.create({"method": None}, flags={"allow_objects": True})
    assert places_of_methods(model) == {} and lazy_name("GKD.FITNET.WEIGHT") == "model.method.weight"
    model.method = method_call(["gkd", "fitnet"])
    places = places_of_methods(model)
    assert places == {"gkd": "model.method.gkd", "fitnet": "model.method.fitnet"}
    text = "Lower GKD.LOSS_WEIGHTS.BOX or GKD.FITNET.WEIGHT, put `GKD.MAP_REGION image`"
    assert in_lazy_words(text, places) == (
        "Lower model.method.gkd.weights.box or model.method.fitnet.weight, put `model.method.gkd.map_region=image`"
    )
    model.method = method_call({"mine": LazyCall(MyFitNet)(weight=2.0), "other": LazyCall(FGD)()})
    assert places_of_methods(model) == {"fitnet": "model.method.mine", "fgd": "model.method.other"}
    # By its name, as where a config was written to a file.
    model.method._target_ = f"{Several.__module__}.Several"
    assert lazy_name("GKD.FGD.TEMPERATURE", places_of_methods(model)) == "model.method.other.temperature"
    assert places_of_methods(OmegaConf.create({"method": {"_target_": "no.such.thing"}})) == {}


@pytest.mark.parametrize("name", _METHODS)
def test_every_weight_has_a_place_below_its_method(name):
    for term in _METHODS[name]().terms.values():
        assert lazy_name(term.key, {name: "place"}).startswith("place.")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (["gkd", "gkd"], r"method is \['gkd', 'gkd'\], which has gkd twice"),
        (["gkd", "fitnett"], "method is 'fitnett', which is none of .*: did you mean fitnet"),
        (["gkd", 3], "must be a list of names of methods, and 3 is none"),
        ({"a": "fitnett"}, "method is 'fitnett'"),
        ({"gkd": "gkd", "none": "none"}, "GKD.METHODS has none, which has no loss, beside gkd"),
        ([], "name at least one"),
    ],
)
def test_what_can_not_be(method, message):
    with pytest.raises(ValueError, match=message):
        instantiate(method_call(method))


def test_a_list_of_one_is_that_method():
    assert method_call(["fitnet"])._target_ is FitNet and method_call("fitnet")._target_ is FitNet


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.method.fitnet.weight=-1"], "model.method.fitnet.weight is -1, but must be a finite number >= 0"),
        (
            ["model.balance=calibrate", "model.ratios.fitnett=1"],
            "model.ratios.fitnett is set, but no loss has this name: the losses are gradient, box, attention, image, "
            "relation, fitnet: did you mean fitnet?",
        ),
    ],
)
def test_mistakes_are_found_before_the_run(overrides, message, read, config):
    cfg = read(config, *overrides)
    with pytest.raises(PreflightError) as error:
        check_inputs(LazyRun(cfg), eval_only=False, resume=False)
    assert message in in_lazy_words(str(error.value), places_of_methods(cfg.model))


def test_names_after_distil_are_refused(read, config):
    cfg = read(config)
    cfg.model.method = ["gkd", "fitnet"]
    with pytest.raises(ValueError, match=r"model.method is \['gkd', 'fitnet'\], but only distil\(method=...\) takes"):
        LazyRun(cfg).method()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.method.fitnet.weigth=1",
            "sets model.method.fitnet.weigth, which the config does not have: did you mean",
        ),
        ("model.method.gdk.weight=1", "sets model.method.gdk.weight, which the config does not have"),
        ("model.method.gkd.map_regoin=image", "GKD has no option 'map_regoin': did you mean map_region"),
        ("model.method.gdk=1", "the method gdk is 1, but must be a Method"),
    ],
)
def test_misspelt_overrides_are_refused(override, message, read, config):
    with pytest.raises((TypeError, ValueError), match=message):
        LazyRun(read(config, override)).method()


def test_a_run_calibrates_all_of_them_and_its_weights_can_be_fixed(read, config, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="gkd_d2")
    overrides = ["model.balance=calibrate", "model.ratios.fitnet=0.5", "model.method.fitnet.weight=3"]
    overrides += ["train.eval_period=0", "train.log_period=1", "train.balance.start=1", "train.balance.iters=2"]
    cfg = read(config, f"train.output_dir={tmp_path / 'run'}", *overrides)
    (tmp_path / "run").mkdir()
    settle_lazy_seed(cfg, resume=False)
    del cfg.dataloader.evaluator
    with speaking_lazily(places_of_methods(cfg.model)):
        trainer = LazyTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
    assert "model.method.fitnet.weight is 3, which has no effect under model.balance calibrate: set" in caplog.text
    found = OmegaConf.load(tmp_path / "run" / "calibrated_weights.yaml")
    assert set(found.model.method) == {"gkd", "fitnet"}
    fixed = OmegaConf.merge(read(config), found)
    weights = {term.name: term.weight for term in LazyRun(fixed).method().terms.values()}
    last = metrics(tmp_path / "run")[2]
    for name in ("gradient", "box", "image", "fitnet"):
        assert weights[name] == pytest.approx(last[f"gkd_weight/{name}"], rel=1e-3) and weights[name] > 0
    assert weights["attention"] == weights["relation"] == 0
