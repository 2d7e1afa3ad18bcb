"""A study of real trainings through the command line: killed, stopped, gone on with, and added to."""

import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from processes import PATIENCE, wait_until

from gkd_d2.data.toy import make_toy_kitti

# Iterations of the students; a checkpoint every second one, so that there is time to kill one after it.
ITERATIONS = 30
SMALL = f"""
DATALOADER: {{NUM_WORKERS: 1}}
INPUT: {{MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}}
MODEL: {{FPN: {{OUT_CHANNELS: 16}}, RESNETS: {{DEPTH: 18}}}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: {ITERATIONS}, STEPS: [20], CHECKPOINT_PERIOD: 2}}
"""
PROSE = "\nWhat was written by hand.\n"


def write(path: Path, base: Path, *lines: str) -> str:
    """A small config of one of the project's."""
    path.write_text("\n".join((f"_BASE_: {base}", SMALL, *lines)))
    return str(path)


@pytest.fixture(scope="module")
def workplace(project, tmp_path_factory) -> Path:
    """A folder with the configs of a small pair of networks, and the file of a study of two settings and its base."""
    folder = tmp_path_factory.mktemp("study")
    toy = project / "configs" / "toy"
    teacher = write(folder / "teacher.yaml", toy / "teachers" / "frcnn.yaml")
    student = write(
        folder / "student.yaml",
        toy / "gkd_frcnn.yaml",
        f"GKD: {{TEACHER: {{CONFIG_FILE: {teacher}}}, STUDENT: {{INIT_FROM_TEACHER: false}}}}",
    )
    base = {
        "dataset": "toy_kitti_val",
        "detectors": {"frcnn": {"config": student, "teacher": {"config": teacher, "options": {"SOLVER.MAX_ITER": 3}}}},
    }
    data = {
        "base": "Base-Two.yaml",
        "title": "Two settings",
        "seeds": [1],
        "settings": {
            "alone": {"options": {"GKD.METHOD": "none"}},
            "combined": {"options": {"GKD.METHODS": ["fitnet", "fgd"]}},
        },
    }
    (folder / "Base-Two.yaml").write_text(yaml.safe_dump(base))
    (folder / "two.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    make_toy_kitti(folder / "datasets" / "toy_kitti", 6, 2, 0)
    return folder


@pytest.fixture(scope="module")
def start(project, workplace):
    """Start run_study.py on the study, in the folder of its file."""

    def run(*arguments, report=("--report", "docs/results.md")) -> subprocess.Popen:
        command = [sys.executable, str(project / "tools" / "run_study.py"), "two.yaml", "--device", "cpu"]
        command += ["--output", "runs", *report, *arguments]
        environment = os.environ | {
            "DETECTRON2_DATASETS": str(workplace / "datasets"),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        return subprocess.Popen(
            command, cwd=workplace, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return run


@pytest.fixture(scope="module")
def runs(workplace) -> Path:
    """The folder of the detector's trainings."""
    return workplace / "runs" / "two" / "frcnn"


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """Wait for the end and return what was printed."""
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, output[-4000:]
    return output


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.02)


def descendants(pid: int) -> set[int]:
    """The processes that a process has started, and those that these have."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = {int(child) for task in tasks for child in (task / "children").read_text().split()}
        return children.union(*map(descendants, children))
    return set()


def runs_still(pid: int) -> bool:
    """Whether a process is there; one that has ended may wait for ever to be let go by whoever inherited it."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def kill(process: subprocess.Popen) -> None:
    """End a study by SIGKILL, as the kernel does where memory is short, and wait for all that it has started."""
    started = descendants(process.pid)
    # A training and the worker of its loader.
    assert len(started) >= 2
    process.kill()
    finish(process, -signal.SIGKILL)
    wait_until(lambda: not any(map(runs_still, started)))


def starts(folder: Path) -> list[int]:
    """The iterations at which the processes started that trained in a folder."""
    lines = (folder / "console.txt").read_text().splitlines()
    return [int(line.rpartition(" ")[2]) for line in lines if "Starting training from iteration" in line]


def reported(report: Path, setting: str) -> list[str]:
    """The cells of the AP of each seed."""
    table = [line for line in report.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    header = next(row for row in rows if "AP of each seed" in row)
    row = next(row for row in rows if row[0] == setting)
    return row[header.index("AP of each seed")].split(", ")


def measured(folder: Path) -> str:
    """The AP of the last evaluation, from the file that Detectron2 wrote; NaN, of no detection, is 0."""
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    (ap,) = [row["bbox/AP"] for row in rows if "bbox/AP" in row]
    return f"{0.0 if math.isnan(ap) else ap:.1f}"


@pytest.fixture(scope="module")
def first(start, workplace, runs) -> dict[str, Path]:
    """The two trainings of the study, which was killed in one and stopped in the other, and then ended."""
    folders = {name: runs / name / "weights_x1" / "seed_1" for name in ("alone", "combined")}
    study = start("--at-once", "1")
    wait_for(folders["alone"] / "last_checkpoint", study)
    kill(study)
    # Its training has not gone on by itself.
    assert not (folders["alone"] / "model_final.pth").exists()
    study = start("--at-once", "1")
    wait_for(folders["combined"] / "last_checkpoint", study)
    study.send_signal(signal.SIGTERM)
    assert "Stopped; the same command goes on." in finish(study, 128 + signal.SIGTERM)
    assert not (folders["combined"] / "model_final.pth").exists()
    assert not (workplace / "runs" / "two" / "report.md").exists()
    both = [start("--at-once", "1", report=()) for _ in range(2)]
    outputs = {study.returncode: (study.pid, output) for study, (output, _) in [(s, s.communicate()) for s in both]}
    assert outputs.keys() == {0, 1}, outputs
    pid, output = outputs[0]
    assert f"runs/two/frcnn/combined/weights_x1/seed_1: 3 of 3, AP {measured(folders['combined'])}\n" in output
    # The other one found the folder taken.
    refused = (
        f"error: runs/two: another run_study.py trains there, process {pid} on {platform.node()}: wait for its end"
    )
    assert refused in outputs[1][1] and "Traceback" not in outputs[1][1]
    return folders


def test_an_interrupted_study_goes_on(first, workplace, runs):
    assert starts(runs / "teacher") == [0]
    for folder in first.values():
        beginning, resumed = starts(folder)
        assert beginning == 0 and 2 <= resumed < ITERATIONS
        rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
        assert max(row["iteration"] for row in rows if "total_loss" in row) == ITERATIONS - 1
        # What was saved to go on with has served its purpose.
        assert [path.name for path in folder.glob("*.pth")] == ["model_final.pth"]
    assert "Stopped by SIGTERM after iteration" in (first["combined"] / "console.txt").read_text()
    for name, folder in first.items():
        assert reported(workplace / "runs" / "two" / "report.md", name) == [measured(folder)]


def test_a_finished_study_is_only_reported(first, start, workplace, runs):
    """Beside the trainings it was, now it is where it is asked for."""
    logs = {path: path.read_bytes() for path in runs.rglob("console.txt")}
    assert len(logs) == 3 and not (workplace / "docs").exists()
    assert "Report: docs/results.md" in finish(start())
    for name in ("report.md", "images/two_settings_frcnn.png"):
        asked = workplace / "docs" / name.replace("report", "results")
        assert asked.read_bytes() == (workplace / "runs" / "two" / name).read_bytes()
    assert {path: path.read_bytes() for path in logs} == logs


def test_a_study_that_does_not_fit_its_folder_is_refused(first, start, workplace, runs):
    file = workplace / "two.yaml"
    text = file.read_text()
    report = (workplace / "docs" / "results.md").read_bytes()
    file.write_text(text + "options: {SOLVER.BASE_LR: 0.001}\n")
    output = finish(start(), 1)
    file.write_text(text)
    assert "error: runs/two/frcnn/alone/weights_x1/seed_1 holds a training" in output
    assert "SOLVER.BASE_LR 0.04 there, 0.001 here" in output
    assert "Traceback" not in output
    assert (workplace / "docs" / "results.md").read_bytes() == report


def test_a_seed_is_added_beside_a_training_that_fails(first, start, workplace, runs):
    """In the same call, and a setting is taken away; the report keeps prose, and reads the folders anew."""
    file, report = workplace / "two.yaml", workplace / "docs" / "results.md"
    data = yaml.safe_load(file.read_text())
    data["seeds"].append(2)
    broken = {"options": {"GKD.METHOD": "none", "DATASETS.TRAIN": "('no_such_data',)"}}
    data["settings"] = {"alone": data["settings"]["alone"], "broken": broken}
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    report.write_text(report.read_text() + PROSE)
    metrics = first["alone"] / "metrics.json"
    *rows, last = metrics.read_text().splitlines()
    assert "bbox/AP" in json.loads(last)
    metrics.write_text("\n".join((*rows, json.dumps(json.loads(last) | {"bbox/AP": 12.34}))) + "\n")
    logs = {path: path.read_bytes() for path in runs.rglob("console.txt")}

    output = finish(start("--at-once", "2"), 1)
    assert f"seed_2: 3 of 5, AP {measured(first['alone'].with_name('seed_2'))}, " in output
    for seed in (1, 2):
        folder = f"runs/two/frcnn/broken/weights_x1/seed_{seed}"
        assert (
            f"error: {folder} is missing in the report: the training ended with status 1: see console.txt there"
            in output
        )
        assert "no_such_data" in (workplace / folder / "console.txt").read_text()
    assert {path: path.read_bytes() for path in logs} == logs
    added = first["alone"].with_name("seed_2")
    assert starts(added) == [0]
    assert reported(report, "alone") == ["12.3", measured(added)]
    assert "Not trained yet: broken." in report.read_text()
    assert report.read_text().endswith(PROSE) and "combined" not in report.read_text()
