"""The benchmark of students through the command line, with tiny detectors."""

import re

import pytest
import torch
from detectron2.modeling import build_model
from tiny import detector_config, needs_exporter

SIZE = (128, 192)


@pytest.fixture
def benchmark(run_here, monkeypatch, tmp_path):
    """Run tools/benchmark_students.py in an empty folder; returns its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield lambda *arguments: run_here("benchmark_students.py", "--size", *SIZE, "--repeats", 1, *arguments)
    torch.set_num_threads(threads)


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def parameters(cfg) -> int:
    """All that training changes: what a checkpoint holds but the statistics of batch norms."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    state = build_model(cfg).state_dict()
    return sum(value.numel() for name, value in state.items() if not name.endswith(statistics))


@needs_exporter
def test_the_table(benchmark, distiller_config, tmp_path):
    from detectron2.utils.analysis import FlopCountAnalysis

    pytest.importorskip("onnxruntime")
    (tmp_path / "faster.yaml").write_text(distiller_config("faster").dump())
    (tmp_path / "retinanet.yaml").write_text(detector_config("retinanet").dump())
    wide = detector_config("retinanet", channels=64)
    status, printed = benchmark(
        *("--onnx", "--output", "students.md", "--threads", 1),
        *("--student", "distilled", "faster.yaml"),
        *("--student", "wide one", "retinanet.yaml", "MODEL.FPN.OUT_CHANNELS", 64),
    )
    assert status == 0, printed
    text = (tmp_path / "students.md").read_text()
    assert text in printed
    header, _, distilled, wider = rows(text)
    assert header == ["", "parameters (M)", "GFLOPs", "PyTorch (ms)", "onnxruntime (ms)"]
    assert [distilled[0], wider[0]] == ["distilled", "wide one"]
    assert distilled[1] == f"{parameters(detector_config('faster')) / 1e6:.2f}"
    assert wider[1] == f"{parameters(wide) / 1e6:.2f}"
    # All of a RetinaNet's convolutions see every cell, whatever its weights.
    counted = FlopCountAnalysis(build_model(wide).eval(), [{"image": torch.rand(3, *SIZE)}])
    assert wider[2] == f"{counted.unsupported_ops_warnings(False).total() / 1e9:.2f}"
    assert all(float(time) > 0 for time in (*distilled[3:], *wider[3:]))
    assert "one image of random pixels, 128 x 192" in text and "threads: 1" in text


def test_pytorch_alone(benchmark, tmp_path):
    (tmp_path / "retinanet.yaml").write_text(detector_config("retinanet").dump())
    status, printed = benchmark("--student", "one", "retinanet.yaml")
    assert status == 0, printed
    assert rows(printed)[0] == ["", "parameters (M)", "GFLOPs", "PyTorch (ms)"]


PROPOSALS = ("MODEL.META_ARCHITECTURE", "ProposalNetwork")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "the following arguments are required: --student"),
        (["--student", "one"], 2, "--student one has no config: give NAME CONFIG"),
        (["--student", "one", "a.yaml", "--student", "one", "b.yaml"], 2, "--student one is given 2 times"),
        (["--student", "one", "a.yaml"], 1, r"error: --student one: .*a\.yaml"),
        (["--student", "one", "r.yaml", "MODEL.DEPTH", "1"], 1, "error: --student one: there is no config key"),
        (["--student", "one", "r.yaml", "MODEL.DEVICE"], 1, "error: --student one: the config key MODEL.DEVICE has no"),
        (["--student", "one", "r.yaml", "MODEL.BACKBONE.NAME", "no"], 1, "error: --student one: .*BACKBONE.NAME"),
        (
            ["--student", "one", "r.yaml", *PROPOSALS],
            1,
            r"META_ARCHITECTURE is ProposalNetwork, .* \(KeyError 'res4'\): ",
        ),
        (
            ["--student", "one", "r.yaml", *PROPOSALS, "MODEL.RPN.IN_FEATURES", "['p3', 'p4', 'p5', 'p6', 'p7']"],
            1,
            "error: --student one: MODEL.META_ARCHITECTURE is ProposalNetwork, which gives proposals, no instances",
        ),
        (
            ["--student", "one", "r.yaml", "MODEL.FPN.IN_FEATURES", "['res3', 'res5']"],
            1,
            r"error: --student one: MODEL.META_ARCHITECTURE is RetinaNet, which can't .* \(AssertionError .*: name",
        ),
        (["--student", "one", "r.yaml", "--size", "8", "64"], 2, "--size is 8 64, but must be at least 32 32"),
        (["--student", "one", "r.yaml", "--repeats", "0"], 2, "--repeats is 0, but must be at least 1"),
        (["--student", "one", "r.yaml", "--threads", "0"], 2, "--threads is 0, but must be at least 1"),
        (["--student", "one", "r.yaml", "--output", "no/s.md"], 2, "no/s.md can't be written: there is no folder no"),
    ],
)
def test_bad_arguments_are_refused(benchmark, tmp_path, arguments, status, message):
    (tmp_path / "r.yaml").write_text(detector_config("retinanet").dump())
    ended, said = benchmark(*arguments)
    assert ended == status and re.search(message, said)


@needs_exporter
def test_a_student_that_can_not_be_exported_is_named(benchmark, tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "mask.yaml").write_text(detector_config("mask").dump())
    ended, said = benchmark("--onnx", "--student", "with masks", "mask.yaml")
    assert ended == 1 and "error: --student with masks: --onnx writes boxes, scores and classes, but" in said
