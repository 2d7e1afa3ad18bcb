"""Gradient ratios and the weights that are proposed from them."""

import itertools

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny import ARCHITECTURES, training_batch, watched

from gkd_d2.analysis.gradient_ratios import Ratio, measure_ratios, suggest_weights, unit_weights
from gkd_d2.utils.random_streams import mix_seed, seed_everything

TERMS = ("gradient", "box", "attention", "image", "relation")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_proposed_weights_give_the_wanted_ratios(kind, distiller_config):
    """A student of the proposed weights is measured on the same batches again."""
    cfg = distiller_config(kind, channels=8)
    cfg.GKD.WARMUP_ITERS = 1000
    # Batches are measured whole, which a training with these would refuse.
    cfg.SOLVER.IMS_PER_BATCH = cfg.SOLVER.ACCUMULATE_STEPS = 2
    batches = [training_batch(((90, 120), (96, 100))) for _ in range(3)]
    seed_everything(1)
    before = build_model(unit_weights(cfg, TERMS))
    weights = {name: value.clone() for name, value in before.named_parameters()}
    ratios = measure_ratios(before, batches, seed=4)
    assert all(torch.equal(value, weights[name]) for name, value in before.named_parameters())
    wanted = {"gradient": 1.0, "box": 0.5, "attention": 0.1, "image": 0.25, "relation": 0.75}
    proposed = suggest_weights(ratios, wanted)

    cfg.GKD.WARMUP_ITERS = 0
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    for term, weight in proposed.items():
        cfg.GKD.LOSS_WEIGHTS[term.upper()] = weight
    seed_everything(1)
    distiller = build_model(cfg).train()
    measurement = watched(distiller)
    found = {term: [] for term in wanted}
    with EventStorage() as storage:
        for batch in batches:
            seed_everything(mix_seed(4, storage.iter))
            distiller(batch)
            scalars = measurement.report.scalars()
            for term in wanted:
                found[term].append(scalars[f"gkd_ratio/{term}"])
            storage.step()
    for term, ratio in wanted.items():
        # Weights are proposed to two digits.
        assert sorted(found[term])[1] == pytest.approx(ratio, rel=0.06), term


def test_numbers_by_hand():
    ratios = {"gradient": Ratio(4.0, 3.0, 5.0, {"p3": 4.0}), "box": Ratio(1234.0, 1.0, 2000.0, {})}
    assert suggest_weights(ratios, {"gradient": 0.5, "box": 1.0}) == {"gradient": 0.12, "box": 0.00081}


def test_what_can_not_be_measured(distiller_config):
    distiller = build_model(unit_weights(distiller_config("retinanet"), TERMS))
    with pytest.raises(ValueError, match="there is no batch"):
        measure_ratios(distiller, [], seed=0)
    batch = training_batch()
    for image in batch:
        image["instances"] = image["instances"][:0]
    with pytest.raises(ValueError, match="the gradient loss had no gradient"):
        measure_ratios(distiller, itertools.repeat(batch, 2), seed=0)
