"""Weights proposed through the command line, for toy scenes and tiny detectors."""

import itertools

import pytest
import yaml

from gkd_d2.config import read_config
from gkd_d2.data.toy import make_toy_kitti
from gkd_d2.engine.trainer import Trainer
from gkd_d2.utils import progress
from gkd_d2.utils.random_streams import seed_everything


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

    def run(*arguments, status=0, path=path):
        ended, printed = run_here("suggest_weights.py", "--config-file", path, *arguments)
        assert ended == status, printed
        return printed

    return run


def proposed(output, node="LOSS_WEIGHTS"):
    """The weights of the config file that ends the output; warnings may follow it."""
    first, *lines = output[output.index("\nGKD:") + 1 :].splitlines()
    indented = itertools.takewhile(lambda line: line.startswith(" "), lines)
    found = yaml.safe_load("\n".join([first, *indented]))["GKD"]
    assert found["BALANCE"] == "fixed"
    return found[node]


def table(output):
    """The cells of the table's rows, by the loss."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])}


def test_proposal_is_proportional_to_what_is_asked_for(suggest):
    first = suggest("--batches", 2, "--ratio", 0.5, "--term", "box=0")
    rows = table(first)
    assert list(rows) == ["gradient", "attention", "image"]
    weights = proposed(first)
    assert weights["BOX"] == weights["RELATION"] == 0.0
    for name, (weight, median, *_, wanted, last) in rows.items():
        assert (float(last), wanted) == (weights[name.upper()], "0.5")
        # The ratio at today's weight, times what the proposal changes, is the ratio asked for.
        assert float(median) * float(last) / float(weight) == pytest.approx(0.5, rel=0.01)
    alternative = "RATIOS: {GRADIENT: 0.5, BOX: 0, ATTENTION: 0.5, IMAGE: 0.5, RELATION: 0}}"
    assert f"# Or, for each training to find its own:  GKD: {{BALANCE: calibrate, {alternative}\nGKD:\n" in first
    # Twice the ratio is twice the weight; today's weight has no part in it.
    second = suggest("--batches", 2, "--ratio", 1.0, "GKD.LOSS_WEIGHTS.IMAGE", 0.5)
    assert proposed(second)["IMAGE"] == pytest.approx(2 * weights["IMAGE"], rel=1e-3)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_weights_are_those_that_a_training_calibrates(suggest, tmp_path, bfloat16):
    """Of the same batches, while the student stays as it is."""
    cfg = read_config(str(tmp_path / "distiller.yaml"), [])
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = bfloat16, "bfloat16"
    cfg.GKD.BALANCE = "calibrate"
    cfg.GKD.RATIOS.GRADIENT, cfg.GKD.RATIOS.ATTENTION = 0.7, 0.2
    cfg.GKD.BALANCE_ITERS = cfg.SOLVER.MAX_ITER = 3
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS = 0.0, 0, ()
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.DATASETS.TEST = ()
    (tmp_path / "output").mkdir()
    seed_everything(cfg.SEED)
    Trainer(cfg).train()
    (tmp_path / "calibrated.yaml").write_text(cfg.dump())
    output = suggest("--batches", 3, path=tmp_path / "calibrated.yaml")
    expected = yaml.safe_load((tmp_path / "output" / "calibrated_weights.yaml").read_text())
    assert proposed(output) == expected["GKD"]["LOSS_WEIGHTS"]
    # The table has no weights of today.
    rows = table(output)
    assert list(rows) == ["gradient", "box", "attention", "image"] and len(rows["box"]) == 4
    assert [row[2] for row in rows.values()] == ["0.7", "1", "0.2", "0.3"]
    assert "Left out: relation, since GKD.RATIOS.RELATION is 0." in output
    assert "has no effect" not in output


def test_each_method_has_its_own_losses(suggest):
    output = suggest("--batches", 1, "--term", "background=1", "GKD.METHOD", "fgd")
    weights = proposed(output, "FGD")
    assert list(weights) == ["FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT", "ATTENTION_WEIGHT", "RELATION_WEIGHT"]
    assert all(value > 0 for value in weights.values())
    assert [row[-2] for row in table(output).values()] == ["0.1", "1", "0.1", "0.1"]


def test_a_loss_that_is_off_is_left_out(suggest):
    output = suggest("--batches", 1, "GKD.LOSS_WEIGHTS.IMAGE", 0.0)
    assert list(table(output)) == ["gradient", "box"]
    assert "Left out: image, since GKD.LOSS_WEIGHTS.IMAGE is 0. Measure it by --term image=0.3" in output
    # On by its weight, which is not 0.
    assert "Left out: attention, since GKD.RATIOS.ATTENTION is 0. Measure it by --term attention=0.3" in output
    assert proposed(output)["ATTENTION"] == proposed(output)["IMAGE"] == 0


def test_a_loss_that_is_off_is_measured_where_it_is_named(suggest):
    off = [f"GKD.LOSS_WEIGHTS.{name}" for name in ("GRADIENT", "BOX", "ATTENTION", "IMAGE")]
    named = ("--term", "attention=0.1", "--term", "relation=0.2")
    output = suggest("--batches", 1, *named, *(argument for key in off for argument in (key, 0.0)))
    assert list(table(output)) == ["attention", "relation"]
    assert [name for name, weight in proposed(output).items() if weight > 0] == ["ATTENTION", "RELATION"]
    said = suggest("--batches", 1, *(argument for key in off for argument in (key, 0.0)), status=1)
    assert "all losses of gkd are off, or their ratios 0: name some by --term gradient=0.3" in said


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
        (["GKD.METHOD", "none"], "the method none has no loss to weigh"),
    ],
)
def test_bad_input(arguments, message, suggest):
    assert message in suggest("--batches", 2, *arguments, status=1)


@pytest.mark.parametrize("arguments", [("--ratio=-1",), ("--term", "gradient=-1")])
def test_bad_ratio(arguments, suggest):
    assert "'-1' must be a finite number >= 0" in suggest(*arguments, status=2)
