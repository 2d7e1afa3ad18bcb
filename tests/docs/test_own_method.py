"""The methods of docs/own_method.md, as they stand there, chosen by the config that stands there."""

import sys

import numpy as np
import pytest
import torch
import yaml
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from documents import fenced_blocks
from levels import random_level
from tiny import ARCHITECTURES, train, training_batch

from gkd_d2.analysis.gradient_ratios import to_measure
from gkd_d2.analysis.runs import Run
from gkd_d2.config import read_config
from gkd_d2.losses import box_context_mask
from gkd_d2.methods import METHOD_REGISTRY, build_method
from gkd_d2.modeling.measure import Measurement

MODULE = "cosine_method"
SCORES = "scores_method"
OTHER = "regression_method"


@pytest.fixture
def student(project, distiller_config, tmp_path, monkeypatch):
    """A function that writes the document's modules and a student's config with its keys, and returns the file."""
    monkeypatch.setattr(METHOD_REGISTRY, "_obj_map", dict(METHOD_REGISTRY._obj_map))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    code, config, scores, other = fenced_blocks(project / "docs" / "own_method.md")
    assert [block.language for block in (code, config, scores, other)] == ["python", "yaml", "python", "python"]
    for name, block in ((MODULE, code), (SCORES, scores), (OTHER, other)):
        (tmp_path / f"{name}.py").write_text(block.text)
        monkeypatch.delitem(sys.modules, name, raising=False)

    def write(kind="retinanet", **gkd):
        keys = yaml.safe_load(distiller_config(kind, channels=8).dump())
        keys["GKD"] |= yaml.safe_load(config.text)["GKD"] | gkd
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(keys))
        return str(tmp_path / "config.yaml")

    yield write
    for name in (MODULE, SCORES, OTHER):
        sys.modules.pop(name, None)


def test_it_is_as_short_as_promised(project):
    code, _, *others = fenced_blocks(project / "docs" / "own_method.md")
    assert all(sum(bool(line.strip()) for line in block.text.splitlines()) <= 30 for block in (code, *others))


def test_its_losses_equal_an_independent_computation(student):
    method = build_method(read_config(student(), []))
    assert [term.weight for term in method.terms.values()] == [2.0, 0.5]
    level = random_level()
    s, t = level.student.detach().numpy(), level.teacher.numpy()
    distance = 1 - (s * t).sum(axis=1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1)
    mask = box_context_mask(level.boxes, level.image_size, (11, 19), dtype=torch.float64).numpy()
    losses = method([level])
    assert losses["loss_cosine"].item() == pytest.approx(2 * distance.mean())
    assert losses["loss_cosine_objects"].item() == pytest.approx(0.5 * (mask * distance).sum() / 3)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_it_trains(kind, student):
    cfg = read_config(student(kind), ["SOLVER.BASE_LR", "0.02"])
    distiller = build_model(cfg).train()
    measurement = Measurement()
    distiller.listen(measurement)
    measurement.ask(0)
    optimizer = build_optimizer(cfg, distiller)
    batch = training_batch(((90, 120), (96, 100), (64, 64)))
    history = []
    with EventStorage() as storage:
        for _ in range(20):
            losses = distiller(batch)
            optimizer.zero_grad()
            imitation = {key: losses[key] for key in ("loss_cosine", "loss_cosine_objects")}
            # Of these alone, which a head that learns to detect would disturb.
            sum(imitation.values()).backward()
            optimizer.step()
            storage.step()
            history.append({key: loss.item() for key, loss in imitation.items()})
    for key in history[0]:
        assert 0 < history[-1][key] < 0.8 * history[0][key], key
    scalars = measurement.report.scalars()
    assert scalars["gkd_ratio/cosine"] > 0 and scalars["gkd_ratio/cosine_objects/p3"] > 0


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_one_of_predictions_runs_beside_another(kind, student):
    path = student(kind, IMPORTS=[SCORES], METHOD="gkd", METHODS=["gkd", "scores"])
    distiller = build_model(read_config(path, [])).train()
    measurement = Measurement()
    distiller.listen(measurement)
    measurement.ask(0)
    with EventStorage():
        losses = distiller(training_batch(((90, 120), (96, 100), (64, 64))))
    values = [value for (name, _), value in measurement.report.values.items() if name == "scores"]
    assert losses["loss_scores"] > 0 and losses["loss_scores"].item() == pytest.approx(sum(values), rel=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_its_parameters_train(kind, student):
    """Of the second method: the same names and random values as in another build, and all of them move."""
    options = {"IMPORTS": [OTHER], "METHOD": "regression", "METHOD_OPTIONS": {"WEIGHT": 0.5}}
    cfg = read_config(student(kind, **options), ["SOLVER.BASE_LR", "0.02"])
    distiller, before = build_model(cfg), build_model(cfg).method.state_dict()
    assert before.keys() == {f"layers.{level}.{p}" for level in distiller.student_features for p in ("weight", "bias")}
    assert all(torch.equal(value, before[name]) for name, value in distiller.method.state_dict().items())
    history = train(distiller, cfg, training_batch(((90, 120), (96, 100), (64, 64))), 20)
    assert 0 < history[-1]["loss_regression"] < 0.8 * history[0]["loss_regression"]
    saved = {name: value for name, value in distiller.state_dict().items() if name.startswith("method.")}
    assert saved.keys() == {f"method.{name}" for name in before}
    assert not any(torch.equal(value, saved[f"method.{name}"]) for name, value in before.items())


def test_tools_read_its_config(student, tmp_path):
    """Options on the command line, the config of a finished run, and the weights that are measured."""
    path = student()
    cfg = read_config(path, ["GKD.METHOD_OPTIONS.WEIGHT", "0.25"])
    assert build_method(cfg).terms["loss_cosine"].weight == 0.25
    assert Run("run", tmp_path).config.GKD.METHOD_OPTIONS == {"WEIGHT": 2.0, "OBJECT_WEIGHT": 0.5}
    cfg.GKD.METHOD_OPTIONS.pop("WEIGHT")
    method = build_method(to_measure(cfg, {"cosine": 0.5, "cosine_objects": 0.0}))
    assert [(term.weight, term.ratio) for term in method.terms.values()] == [(1.0, 0.5), (0.0, 0.0)]


def test_without_boxes_its_loss_of_objects_is_0(student):
    method = build_method(read_config(student(), []))
    level = random_level()
    level.boxes[:] = [torch.zeros(0, 4)] * 3
    assert method([level])["loss_cosine_objects"] == 0
