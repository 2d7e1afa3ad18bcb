"""Gradient ratios and the weights that are proposed from them."""

import itertools

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny import ARCHITECTURES, training_batch, watched

from gkd_d2.analysis.gradient_ratios import (
    Found,
    measure_weights,
    ratio_table,
    ratios_as_yaml,
    to_measure,
    wanted_ratios,
)
from gkd_d2.methods import build_method
from gkd_d2.utils.random_streams import mix_seed, seed_everything

RATIOS = {"gradient": 1.0, "box": 0.5, "attention": 0.1, "image": 0.25, "relation": 0.75}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_proposed_weights_give_the_wanted_ratios(kind, distiller_config):
    """A student of the proposed weights is measured on the same batches again."""
    cfg = distiller_config(kind, channels=8)
    cfg.GKD.WARMUP_ITERS = 1000
    # Batches are measured whole, which a training with these would refuse.
    cfg.SOLVER.IMS_PER_BATCH = cfg.SOLVER.ACCUMULATE_STEPS = 2
    batches = [training_batch(((90, 120), (96, 100))) for _ in range(3)]
    seed_everything(1)
    before = build_model(to_measure(cfg, RATIOS))
    weights = {name: value.clone() for name, value in before.named_parameters()}
    proposed = measure_weights(before, batches, seed=4)
    assert all(torch.equal(value, weights[name]) for name, value in before.named_parameters())
    assert before.listeners is None

    cfg.GKD.WARMUP_ITERS = 0
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    for name, loss in proposed.items():
        cfg.GKD.LOSS_WEIGHTS[name.upper()] = loss.weight
    seed_everything(1)
    distiller = build_model(cfg).train()
    measurement = watched(distiller)
    rows = []
    with EventStorage() as storage:
        for batch in batches:
            seed_everything(mix_seed(4, storage.iter, 0))
            distiller(batch)
            rows.append(measurement.report.scalars())
            storage.step()
    for name, ratio in RATIOS.items():
        measured = sorted(row[f"gkd_ratio/{name}"] for row in rows)
        assert measured[1] == pytest.approx(ratio, rel=1e-4), name
        loss = proposed[name]
        assert measured[0] <= loss.weight * loss.low * (1 + 1e-4) <= loss.weight * loss.high <= measured[2] * (1 + 1e-4)
        for level, median in loss.levels.items():
            of_level = sorted(row[f"gkd_ratio/{name}/{level}"] for row in rows)
            assert loss.weight * median == pytest.approx(of_level[1], rel=1e-4)


def test_the_ratios_that_are_asked_for(distiller_config):
    cfg = distiller_config("retinanet")
    own = {"gradient": 0.3, "box": 1.0, "attention": 0.0, "image": 0.3, "relation": 0.0}
    assert {term.name: term.ratio for term in build_method(cfg).terms.values()} == own
    # On by its weight, and of ratio 0; relation is off.
    assert cfg.GKD.LOSS_WEIGHTS.ATTENTION > 0
    assert wanted_ratios(cfg, None, {}) == own
    assert wanted_ratios(cfg, 0.4, {"relation": 2.0, "box": 0.0}) == {
        "gradient": 0.4,
        "box": 0.0,
        "attention": 0.4,
        "image": 0.4,
        "relation": 2.0,
    }
    cfg.GKD.LOSS_WEIGHTS.IMAGE = 0.0
    cfg.GKD.RATIOS.BOX = 0.7
    assert wanted_ratios(cfg, None, {}) == own | {"image": 0.0, "box": 0.7}
    cfg.GKD.BALANCE = "calibrate"
    assert wanted_ratios(cfg, None, {}) == own | {"box": 0.7}
    assert wanted_ratios(cfg, 0.4, {}) == {name: 0.4 if ratio else 0.0 for name, ratio in own.items()}
    cfg.GKD.METHOD = "fgd"
    with pytest.raises(ValueError, match="GKD.RATIOS.BOX is set, but no loss has this name"):
        wanted_ratios(cfg, None, {})


def test_each_of_several_methods_has_the_weights_that_it_has_alone(distiller_config):
    cfg = distiller_config("retinanet", channels=8)
    batches = [training_batch(((90, 120), (96, 100))) for _ in range(2)]

    def found(*methods):
        cfg.GKD.METHODS = list(methods)
        seed_everything(1)
        distiller = build_model(to_measure(cfg, wanted_ratios(cfg, None, {})))
        return {name: loss.weight for name, loss in measure_weights(distiller, batches, seed=4).items()}

    alone = {name: found(name) for name in ("gkd", "fgd")}
    shared = {"attention": "fgd_attention", "relation": "fgd_relation"}
    # They are off in gkd by default.
    expected = alone["gkd"] | {shared.get(name, name): weight for name, weight in alone["fgd"].items()}
    assert found("gkd", "fgd") == pytest.approx(expected, rel=1e-5) and len(expected) == 7
    assert wanted_ratios(cfg, None, {"gkd_attention": 0.7})["gkd_attention"] == 0.7
    with pytest.raises(ValueError, match="--term names attention, but the method's losses are .*, gkd_attention, "):
        wanted_ratios(cfg, None, {"attention": 0.7})
    terms = build_method(cfg).terms.values()
    assert "RATIOS: {GRADIENT: 0, BOX: 0, GKD_ATTENTION: 0, IMAGE: 0" in ratios_as_yaml(terms, {})
    cfg.GKD.METHODS, cfg.GKD.FITNET.WEIGHT, cfg.GKD.PKD.WEIGHT = ["fitnet", "pkd"], 0.0, 0.0
    with pytest.raises(ValueError, match=r"all losses of fitnet \+ pkd are off, .*: name some by --term fitnet=0.3"):
        wanted_ratios(cfg, None, {})


def test_the_table_by_hand(distiller_config):
    cfg = distiller_config("retinanet")
    found = {"box": Found(0.02, 10.0, 40.0, {"p3": 20.0}), "attention": Found(0.5, 1.0, 2.0, {})}
    wanted = {"box": 0.3, "attention": 0.7}

    def rows():
        lines = ratio_table(build_method(cfg), wanted, found).splitlines()
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])]

    # 0.001 is a twentieth of the weight that has the ratio 0.3.
    assert rows()[1] == ["box", "0.001", "0.015", "0.01 to 0.04", "p3 0.02", "0.3", "0.02"]
    assert len(rows()[0]) == len(rows()[2]) == 7
    cfg.GKD.BALANCE = "calibrate"
    # At the weight that was found.
    assert rows()[1:] == [["box", "0.2 to 0.8", "p3 0.4", "0.3", "0.02"], ["attention", "0.5 to 1", "", "0.7", "0.5"]]
    terms = build_method(cfg).terms.values()
    expected = "GKD: {BALANCE: calibrate, RATIOS: {GRADIENT: 0, BOX: 0.3, ATTENTION: 0.7, IMAGE: 0, RELATION: 0}}"
    assert ratios_as_yaml(terms, wanted) == expected


def test_what_can_not_be_measured(distiller_config):
    distiller = build_model(to_measure(distiller_config("retinanet"), RATIOS))
    with pytest.raises(ValueError, match="there is no batch"):
        measure_weights(distiller, [], seed=0)
    batch = training_batch()
    for image in batch:
        image["instances"] = image["instances"][:0]
    with pytest.raises(ValueError, match="in 2 batches the gradient loss had no gradient"):
        measure_weights(distiller, itertools.repeat(batch, 2), seed=0)
    # A batch without boxes among others does not count for a loss of boxes.
    measure_weights(distiller, [batch, training_batch()], seed=0)
    with torch.no_grad():
        distiller.student.backbone.fpn_output3.weight[0] = float("nan")
    with pytest.raises(ValueError, match="NaN values in the student's backbone.fpn_output3.weight"):
        measure_weights(distiller, [batch], seed=0)
