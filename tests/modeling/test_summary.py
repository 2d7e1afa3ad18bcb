"""What a run says it distils."""

import logging
import os
import subprocess
import sys

import pytest
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny import calm, training_batch

from gkd_d2.losses import fused


def summary(cfg, caplog, steps=1):
    """The lines that a training logs at its beginning."""
    distiller = build_model(cfg).train()
    calm(distiller.student)
    with EventStorage(), caplog.at_level(logging.INFO, logger="gkd_d2"):
        for _ in range(steps):
            distiller(training_batch())
    (text,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Training a student")]
    return text.splitlines()


def test_five_lines(distiller_config, caplog):
    cfg = distiller_config("faster", channels=8)
    cfg.GKD.LOSS_WEIGHTS.ATTENTION = 0.0
    cfg.GKD.WARMUP_ITERS = 500
    cfg.GKD.FEATURES = ["p3", "p4"]
    assert summary(cfg, caplog, steps=2) == [
        "Training a student GeneralizedRCNN with a teacher GeneralizedRCNN:",
        "  method:  gkd, weights gradient 0.002, box 0.001, image 0.001 (off: attention, relation); weighting "
        "gradient, maps in the boxes, importance channel; weights ramp up over 500 iterations",
        "  levels:  p3 (8 to 16 channels, aligned), p4 (8 to 16 channels, aligned)",
        "  losses:  computed by the compiled extension, on cpu",
        "  heads:   not inherited from the teacher (GKD.STUDENT.INIT_FROM_TEACHER is False)",
        f"  teacher: {cfg.GKD.TEACHER.WEIGHTS}, described by {cfg.GKD.TEACHER.CONFIG_FILE}",
    ]


@pytest.mark.parametrize(
    ("options", "line", "text"),
    [
        (("GKD.IMPLEMENTATION", "reference"), 3, "PyTorch (GKD.IMPLEMENTATION is reference)"),
        (
            (
                "GKD.IMPORTANCE",
                "norm",
                "GKD.IMPORTANCE_FLOOR",
                0.5,
                "GKD.IMPORTANCE_CAP",
                5.0,
                "GKD.MAP_REGION",
                "image",
            ),
            1,
            "; weighting gradient, maps over the image, importance norm, floor 0.5, cap 5",
        ),
        (
            ("GKD.IMPORTANCE", "norm", "GKD.IMPORTANCE_FLOOR", 0.5),
            3,
            "PyTorch, which is slower: the extension does not support importance 'norm', importance_floor 0.5",
        ),
        (("GKD.METHOD", "fitnet"), 1, "fitnet, weights fitnet 1"),
        (("GKD.METHOD", "fitnet"), 3, "computed by PyTorch"),
        # One channel becomes half of them, at least one: 16 + 8 * 17 + 16 + 16 * 9 parameters for each network.
        (
            ("GKD.METHOD", "fgd", "GKD.FEATURES", ["p3"]),
            1,
            "attention 5e-05, relation 5e-07; trains 624 parameters of its own",
        ),
        (("GKD.METHOD", "none"), 1, "none, without a loss of a weight above 0: the student learns from the ground"),
        (("GKD.STUDENT.INIT_FROM_TEACHER", True), 4, "inherited from the teacher: proposal_generator, roi_heads.box"),
    ],
)
def test_other_choices(options, line, text, distiller_config, caplog):
    cfg = distiller_config()
    cfg.merge_from_list(list(options))
    assert text in summary(cfg, caplog)[line]


def warnings(cfg, caplog):
    """What a training warns of at its beginning, beside that nothing watches it."""
    distiller = build_model(cfg).train()
    distiller.listeners = []
    distiller.factors = dict.fromkeys(distiller.method.active().values(), 1.0)
    with EventStorage(), caplog.at_level(logging.WARNING, logger="gkd_d2"):
        for _ in range(2):
            distiller(training_batch())
    return [record.getMessage() for record in caplog.records]


def test_weights_that_have_no_effect_are_named_once(distiller_config, caplog):
    cfg = distiller_config()
    cfg.GKD.BALANCE = "calibrate"
    cfg.GKD.RATIOS.IMAGE = 0
    # As by default; off either way; and on by a weight alone.
    weights = cfg.GKD.LOSS_WEIGHTS
    weights.GRADIENT, weights.BOX, weights.IMAGE, weights.ATTENTION = 2e-3, 0.02, 0.0, 1e-4
    cfg.GKD.METHOD_OPTIONS.WEIGHT = 3
    ending = "which has no effect under GKD.BALANCE calibrate: set GKD.RATIOS."
    assert warnings(cfg, caplog) == [
        f"GKD.LOSS_WEIGHTS.BOX is 0.02, {ending}BOX, which is 1, instead",
        f"GKD.LOSS_WEIGHTS.ATTENTION is 0.0001, {ending}ATTENTION, which is 0, instead",
    ]


def test_ratios_that_have_no_effect_are_named_once(distiller_config, caplog):
    cfg = distiller_config()
    cfg.GKD.RATIOS.box, cfg.GKD.RATIOS.BOY = 0.5, "much"
    ending = "which has no effect under GKD.BALANCE fixed: set"
    assert warnings(cfg, caplog) == [
        f"GKD.RATIOS.BOX is 0.5, {ending} GKD.LOSS_WEIGHTS.BOX, which is 0.001, instead, or GKD.BALANCE to calibrate",
        f"GKD.RATIOS.BOY is much, {ending} GKD.BALANCE to calibrate",
    ]


@pytest.mark.parametrize("method", ["gkd", "fgd", "none"])
def test_defaults_are_not_named(method, distiller_config, caplog):
    cfg = distiller_config()
    cfg.GKD.METHOD, cfg.GKD.BALANCE = method, "calibrate"
    weights = cfg.GKD.LOSS_WEIGHTS
    weights.GRADIENT, weights.BOX, weights.IMAGE, weights.ATTENTION = 2e-3, 1e-2, 1e-3, 0.0
    assert warnings(cfg, caplog) == []


def test_only_the_main_process_warns(distiller_config, caplog, monkeypatch):
    monkeypatch.setattr("gkd_d2.modeling.summary.comm.is_main_process", lambda: False)
    cfg = distiller_config()
    cfg.GKD.RATIOS.BOX = 0.5
    assert warnings(cfg, caplog) == []


def test_missing_extension_is_the_reason(distiller_config, caplog, monkeypatch):
    monkeypatch.setattr(fused, "_load_error", "the extension gkd_d2._C is not built: build it")
    assert summary(distiller_config(), caplog)[3].endswith(
        "computed by PyTorch, which is slower: the extension gkd_d2._C is not built: build it"
    )


USER_SCRIPT = """
import sys
from detectron2.engine import default_setup
from detectron2.config import get_cfg
import gkd_d2, logging
cfg = get_cfg()
cfg.OUTPUT_DIR = sys.argv[1]
default_setup(cfg, None)
logging.getLogger("gkd_d2.modeling.distiller").info("a message of the package")
"""


def python(*arguments) -> subprocess.CompletedProcess:
    """Run Python with its warnings on."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    done = subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_messages_appear_where_detectron2s_do(tmp_path):
    """In a user's own script, which knows Detectron2's set-up alone."""
    done = python("-c", USER_SCRIPT, tmp_path)
    assert done.stdout.count("gkd_d2.modeling.distiller]: a message of the package") == 1
    assert "gkd_d2.modeling.distiller INFO: a message of the package" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("tool", ["compare_runs.py", "train_net.py"])
def test_no_warning_comes_before_a_tools_output(tool, project):
    assert python(project / "tools" / tool, "--help").stderr == ""
