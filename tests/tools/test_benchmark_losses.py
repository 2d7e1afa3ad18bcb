"""The benchmark of the losses through the command line, on toy shapes."""

import argparse
import json
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import get_cfg
from PIL import Image

from gkd_d2 import LossWeights, add_gkd_config
from gkd_d2.losses import fused

CUDA = torch.device("cuda")
# Of one pass over the student's features: 64 channels, cells of 128 x 416 pixels at strides of 4 to 32.
ELEMENTS = 64 * (32 * 104 + 16 * 52 + 8 * 26 + 4 * 13)
BOX_COUNTS, AREAS = ["0", "10", "100", "500"], ["0.25", "0.5", "1.0", "2.0"]


def needs_cuda(test):
    """A mark for what runs on a GPU only."""
    reason = fused.unavailable_reason(CUDA) if torch.cuda.is_available() else "there is no GPU"
    return pytest.mark.cuda(pytest.mark.skipif(reason is not None, reason=str(reason))(test))


@pytest.fixture
def benchmark(project, monkeypatch, tmp_path):
    """Run tools/benchmark_losses.py with one round of one input; returns what it wrote as JSON."""

    def run(*arguments):
        command = ["benchmark_losses.py", "--shapes", "toy", "--batch", "1", "--rounds", "1", "--warm-up", "1"]
        command += ["--inputs", "1", "--json", "losses.json", "--plot", "losses.png", *arguments]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(str(project / "tools" / "benchmark_losses.py"), run_name="__main__")
        return json.loads((tmp_path / "losses.json").read_text())

    return run


@pytest.fixture
def tool(project):
    """The names in tools/benchmark_losses.py."""
    return runpy.run_path(str(project / "tools" / "benchmark_losses.py"))


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


def test_times_ratios_errors_and_memory(benchmark, tmp_path, capsys):
    result = benchmark("--no-compile", "--no-sweeps")
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
    table = capsys.readouterr().out
    assert table.startswith("toy, batch 1, float32, contiguous, 10 boxes an image, weights: all; 1.1 MB")
    keys = ("forward_ms", "backward_ms", "both_ms", "of_eager", "of_floor")
    assert row(table, "fused")[:5] == [f"{implementations['fused'][key]:.3f}" for key in keys]
    assert row(table, "floor: 9 passes")[2] == f"{result['floor_ms']:.3f}"
    assert "compiled" not in table and "host" not in table and "no boxes" not in table
    with Image.open(tmp_path / "losses.png") as picture:
        assert picture.size[0] > 500


def test_sweeps_and_the_default_weights(benchmark, capsys):
    options = ("--weights", "default", "--dtype", "bfloat16", "--layout", "channels_last")
    result = benchmark("--no-compile", *options)
    assert result["feature_megabytes"] == 2 * ELEMENTS / 1e6
    assert result["passes"] == 7
    assert_consistent(result)
    assert 1e-5 < result["implementations"]["fused"]["gradient_error"] <= 2**-8
    assert list(result["ms_by_boxes"]) == BOX_COUNTS and list(result["ms_by_area"]) == AREAS
    table = capsys.readouterr().out
    times = result["ms_by_boxes"]
    assert row(table, "500") == [f"{times['500']:.3f}", f"{times['500'] / times['0']:.3f}"]
    times = result["ms_by_area"]
    assert row(table, "0.25") == [f"{times['0.25']:.3f}", f"{4 * times['0.25'] / times['1.0']:.3f}"]


def test_the_default_weights_are_a_config_s(tool):
    cfg = get_cfg()
    add_gkd_config(cfg)
    weights = LossWeights(**{name.lower(): value for name, value in cfg.GKD.LOSS_WEIGHTS.items()})
    assert tool["WEIGHTS"]["default"] == weights
    # What makes the difference of two passes.
    assert weights.attention == 0 and tool["WEIGHTS"]["all"].attention > 0


def test_data_are_drawn_by_seed(tool):
    args = argparse.Namespace(shapes="toy", batch=2, layout="channels_last", device="cpu", dtype=torch.float16)
    batch, same, other = (tool["make_batch"](args, seed, 3, 0.5) for seed in (0, 0, 1))
    assert [tuple(f.shape) for f in batch.student] == [(2, 64, 128 // s, 192 // s) for s in (4, 8, 16, 32)]
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in batch.teacher_grad)
    for name in ("student", "teacher", "student_grad", "teacher_grad", "boxes"):
        for mine, equal, differs in zip(getattr(batch, name), getattr(same, name), getattr(other, name)):
            assert torch.equal(mine, equal) and not torch.equal(mine, differs)
    assert not torch.equal(batch.student[0], batch.teacher[0])


def test_backward_is_what_a_replay_takes_beyond_forward(tool, monkeypatch):
    """Graphs, which need a GPU, are replaced by functions that return their milliseconds."""

    def capture(compute, batch, pool):
        return [SimpleNamespace(replay=lambda: compute(batch)), SimpleNamespace(replay=lambda: 3 * batch)], None

    timed_calls = tool["timed_calls"]
    monkeypatch.setitem(timed_calls.__globals__, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    call = timed_calls(lambda batch: batch, [1.0, 10.0], lambda run: (None, run()), replayed=True)
    assert [call(turn) for turn in range(3)] == [(1.0, 2.0), (10.0, 20.0), (1.0, 2.0)]


def test_the_table_says_what_was_not_replayed(tool):
    keys = [key for key, spec in tool["COLUMNS"].values() if spec]
    names = ("eager reference", "compiled reference", "fused")
    values = {name: {key: 1.0 + index for key in keys} for index, name in enumerate(names)}
    for name in names:
        values[name]["timed_by"] = "events" if name == "eager reference" else "graph replay"
    values["fused"] |= {"host_forward_ms": 0.125, "host_backward_ms": 0.0625}
    title = {"shapes": "toy", "batch": 1, "dtype": "float32", "layout": "contiguous", "boxes": 1, "weights": "all"}
    title |= {"device": "a GPU", "torch": "2", "feature_megabytes": 1.0, "passes": 9, "floor_ms": 0.5}
    table = tool["report"]({**title, "implementations": values})
    header = row(table.replace("|  ", "| what "), "what")
    cells = dict(zip(header, row(table, "fused")))
    assert cells["timed by"] == "graph replay"
    assert (cells["host, forward ms"], cells["host, backward ms"]) == ("0.125", "0.062")
    assert cells["/ compiled"] == "3.000"
    assert dict(zip(header, row(table, "eager reference")))["timed by"] == "events"
    assert row(table, "floor: 9 passes")[2:6] == ["0.500", "", "", ""]


@pytest.mark.parametrize("name", ["batch", "rounds", "inputs"])
def test_numbers_below_one_are_refused(benchmark, capsys, name):
    with pytest.raises(SystemExit):
        benchmark(f"--{name}", "0")
    assert f"--{name} is 0, but must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--warm-up", "-1"], "--warm-up is -1, but must be at least 0"),
        (["--boxes", "-1"], "--boxes is -1, but must be at least 0"),
        (["--plot", "nowhere/losses.png"], "nowhere/losses.png can't be written: there is no folder nowhere"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(benchmark, capsys, arguments, message):
    with pytest.raises(SystemExit):
        benchmark(*arguments)
    assert message in capsys.readouterr().err


def test_a_missing_gpu_is_named(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark("--device", "cuda")
    assert "--device cuda needs a GPU that torch can use, and there is none" in capsys.readouterr().err


@needs_cuda
def test_times_on_a_gpu_are_those_of_replays(benchmark, capsys):
    result = benchmark("--device", "cuda", "--rounds", "3", "--inputs", "2")
    assert_consistent(result)
    assert list(result["implementations"]) == ["eager reference", "compiled reference", "fused"]
    for r in result["implementations"].values():
        assert r["timed_by"] == "graph replay"
        assert min(r["host_forward_ms"], r["host_backward_ms"]) > 0
        assert r["loss_error"] < 1e-5 and r["gradient_error"] < 1e-5
    times = [*result["ms_by_boxes"].values(), *result["ms_by_area"].values()]
    assert len(times) == 8 and min(times) > 0
    assert "graph replay" in row(capsys.readouterr().out, "fused")


@needs_cuda
def test_what_waits_for_the_device_is_not_captured(tool):
    args = argparse.Namespace(shapes="toy", batch=1, layout="contiguous", device="cuda", dtype=torch.float32)
    batch = tool["make_batch"](args, 0, 3)
    compute = tool["total_loss"]("fused", tool["WEIGHTS"]["all"])
    assert tool["capturable"](compute, batch)
    assert not tool["capturable"](lambda batch: compute(batch) * batch.boxes[0].sum().item(), batch)
    pool = torch.cuda.graph_pool_handle()
    (_, graph), (loss, gradients) = tool["capture"](compute, batch, pool)
    # Other features, so that the values can only be the replay's.
    for feature in batch.student:
        feature.mul_(2.0)
    graph.replay()
    wanted_loss, wanted_gradients = tool["loss_and_gradients"](compute, batch)
    assert torch.equal(loss, wanted_loss)
    assert all(torch.equal(gradient, wanted) for gradient, wanted in zip(gradients, wanted_gradients))
