"""A run of calibrated weights through all tools that read a distiller's config or folder."""

import pytest
import yaml
from short_runs import metrics

from gkd_d2.config import read_config
from gkd_d2.methods import build_method


@pytest.fixture
def write_config(distiller_config, toy_scenes, tmp_path):
    cfg = distiller_config("retinanet", channels=8)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy_kitti_train",), ("toy_kitti_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 1, 4, ()
    cfg.SOLVER.WARMUP_ITERS, cfg.GKD.BALANCE_ITERS = 1, 2
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    path = tmp_path / "distiller.yaml"
    path.write_text(cfg.dump())
    return path


# Ratios of fgd and of what it shares with gkd.
FGD = "foreground 0.1, background 0.1, fgd_attention 0.1, fgd_relation 0.1"


@pytest.mark.parametrize(
    ("methods", "relation", "said"),
    [
        (["gkd"], "relation", "gkd, weights calibrated to the ratios gradient 0.3, box 0.6, image 0.3, relation 0.2 ("),
        (
            ["gkd", "fgd"],
            "gkd_relation",
            f"gkd + fgd, weights calibrated to the ratios gradient 0.3, box 0.6, image 0.3, gkd_relation 0.2, {FGD} (",
        ),
    ],
)
def test_every_tool_reads_it(methods, relation, said, write_config, run_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def tool(name, *arguments):
        status, printed = run_here(name, *arguments)
        assert status == 0, printed
        return printed

    options = ["GKD.METHODS", str(methods), "GKD.BALANCE", "calibrate"]
    options += ["GKD.RATIOS.BOX", "0.6", f"GKD.RATIOS.{relation}", "0.2"]
    printed = tool("train_net.py", "--config-file", write_config, *options)
    assert said in printed
    run = tmp_path / "run"
    # What it found are the weights of a config without calibration.
    fixed = tmp_path / "fixed.yaml"
    fixed.write_text(f"_BASE_: run/config.yaml\n{(run / 'calibrated_weights.yaml').read_text()}")
    method = build_method(read_config(str(fixed), []))
    last = metrics(run)[2]
    for term in method.terms.values():
        # Of the last iteration that is measured.
        assert term.weight == pytest.approx(last.get(f"gkd_weight/{term.name}", 0), rel=1e-3)
    assert not method.by_ratio and method.terms["loss_bmfi_relation"].weight > 0
    assert yaml.safe_load((run / "config.yaml").read_text())["GKD"]["RATIOS"] == {"BOX": 0.6, relation: 0.2}

    config, weights = run / "config.yaml", ("MODEL.WEIGHTS", run / "model_final.pth")
    assert "copypaste: " in tool("train_net.py", "--config-file", config, "--eval-only", *weights)
    tool("visualize_gkd.py", "--config-file", config, "--count", 1, "--output", "pictures", *weights)
    report = ("--importance-report", "--count", 1, "--output", "importance")
    tool("visualize_gkd.py", "--config-file", config, *report, *weights)
    assert (tmp_path / "pictures" / "index.html").exists() and (tmp_path / "importance" / "importance.md").exists()
    measured = tool("suggest_weights.py", "--config-file", config, "--batches", 1, *weights)
    assert "RATIOS: {GRADIENT: 0.3, BOX: 0.6, " in measured and f"IMAGE: 0.3, {relation.upper()}: 0.2" in measured
    options = ("--input-size", 64, 96, "--repeats", 1, "--images", 1, "--device", "cpu")
    assert "| run " in tool("compare_runs.py", run, "--output", "compared", *options)
    tool("export_student.py", "--weights", run, "--output", "exported")
    assert (tmp_path / "exported" / "model.pth").exists()
