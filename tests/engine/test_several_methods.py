"""Short real trainings by several methods at once."""

import logging
from pathlib import Path

import pytest
import torch
import yaml
from short_runs import metrics, train

from gkd_d2.engine.hooks import DeadLossError
from gkd_d2.engine.resume import ResumeError
from gkd_d2.engine.trainer import Trainer
from gkd_d2.methods import FGD, Several, build_method


@pytest.fixture
def several(training):
    """A function that makes the config of a short training by gkd and fgd, with the relation blocks of both."""

    def make(*, iterations, balance="fixed", **options):
        cfg = training("retinanet", iterations=iterations, channels=8, **options)
        cfg.GKD.METHODS = ["gkd", "fgd"]
        cfg.GKD.LOSS_WEIGHTS.RELATION = 1e-5
        cfg.GKD.BALANCE, cfg.GKD.BALANCE_ITERS = balance, 3
        if balance == "calibrate":
            cfg.GKD.RATIOS.GKD_RELATION = 0.2
        cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.GKD.WATCH_PERIOD = 0, 2, 2
        return cfg

    return make


def resume(cfg, checkpoint):
    (Path(cfg.OUTPUT_DIR) / "last_checkpoint").write_text(checkpoint)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    return trainer


def final(cfg):
    state = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)
    return state["model"], state["trainer"]["hooks"].get("Calibration")


@pytest.mark.parametrize("balance", ["fixed", "calibrate"])
def test_a_resumed_run_ends_bit_for_bit_as_a_whole_one(balance, several):
    """In the middle of the calibration, too; both methods' blocks have trained."""
    cfg = several(iterations=6, balance=balance)
    before = {key: value.clone() for key, value in Trainer(cfg).model.method.state_dict().items()}
    train(cfg)
    model, calibration = final(cfg)
    moved = {key for key, value in before.items() if not torch.equal(value, model[f"method.{key}"])}
    assert {key.split(".")[0] for key in moved} == {"gkd", "fgd"}
    again = resume(cfg, "model_0000001.pth")
    assert again.start_iter == 2
    again.train()
    other, other_calibration = final(cfg)
    assert model.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in model.items())
    assert calibration == other_calibration and (calibration is None) == (balance == "fixed")


def test_calibrated_weights_are_those_of_each_methods_keys(several):
    cfg = several(iterations=4, balance="calibrate")
    trainer = train(cfg)
    written = yaml.safe_load((Path(cfg.OUTPUT_DIR) / "calibrated_weights.yaml").read_text())
    assert list(written["GKD"]) == ["BALANCE", "LOSS_WEIGHTS", "FGD"]
    assert {key.removesuffix("_WEIGHT") for key in written["GKD"]["FGD"]} == {
        *("FOREGROUND", "BACKGROUND", "ATTENTION", "RELATION")
    }
    factors = trainer.model.factors
    assert factors.keys() == {
        *("gradient", "box", "image", "gkd_relation"),
        *("foreground", "background", "fgd_attention", "fgd_relation"),
    }
    # A config with them has them as its weights.
    fixed = cfg.clone()
    for node, values in written["GKD"].items():
        if node != "BALANCE":
            fixed.GKD[node].merge_from_other_cfg(type(cfg)(values))
    fixed.GKD.BALANCE = "fixed"
    for term in build_method(fixed).terms.values():
        assert term.weight == pytest.approx(factors.get(term.name, 0.0), rel=1e-3)


def test_the_watch_tells_them_apart(several):
    cfg = several(iterations=2)
    trainer = train(cfg)
    row = metrics(cfg.OUTPUT_DIR)[1]
    for name in trainer.model.method.active().values():
        # An object may cover a level of few cells.
        assert row[f"gkd_ratio/{name}"] > 0 or name == "background"
        assert {f"gkd_value/{name}/{level}" for level in ("p3", "p4")} <= row.keys()
    assert row["gkd_ratio/gkd_attention"] != row["gkd_ratio/fgd_attention"]
    assert not {"gkd_ratio/attention", "gkd_ratio/relation"} & row.keys()


def test_a_dead_loss_names_the_key_of_its_method(several, monkeypatch):
    monkeypatch.setattr(FGD, "level_losses", lambda self, level: {key: 0 * level.student.sum() for key in self.terms})
    cfg = several(iterations=4)
    cfg.GKD.WATCH_PATIENCE = 2
    cfg.GKD.FGD.RELATION_WEIGHT = 0.0
    with pytest.raises(
        DeadLossError, match=r"the gradient of the \w+ loss \(GKD.FGD.FOREGROUND_WEIGHT\) at the student"
    ):
        train(cfg)


def test_a_run_goes_on_with_another_method_beside_the_first(several, caplog):
    """Where the first has no parameters, which would stand under another name; a warning says so."""
    cfg = several(iterations=4)
    cfg.GKD.METHODS, cfg.GKD.LOSS_WEIGHTS.RELATION = [], 0.0
    train(cfg)
    cfg.GKD.METHODS = ["gkd", "fitnet"]
    caplog.set_level(logging.INFO, logger="gkd_d2")
    again = resume(cfg, "model_0000001.pth")
    assert "GKD.METHODS was [] and is ['gkd', 'fitnet']" in caplog.text
    again.train()
    assert type(again.model.method) is Several and again.iter == 4


def test_what_can_not_be_resumed(several):
    cfg = several(iterations=2)
    cfg.GKD.METHODS = []
    train(cfg)
    cfg.GKD.METHODS = ["gkd", "fgd"]
    message = r"can't be resumed, because the model or its trainable .*: GKD.METHODS was \[\] and is \['gkd', 'fgd'\]"
    with pytest.raises(ResumeError, match=message):
        resume(cfg, "model_final.pth")
