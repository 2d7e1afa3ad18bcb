"""Real runs compared through the command line."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from gkd_d2.analysis.runs import Run
from gkd_d2.modeling.state_names import is_students
from gkd_d2.utils import progress


def runs_of(report):
    """The table of runs, a dictionary of header -> cell each."""
    table = report[report.index("| ") :].split("\n\n")[0]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return [dict(zip(header, row)) for row in rows]


def test_three_runs(demo, run_here, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(demo[0] / "datasets"))
    folders = [demo[0] / name for name in ("teacher", "student_alone", "student_distilled")]
    options = ["--output", tmp_path / "out", "--input-size", 64, 96, "--repeats", 2, "--images", 1, "--device", "cpu"]
    status, printed = run_here("compare_runs.py", *folders, *options)
    assert status == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert report in printed
    rows = runs_of(report)
    roles = ("teacher", "student alone", "student distilled")
    assert len(rows) == len(roles)
    for folder, role, found in zip(folders, roles, rows):
        metrics = {}
        for line in (folder / "metrics.json").read_text().splitlines():
            metrics |= json.loads(line)
        state = torch.load(folder / "model_final.pth")["model"]
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        parameters = sum(v.numel() for k, v in state.items() if not k.endswith(buffers) and is_students(k))
        assert found[""] == folder.name
        assert found["role"] == role
        assert found["AP"] == f"{metrics['bbox/AP']:.1f}"
        assert found["AP50"] == f"{metrics['bbox/AP50']:.1f}"
        # Detectron2 writes none where nothing was detected, as may be after two iterations.
        for name in (name for name in metrics if name.startswith("bbox/AP-")):
            assert found[f"AP {name.removeprefix('bbox/AP-')}"] == f"{metrics[name]:.1f}"
        assert found["KITTI AP moderate"] == f"{metrics['kitti/AP_moderate']:.1f}"
        assert found["parameters (M)"] == f"{parameters / 1e6:.2f}"
        assert found["iterations"] == "2"
    # One network, measured twice: R34 has more of everything than R18.
    operations, times = ([float(row[name]) for row in rows] for name in ("GFLOPs", "ms an image"))
    assert operations[0] > operations[1] > 0
    assert operations[1] == pytest.approx(operations[2], rel=0.2)
    assert min(times) > 0
    assert "one image of random pixels, 64 x 96; ms is the median of 2 times on the CPU" in report
    assert "- student_distilled: the method is gkd; alone is student_alone; teacher is teacher." in report
    for name in ("curves.png", "detections.png"):
        assert f"]({name})" in report
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 1000


def test_only_what_is_there_is_measured(demo, run_here, tmp_path):
    """Of a run without checkpoint the size is known from the config."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for name in ("config.yaml", "metrics.json"):
        (folder / name).write_bytes((demo[0] / "student_alone" / name).read_bytes())
    assert run_here("compare_runs.py", folder, "--no-speed", "--output", tmp_path / "out")[0] == 0
    report = (tmp_path / "out" / "report.md").read_text()
    (found,) = runs_of(report)
    assert found["parameters (M)"] == f"{Run('', folder).parameters / 1e6:.2f}"
    assert found["GFLOPs"] == found["ms an image"] == "–"
    assert "copied holds no last_checkpoint, so that its GFLOPs and time were not measured." in report
    assert "ms is the median" not in report


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("name", ["curves.png", "report.md"])
def test_a_disk_that_fills_up_is_named_with_the_folder(name, demo, run_here, tmp_path):
    (tmp_path / name).symlink_to("/dev/full")
    status, said = run_here("compare_runs.py", demo[0] / "teacher", "--no-speed", "--output", tmp_path)
    assert status == 1 and said.endswith(f"error: [Errno 28] No space left on device: '{tmp_path}'\n")


def test_a_run_that_was_never_evaluated_is_named(demo, run_here, tmp_path):
    folder = tmp_path / "stopped"
    folder.mkdir()
    (folder / "config.yaml").write_bytes((demo[0] / "student_alone" / "config.yaml").read_bytes())
    (folder / "metrics.json").write_text('{"iteration": 0, "total_loss": 1.0}\n')
    status, printed = run_here("compare_runs.py", folder, "--output", tmp_path / "out")
    assert status == 1 and printed.startswith(f"error: {folder} was never evaluated")
    assert not (tmp_path / "out").exists()


def test_progress_is_shown(demo, run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0)
    options = ["--output", tmp_path / "out", "--input-size", 64, 96, "--repeats", 2, "--device", "cpu"]
    status, printed = run_here("compare_runs.py", demo[0] / "student_alone", *options)
    assert status == 0
    lines = printed.splitlines()
    assert any(line.startswith("runs whose operations are counted: 1 of 1, ") for line in lines)
    # Two turns to warm up, and two that count.
    assert any(line.startswith("turns of the time's measurement: 4 of 4, ") for line in lines)
