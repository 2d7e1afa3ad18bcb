"""Two processes with half a batch each train as one with the whole batch; no parameter is left unused."""

import importlib.util
import itertools

import pytest
import torch
from detectron2.modeling.proposal_generator import proposal_utils
from distributed_steps import build, comparable, gradients, half_a_batch, nms
from tiny import ARCHITECTURES, training_batch
from torch import multiprocessing

WEIGHTS = {
    "all": (0.5, 1e-3, 5e-4, 1e-3),
    "no_gradient": (0.0, 1e-3, 5e-4, 1e-3),
    "gradient_only": (0.5, 0.0, 0.0, 0.0),
    "no_box": (0.5, 0.0, 5e-4, 1e-3),
    "attention_only": (0.0, 0.0, 5e-4, 0.0),
    "image_only": (0.0, 0.0, 0.0, 1e-3),
    "none": (0.0, 0.0, 0.0, 0.0),
}
# With parameters of the method's own.
RELATION = {"relation_only": (0.0, 0.0, 0.0, 0.0, 1e-5), "all_and_relation": (0.5, 1e-3, 5e-4, 1e-3, 1e-5)}
# A student whose BatchNorms are frozen, as those of the ResNets here.
TIMM = {"timm": WEIGHTS["all"]} if importlib.util.find_spec("timm") else {}
# Other methods. A RetinaNet's sums are divided by a moving average of the process's positive anchors.
METHODS = ("crosskd", "logits")
# With fewer channels than the teacher's 16 there are align convolutions.
CASES = [
    f"{kind}-{channels}-{weights}"
    for kind in ARCHITECTURES
    for channels, weights in (*itertools.product((16, 8), WEIGHTS), (8, "relation_only"), (16, "all_and_relation"))
] + [f"retinanet-8-{weights}" for weights in TIMM]
CASES += [f"{kind}-8-{method}" for kind in ARCHITECTURES for method in METHODS]


def on_timm(cfg):
    """A student on a backbone of timm, part of which is frozen; the teacher's config is written by then."""
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_timm_fpn_backbone"
    cfg.MODEL.TIMM.NAME = "mobilenetv2_050"


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    # Two boxes in each image, all of one size: what a batch is padded to depends on its largest image.
    return training_batch(((96, 120), (96, 120))) + training_batch(((96, 120), (96, 120)))


@pytest.fixture(scope="module")
def cases(batch, tmp_path_factory, make_distiller_config):
    """Case -> its config, the losses to compare, and the gradients of the two processes."""
    configs = {}
    for case in CASES:
        kind, channels, weights = case.split("-")
        folder = tmp_path_factory.mktemp(case)
        cfg = make_distiller_config(folder, kind, channels=int(channels), change=comparable)
        if weights in METHODS:
            cfg.GKD.METHOD = weights
        else:
            keys = ("GRADIENT", "BOX", "ATTENTION", "IMAGE", "RELATION")
            for key, value in zip(keys, {**WEIGHTS, **RELATION, **TIMM}[weights]):
                cfg.GKD.LOSS_WEIGHTS[key] = value
        if weights == "timm":
            on_timm(cfg)
        # RetinaNet divides its own losses by a moving average of the process's positive anchors; the distillation
        # losses do not depend on that factor.
        alone = kind == "retinanet" and weights not in ("none", *METHODS)
        configs[case] = cfg, "loss_gkd loss_bmfi" if alone else "loss"
    configs = {case: (cfg, tuple(terms.split())) for case, (cfg, terms) in configs.items()}
    folder = tmp_path_factory.mktemp("gradients")
    multiprocessing.spawn(half_a_batch, (configs, batch, folder), nprocs=2)
    return configs, folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, cases, batch, monkeypatch):
    monkeypatch.setattr(proposal_utils, "batched_nms", nms)
    configs, folder = cases
    found = [torch.load(folder / f"{case}.{rank}.pth") for rank in range(2)]
    cfg, terms = configs[case]
    expected = gradients(build(cfg), batch, terms, steps=1)
    assert found[0].keys() == expected.keys()
    assert any(name.startswith("method.") for name in expected) == ("relation" in case)
    aligned = case.split("-")[1] == "8" and not case.endswith(("none", "logits"))
    assert any("align" in name for name in expected) == aligned
    for name, gradient in expected.items():
        torch.testing.assert_close(found[1][name], found[0][name], rtol=0, atol=0)
        if case.startswith("retinanet") and case.endswith(("none", *METHODS)):
            continue  # RetinaNet's own losses, too
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-5, atol=1e-12 + 1e-7 * gradient.abs().max().item())
    assert sum(gradient.abs().sum() for name, gradient in expected.items() if "backbone" in name) > 0
