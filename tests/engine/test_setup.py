"""The start of a run: its log and its config."""

import argparse
import contextlib
import logging
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.utils.logger import setup_logger

from gkd_d2.config import add_gkd_config
from gkd_d2.engine.output import OutputError, naming_output
from gkd_d2.engine.run import YacsRun
from gkd_d2.engine.setup import set_up_run

ARGS = argparse.Namespace(config_file="", eval_only=False, resume=False)
LOGGERS = [logging.getLogger(name) for name in ("fvcore", "detectron2")]


@pytest.fixture
def cfg(tmp_path):
    """Of a run that writes to "output"; what it does to the loggers is undone."""
    # Detectron2 sets up each logger once a process.
    setup_logger.cache_clear()
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in LOGGERS]
    cfg = get_cfg()
    add_gkd_config(cfg)
    cfg.SEED = 3
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.freeze()
    yield cfg
    for logger, (handlers, propagate, level) in zip(LOGGERS, before):
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_log_and_config_are_those_of_detectron2(cfg):
    set_up_run(YacsRun(cfg), ARGS)
    logging.getLogger("gkd_d2.any").info("a line of this project")
    logging.getLogger("fvcore.any").info("a line of fvcore")
    log = Path(cfg.OUTPUT_DIR, "log.txt").read_text()
    assert "] detectron2 INFO: Environment info:\n" in log and "] gkd_d2.any INFO: a line of this project\n" in log
    assert log.count("a line of fvcore") == 1 and "\x1b" not in log
    assert Path(cfg.OUTPUT_DIR, "config.yaml").read_text() == cfg.dump() in log
    assert len(list(Path(cfg.OUTPUT_DIR).iterdir())) == 2
    # The second start appends.
    set_up_run(YacsRun(cfg), ARGS)
    assert Path(cfg.OUTPUT_DIR, "log.txt").read_text().startswith(log)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_log_that_can_not_be_written_ends_the_run_once(cfg, capfd):
    path = Path(cfg.OUTPUT_DIR, "log.txt")
    path.parent.mkdir()
    path.symlink_to("/dev/full")
    with pytest.raises(OutputError) as error:
        set_up_run(YacsRun(cfg), ARGS)
    assert str(error.value).startswith(f"{path} can't be written (No space left on device). ")
    logging.getLogger("gkd_d2.any").info("another line")
    logging.shutdown()
    assert "Logging error" not in capfd.readouterr().err


def test_a_config_that_can_not_be_written_leaves_the_one_before(cfg, tmp_path):
    path = Path(cfg.OUTPUT_DIR, "config.yaml")
    path.mkdir(parents=True)
    with pytest.raises(OutputError, match=r"output/config.yaml can't be written \(Is a directory\)"):
        set_up_run(YacsRun(cfg), ARGS)
    assert sorted(p.name for p in path.parent.iterdir()) == ["config.yaml", "log.txt"]


def test_an_evaluation_leaves_the_config_of_a_training(cfg):
    evaluation = argparse.Namespace(config_file="", eval_only=True, resume=False)
    path = Path(cfg.OUTPUT_DIR, "config.yaml")
    set_up_run(YacsRun(cfg), evaluation)
    assert path.read_text() == cfg.dump()
    path.write_text("SEED: 5\n")
    set_up_run(YacsRun(cfg), evaluation)
    assert path.read_text() == "SEED: 5\n"
    set_up_run(YacsRun(cfg), ARGS)
    assert path.read_text() == cfg.dump()


def test_a_training_that_begins_anew_sets_metrics_aside(cfg):
    """A reader would take an evaluation of the earlier run for the last one where that was longer."""
    resumed = argparse.Namespace(config_file="", eval_only=False, resume=True)
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir()

    def start(metrics, args):
        (folder / "metrics.json").write_text(metrics)
        set_up_run(YacsRun(cfg), args)
        return {path.name: path.read_text() for path in folder.glob("metrics*")}

    assert start("first", ARGS) == {"metrics.1.json": "first"}
    assert start("second", resumed) == {"metrics.1.json": "first", "metrics.2.json": "second"}
    assert "to resume: the training begins anew" in (folder / "log.txt").read_text()
    (folder / "model_0000004.pth").touch()
    assert start("third", resumed)["metrics.json"] == "third"
    evaluation = argparse.Namespace(config_file="", eval_only=True, resume=False)
    assert start("fourth", evaluation)["metrics.json"] == "fourth"


def test_only_errors_of_writing_are_named_so(tmp_path):
    folder = str(tmp_path / "output")
    for error in (FileNotFoundError(2, "No such file", "weights.pth"), RuntimeError("other"), OSError("said already")):
        with pytest.raises(type(error)) as raised, naming_output(folder):
            raise error
        assert raised.value is error
    inside = PermissionError(13, "Permission denied", f"{folder}/inference")
    denied = r"output/inference can't be written \(Permission denied\)"
    with pytest.raises(OutputError, match=denied), naming_output(folder):
        raise inside
    # It may be a checkpoint that can't be read.
    with pytest.raises(PermissionError), naming_output(folder, reads=True):
        raise inside
    # Of torch's error only the context tells.
    what, full = "a file of the evaluation", open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(OutputError, match=f"{what} can't be written"), naming_output(folder, what):
        torch.save(torch.zeros(10000), full)
    with contextlib.suppress(OSError):
        full.close()
