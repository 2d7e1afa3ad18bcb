"""The benchmark of the losses through the command line, on toy shapes."""

import json

import pytest
import torch
from devices import CUDA_MARKS
from PIL import Image

# Of one pass over the student's features: 64 channels, cells of 128 x 416 pixels at strides of 4 to 32.
ELEMENTS = 64 * (32 * 104 + 16 * 52 + 8 * 26 + 4 * 13)
BOX_COUNTS, AREAS = ["0", "10", "100", "500"], ["0.25", "0.5", "1.0", "2.0"]


@pytest.fixture
def benchmark(run_here, monkeypatch, tmp_path):
    """Run tools/benchmark_losses.py with one round of one input; returns what it wrote as JSON, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        options = ["--shapes", "toy", "--batch", 1, "--rounds", 1, "--warm-up", 1, "--inputs", 1]
        files = ["--json", "losses.json", "--plot", "losses.png"]
        status, printed = run_here("benchmark_losses.py", *options, *files, *arguments)
        assert status == 0, printed
        return json.loads((tmp_path / "losses.json").read_text()), printed

    return run


def row(table: str, name: str) -> list[str]:
    """The cells of a table's row, its name left out."""
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def assert_consistent(result: dict) -> None:
    implementations, floor = result["implementations"], result["floor_ms"]
    assert min(floor, *(r["forward_ms"] for r in implementations.values())) > 0
    for r in implementations.values():
        assert r["of_floor"] == pytest.approx(r["both_ms"] / floor)
        assert r["of_eager"] == pytest.approx(r["both_ms"] / implementations["eager reference"]["both_ms"])
        moved = result["passes"] * result["feature_megabytes"]
        assert r["gigabytes_per_second"] == pytest.approx(moved / r["both_ms"])
    assert 0 < implementations["fused"]["extra_memory"] < implementations["eager reference"]["extra_memory"]


def test_times_ratios_errors_and_memory(benchmark, tmp_path):
    result, printed = benchmark("--no-compile", "--no-sweeps")
    assert result["feature_megabytes"] == 4 * ELEMENTS / 1e6
    assert result["passes"] == 9
    assert_consistent(result)
    implementations = result["implementations"]
    assert list(implementations) == ["eager reference", "fused"]
    assert implementations["fused"]["extra_memory"] < 0.1
    for r in implementations.values():
        assert r["both_ms"] == pytest.approx(r["forward_ms"] + r["backward_ms"])  # of one round
        assert r["loss_error"] < 1e-5 and r["gradient_error"] < 1e-5
        # The host's time is the time itself on a CPU.
        assert not {"of_compiled", "host_forward_ms", "host_backward_ms", "timed_by"} & set(r)
    assert not {"ms_by_boxes", "ms_by_area"} & set(result)
    assert printed.startswith("toy, batch 1, float32, contiguous, 10 boxes an image, weights: all; 1.1 MB")
    keys = ("forward_ms", "backward_ms", "both_ms", "of_eager", "of_floor")
    assert row(printed, "fused")[:5] == [f"{implementations['fused'][key]:.3f}" for key in keys]
    assert row(printed, "floor: 9 passes")[2] == f"{result['floor_ms']:.3f}"
    assert "compiled" not in printed and "host" not in printed and "no boxes" not in printed
    with Image.open(tmp_path / "losses.png") as picture:
        assert picture.size[0] > 500


def test_sweeps_and_the_default_weights(benchmark):
    options = ("--weights", "default", "--dtype", "bfloat16", "--layout", "channels_last")
    result, printed = benchmark("--no-compile", *options)
    assert result["feature_megabytes"] == 2 * ELEMENTS / 1e6
    assert result["passes"] == 7
    assert_consistent(result)
    assert 1e-5 < result["implementations"]["fused"]["gradient_error"] <= 2**-8
    assert list(result["ms_by_boxes"]) == BOX_COUNTS and list(result["ms_by_area"]) == AREAS
    times = result["ms_by_boxes"]
    assert row(printed, "500") == [f"{times['500']:.3f}", f"{times['500'] / times['0']:.3f}"]
    times = result["ms_by_area"]
    assert row(printed, "0.25") == [f"{times['0.25']:.3f}", f"{4 * times['0.25'] / times['1.0']:.3f}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch is 0, but must be at least 1"),
        (["--rounds", "0"], "--rounds is 0, but must be at least 1"),
        (["--inputs", "0"], "--inputs is 0, but must be at least 1"),
        (["--warm-up", "-1"], "--warm-up is -1, but must be at least 0"),
        (["--boxes", "-1"], "--boxes is -1, but must be at least 0"),
        (["--plot", "nowhere/losses.png"], "nowhere/losses.png can't be written: there is no folder nowhere"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(run_here, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, said = run_here("benchmark_losses.py", *arguments)
    assert status == 2 and message in said


def test_a_missing_gpu_is_named(run_here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, said = run_here("benchmark_losses.py", "--device", "cuda")
    assert status == 2 and "--device cuda needs a GPU that torch can use, and there is none" in said


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA_MARKS)])
def test_times_on_a_gpu_are_those_of_replays(device, benchmark):
    result, printed = benchmark("--device", device, "--rounds", "3", "--inputs", "2")
    assert_consistent(result)
    assert list(result["implementations"]) == ["eager reference", "compiled reference", "fused"]
    for r in result["implementations"].values():
        assert r["timed_by"] == "graph replay"
        assert min(r["host_forward_ms"], r["host_backward_ms"]) > 0
        assert r["loss_error"] < 1e-5 and r["gradient_error"] < 1e-5
    times = [*result["ms_by_boxes"].values(), *result["ms_by_area"].values()]
    assert len(times) == 8 and min(times) > 0
    assert "graph replay" in row(printed, "fused")
