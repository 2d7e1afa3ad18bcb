"""Weights and ratios of losses: how a config gives them, and what is said of those without effect."""

import pytest
import yaml
from detectron2.config import get_cfg

from gkd_d2 import add_gkd_config
from gkd_d2.methods import (
    FGD,
    GKD,
    FitNet,
    LevelwiseMethod,
    Nothing,
    Term,
    build_method,
    keys_without_effect,
    settle_weights,
    weights_as_yaml,
)


class Mixed(LevelwiseMethod):
    """Its losses have names in capitals and small letters, and keys that GKD knows and does not."""

    def __init__(self, names=("Mean", "area")):
        keys = ("GKD.METHOD_OPTIONS.WEIGHT", "GKD.FITNET.WEIGHT")
        super().__init__({f"loss_{n}": Term(n, 2.0, k, ratio=0.4) for n, k in zip(names, keys)})

    def level_losses(self, level):
        return {}


def ratios(method):
    return {term.name: (term.ratio, term.weight) for term in method.terms.values()}


def test_ratios_replace_the_weights():
    method = Mixed()
    settle_weights(method, "fixed", {"mean": 3})
    assert not method.by_ratio and ratios(method) == {"Mean": (0.4, 2.0), "area": (0.4, 2.0)}
    # The names of losses are compared in small letters.
    settle_weights(method, "calibrate", {"MEAN": 3, "Area": 0})
    assert method.by_ratio and ratios(method) == {"Mean": (3, 1.0), "area": (0, 0.0)}
    assert [term.ratio_key for term in method.terms.values()] == ["GKD.RATIOS.MEAN", "GKD.RATIOS.AREA"]
    assert method.active() == {"loss_Mean": "Mean"}


def test_ratios_of_a_config():
    cfg = get_cfg()
    add_gkd_config(cfg)
    cfg.GKD.BALANCE, cfg.GKD.RATIOS.ATTENTION, cfg.GKD.RATIOS.box = "calibrate", 0.25, 0
    method = build_method(cfg)
    assert isinstance(method, GKD)
    assert ratios(method) == {
        "gradient": (0.3, 1.0),
        "box": (0, 0.0),
        "attention": (0.25, 1.0),
        "image": (0.3, 1.0),
        "relation": (0.0, 0.0),
    }
    assert (method.weights.box, method.weights.attention) == (0, 1)
    # Which any config may be asked for.
    cfg.GKD.METHOD = "none"
    assert not build_method(cfg)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"fitnett": 1},
            "GKD.RATIOS.FITNETT is set, but no loss has this name: the losses are fitnet: did you",
        ),
        ({"FITNET": 1, "fitnet": 1}, "GKD.RATIOS has FITNET twice, in capitals and in small letters"),
        ({"fitnet": -1}, "GKD.RATIOS.FITNET is -1, but must be a finite number >= 0"),
        ({"fitnet": False}, "GKD.RATIOS.FITNET is False, but must be a finite number >= 0"),
        ({"fitnet": {}}, "GKD.RATIOS.FITNET is {}, but must be a finite number >= 0"),
        ({"fitnet": 1e39}, "GKD.RATIOS.FITNET is 1e[+]39, but must be a finite number >= 0 that float32 holds"),
    ],
)
def test_ratios_that_can_not_be(given, message):
    with pytest.raises(ValueError, match=message):
        settle_weights(FitNet(), "calibrate", given)


def test_two_losses_differ_by_more_than_capitals():
    with pytest.raises(ValueError, match="Mixed has two losses of one name: area, Area"):
        Mixed(("area", "Area"))


def test_weights_in_a_file():
    terms = FGD().terms.values()
    weights = {"foreground": 0.0123456, "relation": 5.4321e-9}
    expected = {
        "FOREGROUND_WEIGHT": 0.01235,
        "BACKGROUND_WEIGHT": 0.0,
        "ATTENTION_WEIGHT": 0.0,
        "RELATION_WEIGHT": 5.432e-9,
    }
    assert yaml.safe_load(weights_as_yaml(terms, weights)) == {"GKD": {"BALANCE": "fixed", "FGD": expected}}
    placed = yaml.safe_load(weights_as_yaml(terms, weights, lambda key: f"a.{key.rpartition('.')[2].lower()}"))
    assert placed == {"a": {"balance": "fixed", **{key.lower(): value for key, value in expected.items()}}}


def test_a_key_of_several_losses_is_given_where_it_can_be():
    terms = [Term(name, 1.0, "GKD.METHOD_OPTIONS.WEIGHT") for name in ("near", "far")]
    both = {"GKD": {"BALANCE": "fixed", "METHOD_OPTIONS": {"WEIGHT": 0.5}}}
    assert yaml.safe_load(weights_as_yaml(terms, {"near": 0.5, "far": 0.5})) == both
    text = weights_as_yaml(terms, {"near": 0.5, "far": 0.25}, str.lower)
    assert yaml.safe_load(text) == {"gkd": {"balance": "fixed"}}
    assert text.startswith(
        "# gkd.method_options.weight is the key of several losses, and can't give each its weight: near 0.5, far 0.25\n"
    )


def test_keys_without_effect():
    method = Mixed()
    given = {"GKD.METHOD_OPTIONS.WEIGHT": 2.0, "GKD.FITNET.WEIGHT": 2.0}
    assert keys_without_effect(method, given, {}) == []
    fixed = keys_without_effect(method, given, {"mean": 3})
    assert fixed == [
        "GKD.RATIOS.MEAN is 3, which has no effect under GKD.BALANCE fixed: set GKD.METHOD_OPTIONS.WEIGHT, which is 2, "
        "instead, or GKD.BALANCE to calibrate"
    ]
    settle_weights(method, "calibrate", {"mean": 3})
    # The key that GKD does not know has no default.
    assert keys_without_effect(method, given, {"mean": 3}) == [
        "GKD.FITNET.WEIGHT is 2, which has no effect under GKD.BALANCE calibrate: set GKD.RATIOS.AREA, which is 0.4, "
        "instead"
    ]
    assert keys_without_effect(method, given | {"GKD.FITNET.WEIGHT": 1.0}, {}) == []
    settle_weights(method, "calibrate", {"area": 0})
    # Off either way.
    assert keys_without_effect(method, given | {"GKD.FITNET.WEIGHT": 0.0}, {}) == []
    assert keys_without_effect(Nothing(), {}, {}) == []
