"""The benchmark of a step through the command line, with tiny detectors."""

import json

import pytest
import torch
from PIL import Image

PHASES = {
    "teacher forward",
    "teacher gradient",
    "student forward",
    "heads' gradient",
    "distillation losses",
    "backward",
    "optimizer",
}


@pytest.fixture
def benchmark(run_here, monkeypatch, tmp_path):
    """Run tools/benchmark_step.py on the config of ``cfg``; returns its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(cfg, *arguments):
        (tmp_path / "distiller.yaml").write_text(cfg.dump())
        options = ["--config-file", "distiller.yaml", "--batch", 1, "--size", 64, 96, "--rounds", 1, "--warm-up", 1]
        return run_here("benchmark_step.py", *options, "--json", "step.json", "--plot", "step.png", *arguments)

    return run


def test_phases_ratio_and_memory(benchmark, distiller_config, tmp_path):
    cfg = distiller_config("faster", channels=8)
    names = ["default", "measured", "two passes", "half the proposals", "channels_last", "bfloat16"]
    status, printed = benchmark(cfg, *(argument for name in names for argument in ("--setting", name)))
    assert status == 0, printed
    result = json.loads((tmp_path / "step.json").read_text())
    teacher = torch.load(tmp_path / "teacher.pth")["model"].values()
    # p2 to p5 of 64 x 96 pixels, 16 channels, 4 bytes.
    features = 16 * 4 * (16 * 24 + 8 * 12 + 4 * 6 + 2 * 3)
    assert set(result["settings"]) == set(names)
    for name, setting in result["settings"].items():
        phases = setting["phases_ms"]
        assert set(phases["distilled"]) == PHASES
        assert set(phases["plain"]) == {"student forward", "backward", "optimizer"}
        assert set(phases["teacher"]) == {"teacher forward"}
        for kind, times in phases.items():
            assert min(times.values()) > 0
            assert sum(times.values()) == pytest.approx(setting[f"{kind}_ms"])
        unavoidable = setting["plain_ms"] + setting["teacher_ms"]
        assert setting["ratio"] == pytest.approx(setting["distilled_ms"] / unavoidable)
        memory = setting["memory"]
        # Anchors are buffers too, but in no checkpoint.
        weights = pytest.approx(sum(value.nbytes for value in teacher) / 1e6, rel=1e-3)
        assert memory["teacher_weights_megabytes"] == weights
        assert memory["teacher_features_megabytes"] == features / 1e6 / (2 if name == "bfloat16" else 1)
        parts = [memory[f"{key}_megabytes"] for key in ("plain", "teacher_weights", "teacher_features")]
        assert memory["ratio"] == pytest.approx(memory["distilled_megabytes"] / sum(parts))
        assert memory["distilled_megabytes"] > memory["plain_megabytes"] > memory["teacher_features_megabytes"]
    assert "distiller.yaml, 1 x 64x96, 1 round; CPU with" in printed
    assert f"{result['settings']['default']['ratio']:.3f}" in printed
    with Image.open(tmp_path / "step.png") as picture:
        assert picture.size[0] > 500


def test_a_step_of_calibrated_weights(benchmark, distiller_config, tmp_path):
    """Its losses take part in it, measured or not."""
    cfg = distiller_config("retinanet", channels=8)
    cfg.GKD.BALANCE, cfg.GKD.RATIOS.ATTENTION = "calibrate", 0.2
    status, printed = benchmark(cfg, "--setting", "default")
    assert status == 0, printed
    result = json.loads((tmp_path / "step.json").read_text())["settings"]["default"]
    assert set(result["phases_ms"]["distilled"]) == PHASES


@pytest.mark.parametrize("balance", ["fixed", "calibrate"])
def test_other_methods_take_turns(balance, benchmark, distiller_config, tmp_path):
    cfg = distiller_config("faster", channels=8)
    cfg.GKD.BALANCE = balance
    names = ["crosskd", "gkd+logits", "fitnet"]
    arguments = [argument for name in names for argument in ("--method", name)]
    status, printed = benchmark(cfg, "--setting", "default", *arguments)
    assert status == 0, printed
    settings = json.loads((tmp_path / "step.json").read_text())["settings"]
    assert list(settings) == ["default", *names]
    # Neither fitnet nor crosskd asks for gradients.
    gradients = {name for name, setting in settings.items() if "heads' gradient" in setting["phases_ms"]["distilled"]}
    assert gradients >= {"default", "gkd+logits"}
    assert settings["fitnet"]["phases_ms"]["distilled"]["distillation losses"] > 0
    status, printed = benchmark(cfg, "--method", "fgd")
    assert status == 1 and "--method fgd has parameters of its own: give it by GKD.METHOD instead" in printed


@pytest.mark.parametrize(
    ("status", "arguments", "message"),
    [
        (
            1,
            ["--setting", "half the proposals"],
            "--setting half the proposals is none of this config's: default, measured, two passes",
        ),
        (1, ["MODEL.META_ARCHITECTURE", "RetinaNet"], "distiller.yaml is no config of a GKDDistiller"),
        (2, ["--rounds", "0"], "--rounds is 0, but must be at least 1"),
        (2, ["--size", "64", "0"], "--size is [64, 0], but both numbers must be at least 1"),
        (2, ["--plot", "nowhere/step.png"], "nowhere/step.png can't be written: there is no folder nowhere"),
    ],
)
def test_bad_arguments_are_refused(benchmark, distiller_config, status, arguments, message):
    ended, said = benchmark(distiller_config("retinanet"), *arguments)
    assert ended == status and message in said
