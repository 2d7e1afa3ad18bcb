"""Weights proposed through the command line, for toy scenes and tiny detectors."""

import itertools

import pytest
import yaml

from gkd_d2.data.toy import make_toy_kitti
from gkd_d2.utils import progress


@pytest.fixture
def suggest(run_here, distiller_config, monkeypatch, tmp_path):
    """Run tools/suggest_weights.py on the config of a tiny distiller; returns what it printed."""
    make_toy_kitti(tmp_path / "datasets" / "toy_kitti", 4, 2, 0)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    cfg = distiller_config("faster", channels=8)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy_kitti_train",), ("toy_kitti_val",)
    cfg.INPUT.MIN_SIZE_TRAIN = (100,)
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    path = tmp_path / "distiller.yaml"
    path.write_text(cfg.dump())

    def run(*arguments, status=0):
        ended, printed = run_here("suggest_weights.py", "--config-file", path, *arguments)
        assert ended == status, printed
        return printed

    return run


def proposed(output, node="LOSS_WEIGHTS"):
    """The weights of the config file that ends the output; warnings may follow it."""
    first, *lines = output[output.index("GKD:") :].splitlines()
    indented = itertools.takewhile(lambda line: line.startswith(" "), lines)
    return yaml.safe_load("\n".join([first, *indented]))["GKD"][node]


def test_proposal_is_proportional_to_what_is_asked_for(suggest):
    first = suggest("--batches", 2, "--ratio", 0.5, "--term", "box=0")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == ["gradient", "box", "attention", "image"]
    weights = proposed(first)
    assert weights["BOX"] == 0.0
    for term, weight, median, *_, last in rows[2:]:
        assert float(last) == weights[term.upper()]
        if term != "box":
            # The ratio at today's weight, times what the proposal changes, is the ratio asked for.
            assert float(median) * float(last) / float(weight) == pytest.approx(0.5, rel=0.06)
    # Twice the ratio is twice the weight; today's weight has no part in it.
    second = suggest("--batches", 2, "--ratio", 1.0, "GKD.LOSS_WEIGHTS.IMAGE", 0.5)
    assert proposed(second)["IMAGE"] == pytest.approx(2 * weights["IMAGE"], rel=0.06)


def test_each_method_has_its_own_losses(suggest):
    output = suggest("--batches", 1, "--term", "background=1", "GKD.METHOD", "fgd")
    weights = proposed(output, "FGD")
    assert list(weights) == ["FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT", "ATTENTION_WEIGHT", "RELATION_WEIGHT"]
    assert all(value > 0 for value in weights.values())
    assert "For foreground 0.5, background 1, attention 0.5, relation 0.5:" in output


def test_a_loss_that_is_off_is_left_out(suggest):
    output = suggest("--batches", 1, "GKD.LOSS_WEIGHTS.ATTENTION", 0.0)
    assert list(proposed(output)) == ["GRADIENT", "BOX", "IMAGE"]
    assert "| attention" not in output and "For gradient 0.5, box 0.5, image 0.5:" in output
    assert (
        "Left out: attention, whose weight GKD.LOSS_WEIGHTS.ATTENTION is 0. Measure it by --term attention=" in output
    )


def test_a_loss_that_is_off_is_measured_where_it_is_named(suggest):
    off = [f"GKD.LOSS_WEIGHTS.{name}" for name in ("GRADIENT", "BOX", "ATTENTION", "IMAGE")]
    named = ("--term", "attention=0.1", "--term", "relation=0.2")
    output = suggest("--batches", 1, *named, *(argument for key in off for argument in (key, 0.0)))
    assert list(proposed(output)) == ["ATTENTION", "RELATION"] and min(proposed(output).values()) > 0
    said = suggest("--batches", 1, *(argument for key in off for argument in (key, 0.0)), status=1)
    assert "all weights of GKD.METHOD gkd are 0: name losses by --term gradient=0.5" in said


def test_progress_is_shown(suggest, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0)
    assert "batches: 1 of 2, " in suggest("--batches", 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "is no config of a GKDDistiller"),
        (["GKD.TEACHER.WEIGHTS", "nowhere.pth"], "GKD.TEACHER.WEIGHTS is nowhere.pth: there is no such file"),
        (["DATALOADER.NUM_WORKERS"], "the config key DATALOADER.NUM_WORKERS has no value: give pairs KEY VALUE"),
        (["--term", "fgd=1"], "--term names fgd, but the method's losses are gradient, box, attention, image, rel"),
        (["GKD.METHOD", "none"], "GKD.METHOD is none, which has no loss to weigh"),
    ],
)
def test_bad_input(arguments, message, suggest):
    assert message in suggest("--batches", 2, *arguments, status=1)


@pytest.mark.parametrize("arguments", [("--ratio=-1",), ("--term", "gradient=-1")])
def test_bad_ratio(arguments, suggest):
    assert "'-1' must be a finite number >= 0" in suggest(*arguments, status=2)
