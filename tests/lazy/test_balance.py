"""Calibrated weights of a LazyConfig."""

import logging

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.solver import WarmupParamScheduler
from documents import fenced_blocks
from fvcore.common.param_scheduler import ConstantParamScheduler
from lazy_configs import write_distilled
from omegaconf import OmegaConf
from short_runs import metrics

from gkd_d2.engine.preflight import PreflightError, check_inputs
from gkd_d2.lazy.names import in_lazy_words, speaking_lazily
from gkd_d2.lazy.run import LazyRun
from gkd_d2.lazy.trainer import LazyTrainer, _balance_start, settle_lazy_seed


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    options = 'balance="calibrate", ratios=dict(box=0.5, image=0)'
    return write_distilled(tmp_path_factory.mktemp("balance"), options=options)


@pytest.fixture
def train(read, config, tmp_path):
    """Train the config with overrides, below a folder of this name; returns the folder."""

    def run(name, *overrides):
        cfg = read(
            config, f"train.output_dir={tmp_path / name}", "train.eval_period=0", "train.log_period=1", *overrides
        )
        (tmp_path / name).mkdir()
        settle_lazy_seed(cfg, resume=False)
        torch.manual_seed(cfg.train.seed)
        del cfg.dataloader.evaluator
        with speaking_lazily():
            trainer = LazyTrainer(cfg)
            trainer.resume_or_load(resume=False)
            trainer.train()
        return tmp_path / name

    return run


def test_ratios_reach_the_method(read, config):
    cfg = read(config, "model.ratios.box=0.25", "model.ratios.gradient=1", "model.ratios.RELATION=0.75")
    for method in (LazyRun(cfg).method(), instantiate(cfg.model).method):
        assert method.by_ratio
        ratios = {term.name: term.ratio for term in method.terms.values()}
        assert (ratios["box"], ratios["gradient"], ratios["relation"], ratios["image"]) == (0.25, 1, 0.75, 0)
        assert [term.weight for term in method.terms.values()] == [1, 1, 0, 0, 1]
    fixed = LazyRun(read(config, "model.balance=fixed")).method()
    assert not fixed.by_ratio and fixed.weights.box == 1e-2


def test_a_run_calibrates_after_the_warm_up_and_its_weights_can_be_fixed(train, read, config, project, caplog):
    caplog.set_level(logging.INFO, logger="gkd_d2")
    folder = train("calibrated", "train.balance.iters=2", "model.method.weights.box=0.5")
    rows = metrics(folder)
    # The warm-up is half of the six iterations.
    measured = [iteration for iteration, row in rows.items() if "gkd_weight/box" in row]
    assert min(measured) == 3
    text = caplog.text
    assert "The weights of the losses are calibrated in iterations 3 to 4" in text
    assert (
        "model.method.weights.box is 0.5, which has no effect under model.balance calibrate: set model.ratios.box, "
        "which is 0.5, instead"
    ) in text
    assert f"{folder}/calibrated_weights.yaml holds them for model.balance fixed" in text
    found = OmegaConf.load(folder / "calibrated_weights.yaml")
    assert list(found) == ["model"] and list(found.model) == ["balance", "method"]
    assert set(found.model.method) == {"weights", "relation"}
    final = rows[max(measured)]
    fixed = OmegaConf.merge(read(config), found)
    weights = {term.name: term.weight for term in LazyRun(fixed).method().terms.values()}
    assert weights["image"] == weights["relation"] == weights["attention"] == 0
    for name in ("gradient", "box"):
        assert weights[name] == pytest.approx(final[f"gkd_weight/{name}"], rel=1e-3) and weights[name] > 0
    # As docs/lazy.md has it.
    again = config.with_name("again.py")
    lines = fenced_blocks(project / "docs" / "lazy.md")[2].text.replace("output/my_distilled", str(folder))
    again.write_text(f"{config.read_text()}\n{lines}")
    method = instantiate(read(again).model).method
    assert not method.by_ratio and {term.name: term.weight for term in method.terms.values()} == weights


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        ((), 3),
        (("train.balance.start=1",), 1),
        (("train.balance.start=0",), 0),
        (("train.max_iter=11",), 6),
        (("model.init_from_teacher=True",), 0),
        (("model.init_from_teacher=True", "train.balance.start=1"), 1),
    ],
)
def test_the_start_follows_the_warm_up(overrides, start, read, config):
    assert _balance_start(read(config, *overrides)) == start


def test_the_start_without_a_warm_up(read, config):
    cfg = read(config)
    cfg.lr_multiplier = LazyCall(ConstantParamScheduler)(value=1.0)
    assert _balance_start(cfg) == 0
    # By its name, as where a config was written to a file.
    cfg.lr_multiplier = {"_target_": "detectron2.solver.lr_scheduler.WarmupParamScheduler", "warmup_length": 0.25}
    assert f"{WarmupParamScheduler.__module__}.WarmupParamScheduler" == cfg.lr_multiplier._target_
    assert _balance_start(cfg) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.balance=calibrat"], "model.balance is 'calibrat', but must be one of calibrate, fixed"),
        (
            ["model.ratios.bx=1"],
            "model.ratios.bx is set, but no loss has this name: the losses are gradient, box, attention, image, "
            "relation: did you mean box?",
        ),
        (["model.ratios.box=-1"], "model.ratios.box is -1, but must be a finite number >= 0"),
        (["model.ratios.box=high"], "model.ratios.box is 'high', but must be a finite number >= 0"),
        (["model.ratios=null"], "model.ratios is None, but must be a group of ratios"),
        (["model.ratios=3"], "model.ratios is 3, but must be a group of ratios"),
        (["model.ratios.BOX=1"], "model.ratios has BOX twice, in capitals and in small letters"),
    ],
)
def test_mistakes_are_found_before_the_run(overrides, message, read, config):
    with pytest.raises(PreflightError) as error:
        check_inputs(LazyRun(read(config, *overrides)), eval_only=False, resume=False)
    assert message in in_lazy_words(str(error.value))


def test_a_ratio_without_effect_is_named(train, caplog):
    train("fixed", "model.balance=fixed", "train.max_iter=1")
    assert (
        "model.ratios.box is 0.5, which has no effect under model.balance fixed: set model.method.weights.box, which "
        "is 0.01, instead, or model.balance to calibrate"
    ) in caplog.text
