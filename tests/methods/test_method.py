"""What all methods of distillation share: terms, weights, the sum over levels, and how they are found."""

import dataclasses
import functools
import inspect
import operator

import pytest
import torch
from detectron2.config import LazyCall, get_cfg, instantiate
from levels import built, random_level, random_pyramid
from torch import nn

from gkd_d2 import add_gkd_config
from gkd_d2.losses import LossOptions, LossWeights, distillation_losses
from gkd_d2.methods import (
    FGD,
    FGFI,
    GKD,
    METHOD_REGISTRY,
    PKD,
    CrossKD,
    FitNet,
    LevelwiseMethod,
    Logits,
    Method,
    Nothing,
    Term,
    build_method,
)

# All five losses, and maps over the image, which images without boxes have too.
ALL_OF_GKD = GKD(LossWeights(0.5, 1e-3, 5e-4, 1e-3), relation=1e-3, implementation="reference", map_region="image")
METHODS = (ALL_OF_GKD, FitNet(), FGFI(), FGFI(levels="separate"), FGD(), PKD())
# Those of this project, whatever other tests have registered.
REGISTERED = [name for name, function in METHOD_REGISTRY if function.__module__.startswith("gkd_d2.")]


def named(methods):
    return pytest.mark.parametrize("method", methods, ids=lambda method: type(method).__name__)


class Moments(LevelwiseMethod):
    """Means of the student's feature and of its square."""

    def __init__(self, first=1.0, second=1.0, keys=("loss_first", "loss_second"), names=("first", "second")):
        super().__init__({k: Term(n, w, f"GKD.{n.upper()}") for k, n, w in zip(keys, names, (first, second))})

    def level_losses(self, level):
        return {"loss_first": level.student.mean(), "loss_second": level.student.square().mean()}


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_gkd_config(cfg)
    return cfg


def test_weights_and_levels_are_added_up():
    # Means 2 and -1, of the squares 5 and 1.
    levels = [dataclasses.replace(random_level((1, 2)), student=torch.full((3, 5, 1, 2), -1.0)) for _ in range(2)]
    levels[0].student[..., 0], levels[0].student[..., 1] = 1.0, 3.0
    assert Moments(first=0.5, second=3.0)(levels) == {"loss_first": 0.5 * (2 - 1), "loss_second": 3.0 * (5 + 1)}
    assert Moments(first=0.5)(levels[1:], factor=0.25) == {"loss_first": -0.125, "loss_second": 0.25}


class Called(Method):
    """Has __call__ where others have forward."""

    def __init__(self):
        super().__init__({"loss_called": Term("called", 1.0, "GKD.CALLED")})

    def __call__(self, levels, factor=1.0):
        return {"loss_called": factor * sum(level.student.sum() for level in levels)}


def test_a_class_may_define_its_call():
    level = random_level()
    assert Called()([level, level], 0.25)["loss_called"].item() == pytest.approx(0.5 * level.student.sum().item())


def test_a_weight_of_0_leaves_a_loss_out():
    method = Moments(first=0.0)
    assert method
    assert method.active() == {"loss_second": "second"}
    assert list(method([random_level()])) == ["loss_second"]
    assert not Moments(first=0.0, second=0.0)
    assert not Nothing()


@named(METHODS)
def test_the_losses_of_a_batch_are_those_of_its_levels(method):
    levels = random_pyramid((11, 19), (6, 10), (1, 1))
    whole = built(method, *levels)(levels, factor=0.5)
    assert whole.keys() == method.active().keys() == method.terms.keys()
    for key, value in whole.items():
        parts = [method([level], factor=0.5)[key] for level in levels]
        torch.testing.assert_close(value, sum(parts))
        assert value > 0
        torch.testing.assert_close(value, 0.5 * method(levels)[key])


@named(METHODS)
def test_gradients_are_right(method):
    # The gradients of features are constants, so gradcheck must not see them change.
    level = random_level((3, 5), channels=2)
    built(method, level)
    for key in method.terms:
        losses = functools.partial(lambda key, s: method([dataclasses.replace(level, student=s)], 1e3)[key], key)
        assert torch.autograd.gradcheck(losses, level.student), key


@named(METHODS)
def test_nothing_but_the_student_receives_a_gradient(method):
    level = random_level()
    for tensor in (level.teacher, level.student_grad, level.teacher_grad):
        tensor.requires_grad_()
    sum(built(method, level)([level]).values()).backward()
    assert level.student.grad.abs().max() > 0
    assert level.teacher.grad is level.student_grad.grad is level.teacher_grad.grad is None


@named(METHODS)
def test_images_without_boxes(method):
    """Losses of the objects are 0, with gradients of 0."""
    level = dataclasses.replace(random_level(), boxes=[torch.zeros(0, 4, dtype=torch.float64)] * 3)
    objects = {"loss_bmfi_box", "loss_fgfi", "loss_fgd_foreground"}
    for key, loss in built(method, level)([level]).items():
        (gradient,) = torch.autograd.grad(loss, level.student, retain_graph=True)
        assert (loss == 0) == (gradient == 0).all() == (key in objects), key


@named(METHODS)
def test_half_precision_is_accumulated_in_float32(method):
    level = random_level(dtype=torch.float32)
    half = dataclasses.replace(
        level, **{name: getattr(level, name).detach().half() for name in ("student", "teacher", "student_grad")}
    )
    half = dataclasses.replace(half, teacher_grad=level.teacher_grad.half())
    for key, loss in built(method, level)([half]).items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, method([level])[key].detach(), rtol=5e-3, atol=0)


def test_gkd_is_the_function_of_four_losses():
    levels = [random_level(), random_level((6, 10))]
    weights = LossWeights(gradient=0.0, box=2.0, attention=3.0, image=4.0)
    options = {"temperature": 0.8, "weighting": "attention", "rectifier": "relu", "implementation": "reference"}
    method = GKD(weights, **options)
    assert not (method.needs_student_grad or method.needs_teacher_grad)
    assert GKD().needs_student_grad and GKD().needs_teacher_grad
    assert method.active() == {"loss_bmfi_box": "box", "loss_bmfi_attention": "attention", "loss_bmfi_image": "image"}
    expected = distillation_losses(
        [level.student for level in levels],
        [level.teacher for level in levels],
        None,
        None,
        levels[0].boxes,
        levels[0].image_size,
        weights=LossWeights(gradient=0.0, box=0.5, attention=0.75, image=1.0),
        **options,
    )
    assert method(levels, factor=0.25) == expected


# --- the registry and the config


def settings(method):
    """All that a method was built with: its own attributes, terms and options."""
    return {name: value for name, value in vars(method).items() if name not in vars(nn.Module())}


@pytest.mark.parametrize("name", REGISTERED)
def test_defaults_of_config_and_class_agree(name, cfg):
    cfg.GKD.METHOD = name
    method = build_method(cfg)
    assert settings(method) == settings(type(method)())


def test_all_methods_of_the_project_are_compared():
    assert set(REGISTERED) == {"gkd", "fitnet", "fgfi", "fgd", "pkd", "crosskd", "logits", "none"}
    # The comparison sees every option.
    for changed in (
        GKD(temperature=0.75),
        GKD(importance_cap=2.0),
        GKD(map_region="image"),
        GKD({"box": 0.5}),
        GKD(relation=1.0),
        GKD(implementation="reference"),
        FGFI(threshold=0.25),
        FGFI(levels="separate"),
        FGD(temperature=0.75),
        Logits(temperature=0.75),
        Logits(box_weight=0.5),
        CrossKD(class_weight=0.5),
        PKD(1.0),
        FitNet(2.0),
    ):
        assert settings(changed) != settings(type(changed)())


def test_defaults_of_config_and_function_agree(cfg):
    defaults = {name: p.default for name, p in inspect.signature(distillation_losses).parameters.items()}
    method = build_method(cfg)
    assert defaults.pop("weights") == method.weights == LossWeights()
    for name in ("student", "teacher", "student_grad", "teacher_grad", "boxes", "image_size"):
        assert defaults.pop(name) is inspect.Parameter.empty
    assert defaults == {**dataclasses.asdict(method.options), "implementation": cfg.GKD.IMPLEMENTATION}
    level = random_level()
    lists = [[tensor] for tensor in (level.student, level.teacher, level.student_grad, level.teacher_grad)]
    assert distillation_losses(*lists, level.boxes, level.image_size) == method([level])


@pytest.mark.parametrize("name", ["gkd", "fitnet", "fgfi", "fgd", "pkd"])
def test_each_key_sets_its_own_weight(name, cfg):
    cfg.GKD.METHOD = name
    method = build_method(cfg)
    for number, term in enumerate(method.terms.values(), start=1):
        *path, key = term.key.split(".")
        node = functools.reduce(operator.getitem, path, cfg)
        assert node[key] == term.weight
        node[key] = 0.25 * number
    changed = build_method(cfg)
    assert [term.weight for term in changed.terms.values()] == [0.25 * n for n in range(1, 1 + len(method.terms))]


@pytest.mark.parametrize("lazy", [False, True])
def test_weights_of_gkd_as_a_mapping_are_the_defaults_but_for_those_named(lazy):
    build = LazyCall(GKD) if lazy else GKD
    for weights in ({"box": 0.02}, LossWeights(box=0.02)):
        method = build(weights=weights, temperature=0.75)
        method = instantiate(method) if lazy else method
        assert method.weights == LossWeights(box=0.02)
        assert method.terms["loss_bmfi_box"].weight == 0.02
        assert method.options == LossOptions(temperature=0.75)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"boxes": 0.02}, "the weights of GKD have 'boxes', but their names are gradient, box, attention, image;"),
        ({"relation": 5e-6}, "have 'relation', but .*; the weight of the relation loss is the argument relation$"),
        ({"box": -1.0}, "loss weight box is -1.0"),
        ({"box": "2e-2"}, "loss weight box is '2e-2', but must be a finite number >= 0"),
    ],
)
def test_bad_mappings_of_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        GKD(weights)


def test_the_options_of_gkd_come_from_the_config(cfg):
    assert build_method(cfg).options == LossOptions(map_region="boxes")
    assert not build_method(cfg).needs_cell_grads
    values = {
        "TEMPERATURE": 0.75,
        "WEIGHTING": "attention_gradient",
        "RECTIFIER": "relu",
        "MAP_REGION": "image",
        "IMPORTANCE": "norm",
        "IMPORTANCE_FLOOR": 0.25,
        "IMPORTANCE_CAP": 5.0,
    }
    cfg.merge_from_list([part for key, value in values.items() for part in (f"GKD.{key}", value)])
    method = build_method(cfg)
    assert method.options == LossOptions(**{key.lower(): value for key, value in values.items()})
    assert method.needs_cell_grads
    cfg.GKD.IMPLEMENTATION = "fused"
    with pytest.raises(
        ValueError, match="^GKD.IMPLEMENTATION is 'fused', but only 'reference' supports importance 'norm'"
    ):
        build_method(cfg)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"MAP_REGION": "box"}, "GKD.MAP_REGION is 'box', but must be one of 'image', 'boxes'"),
        ({"WEIGHTING": "both"}, "GKD.WEIGHTING is 'both'"),
        ({"IMPORTANCE": "max"}, "GKD.IMPORTANCE is 'max'"),
        ({"IMPORTANCE_FLOOR": 2.0}, "GKD.IMPORTANCE_FLOOR is 2.0"),
        ({"IMPORTANCE_CAP": 0.5}, "GKD.IMPORTANCE_CAP is 0.5"),
        ({"TEMPERATURE": 0.0}, "GKD.TEMPERATURE is 0.0"),
        ({"IMPLEMENTATION": "cuda"}, "GKD.IMPLEMENTATION is 'cuda'"),
        ({"LOSS_WEIGHTS.BOX": -1.0}, "loss weight box is -1.0"),
        (
            {"LOSS_WEIGHTS.RELATION": 1e39},
            r"GKD.LOSS_WEIGHTS.RELATION is 1e\+39, but must be a finite number >= 0 that",
        ),
        (
            {"IMPORTANCE": "norm", "WEIGHTING": "uniform", "LOSS_WEIGHTS.GRADIENT": 0.0},
            "GKD has importance 'norm', which changes no loss",
        ),
        ({"IMPORTANCE_FLOOR": 0.5, "WEIGHTING": "uniform"}, "GKD has importance_floor 0.5, which changes no loss"),
    ],
)
def test_bad_options_of_gkd_are_named_by_their_key(cfg, options, message):
    cfg.merge_from_list([part for key, value in options.items() for part in (f"GKD.{key}", value)])
    with pytest.raises(ValueError, match=f"^{message}"):
        build_method(cfg)


def test_options_of_gkd_are_judged_by_the_losses_that_are_on(cfg):
    """Under calibrate these are those of a ratio, whatever the weights."""
    cfg.merge_from_list(["GKD.IMPORTANCE_FLOOR", 0.5, "GKD.LOSS_WEIGHTS.BOX", 0.0, "GKD.LOSS_WEIGHTS.IMAGE", 0.0])
    with pytest.raises(ValueError, match="importance_floor 0.5, which changes no loss.*or give these losses a weight$"):
        build_method(cfg)
    cfg.GKD.BALANCE = "calibrate"
    assert build_method(cfg).needs_teacher_grad
    cfg.GKD.RATIOS.BOX, cfg.GKD.RATIOS.IMAGE, cfg.GKD.LOSS_WEIGHTS.BOX = 0.0, 0.0, 0.5
    with pytest.raises(ValueError, match="importance_floor 0.5, which changes no loss.*or give these losses a ratio$"):
        build_method(cfg)


def test_other_options_come_from_the_config(cfg):
    cfg.merge_from_list(["GKD.METHOD", "fgfi", "GKD.FGFI.THRESHOLD", 0.25])
    assert build_method(cfg).threshold == 0.25
    assert build_method(cfg).together
    cfg.GKD.FGFI.LEVELS = "separate"
    assert not build_method(cfg).together
    cfg.merge_from_list(["GKD.METHOD", "fgd", "GKD.FGD.TEMPERATURE", 0.75])
    assert build_method(cfg).temperature == 0.75
    cfg.merge_from_list(["GKD.METHOD", "gkd", "GKD.RECTIFIER", "relu"])
    assert build_method(cfg).map_options.rectifier == "relu"
    cfg.GKD.METHOD = "none"
    assert build_method(cfg).terms == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["GKD.METHOD", "fitnet", "GKD.FITNET.WEIGHT", -1.0], "GKD.FITNET.WEIGHT is -1.0, but must be a finite number"),
        (["GKD.METHOD", "pkd", "GKD.PKD.WEIGHT", float("nan")], "GKD.PKD.WEIGHT is nan"),
        (["GKD.METHOD", "fgfi", "GKD.FGFI.THRESHOLD", 1.0], "GKD.FGFI.THRESHOLD is 1.0, but must be at least 0 and be"),
        (["GKD.METHOD", "fgfi", "GKD.FGFI.THRESHOLD", -0.1], "GKD.FGFI.THRESHOLD is -0.1"),
        (
            ["GKD.METHOD", "fgfi", "GKD.FGFI.LEVELS", "all"],
            "GKD.FGFI.LEVELS is 'all', but must be one of together, separate",
        ),
        (
            ["GKD.METHOD", "fgd", "GKD.FGD.TEMPERATURE", 0.0],
            "GKD.FGD.TEMPERATURE is 0.0, but must be a finite number > 0",
        ),
        (["GKD.METHOD", "fgd", "GKD.FGD.ATTENTION_WEIGHT", float("inf")], "GKD.FGD.ATTENTION_WEIGHT is inf"),
        (
            ["GKD.METHOD", "GKD"],
            "GKD.METHOD is 'GKD', which is not registered: did you mean gkd or ",
        ),
    ],
)
def test_bad_options(options, message, cfg):
    cfg.merge_from_list(options)
    with pytest.raises(ValueError, match=message):
        build_method(cfg)


def test_bad_methods(cfg, monkeypatch):
    with pytest.raises(ValueError, match="Moments calls a loss 'first', but its key must begin with 'loss_'"):
        Moments(keys=("first", "loss_second"))
    with pytest.raises(ValueError, match="Moments has two losses of one name: one, one"):
        Moments(names=("one", "one"))
    with pytest.raises(ValueError, match="Moments returned loss_first, loss_second, but its terms are loss_f"):
        Moments(keys=("loss_first", "loss_other"))([random_level()])
    with pytest.raises(TypeError, match="Method computes no losses: give it a method forward"):
        Method({})
    monkeypatch.setattr(METHOD_REGISTRY, "_obj_map", dict(METHOD_REGISTRY._obj_map))

    @METHOD_REGISTRY.register()
    def nothing(cfg):
        return None

    cfg.GKD.METHOD = "nothing"
    with pytest.raises(TypeError, match="registered as the method nothing returned None, but must return a Method"):
        build_method(cfg)
