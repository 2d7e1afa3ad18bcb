"""The order of trainings, and what happens to those that fail, hang or are under way elsewhere."""

import fcntl
import json
import logging
import subprocess
import sys
import threading
import time

import pytest
from processes import PATIENCE, wait_until

from gkd_d2.analysis.study import schedule
from gkd_d2.analysis.study.schedule import Scheduler

# In the place of tools/train_net.py: what a training leaves, without a training.
TRAINING = """
import json, pathlib, signal, sys, time
root = pathlib.Path(__file__).parent
folder = pathlib.Path(sys.argv[sys.argv.index("OUTPUT_DIR") + 1])
assert "--resume" in sys.argv
with (root / "started").open("a") as file:
    file.write(f"{folder.relative_to(root / 'small')}\\n")
if (folder / "fail").exists():
    sys.exit(3)
if (folder / "silent").exists():
    sys.exit(0)
if (folder / "hang").exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (folder / "hanging").touch()
    time.sleep(600)
if (folder / "meet").exists():
    other = pathlib.Path((folder / "meet").read_text())
    (folder / "met").touch()
    while not (other / "met").exists():
        time.sleep(0.01)
(folder / "model_0000004.pth").touch()
(folder / "model_final.pth").touch()
(folder / "last_checkpoint").write_text("model_final.pth")
with (folder / "metrics.json").open("a") as file:
    file.write(json.dumps({"iteration": 399, "total_loss": 1.0, "bbox/AP": 10.0}) + "\\n")
"""


@pytest.fixture
def study(tuned_study, tmp_path, monkeypatch):
    """The tuned study, whose trainings last a moment."""
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    monkeypatch.setattr(schedule, "TRAIN", script)
    monkeypatch.setattr(schedule, "LOCK_SECONDS", 0.05)
    for job in tuned_study._possible_jobs():
        job.folder.mkdir(parents=True)
        (job.folder / "config.yaml").write_text(job.config.dump())
    return tuned_study


@pytest.fixture
def started(tmp_path):
    """A function that returns the folders of the trainings that were started, in their order."""
    path = tmp_path / "started"
    return lambda: path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def logged(caplog, monkeypatch):
    """What the package logs."""
    # A tool that ran in this process may have turned it off.
    monkeypatch.setattr(logging.getLogger("gkd_d2"), "propagate", True)
    caplog.set_level("INFO", "gkd_d2")
    return caplog


def folder(study, *names):
    return study.output.joinpath("retinanet", *names)


def test_each_training_is_run_once_and_seed_by_seed(study, started):
    assert Scheduler("cpu", 1).run(study) == {}
    expected = [
        "teacher",
        *("gkd/weights_x1/seed_101", "gkd/weights_x5/seed_101"),
        *("alone/weights_x1/seed_1", "gkd/weights_x1/seed_1", "half/weights_x0.5/seed_1"),
        *("alone/weights_x1/seed_2", "gkd/weights_x1/seed_2", "half/weights_x0.5/seed_2"),
    ]
    assert started() == [f"retinanet/{name}" for name in expected]
    # The last checkpoint is enough.
    assert not list(study.output.rglob("model_0000004.pth"))
    cost = json.loads((folder(study, "teacher") / "study_cost.json").read_text())
    assert cost["resident_megabytes"] > 1 and cost["device"] == "cpu"
    assert Scheduler("cpu", 1).run(study) == {}
    assert len(started()) == len(expected)


def test_the_end_of_each_training_is_said(study, logged):
    (folder(study, "alone", "weights_x1", "seed_1") / "fail").touch()
    Scheduler("cpu", 1).run(study)
    ends = [message for message in logged.messages if " of 9, " in message]
    assert len(ends) == 8
    assert ends[0].startswith(f"{folder(study, 'teacher')}: 1 of 9, AP 10.0, ") and ends[0].endswith(" left")
    assert ends[-1].startswith(f"{folder(study, 'half', 'weights_x0.5', 'seed_2')}: 8 of 9, AP 10.0")
    logged.clear()
    (folder(study, "alone", "weights_x1", "seed_1") / "fail").unlink()
    Scheduler("cpu", 1).run(study)
    assert f"{folder(study, 'alone', 'weights_x1', 'seed_1')}: 9 of 9, AP 10.0" in logged.messages


def test_a_failure_stops_only_what_needs_it(study, started):
    (folder(study, "gkd", "weights_x5", "seed_101") / "fail").touch()
    (folder(study, "alone", "weights_x1", "seed_1") / "silent").touch()
    assert Scheduler("cpu", 2).run(study) == {
        folder(study, "gkd", "weights_x5", "seed_101"): "the training ended with status 3: see console.txt there",
        folder(study, "alone", "weights_x1", "seed_1"): (
            "the training ended, but holds no evaluation on toy_kitti_val"
        ),
        folder(study, "gkd"): "needs the trainings that choose its weights",
        folder(study, "half"): "needs the trainings that choose its weights",
    }
    assert "retinanet/alone/weights_x1/seed_2" in started() and len(started()) == 5


def test_without_its_teacher_no_student_is_trained(study, started):
    (folder(study, "teacher") / "fail").touch()
    assert list(Scheduler("cpu", 2).run(study)) == [folder(study, "teacher")]
    assert started() == ["retinanet/teacher"]


def test_so_many_run_at_once(study, started):
    one, other = (folder(study, "gkd", f"weights_x{scale}", "seed_101") for scale in (1, 5))
    (one / "meet").write_text(str(other))
    (other / "meet").write_text(str(one))
    assert Scheduler("cpu", 2).run(study) == {}


def test_stop_ends_what_runs_and_starts_nothing(study, started):
    hanging = folder(study, "gkd", "weights_x1", "seed_101")
    (hanging / "hang").touch()
    scheduler = Scheduler("cpu", 1)

    def stop():
        wait_until((hanging / "hanging").exists)
        scheduler.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    begin = time.monotonic()
    scheduler.run(study)
    thread.join()
    assert time.monotonic() - begin < PATIENCE
    assert scheduler.stopped
    assert started() == ["retinanet/teacher", "retinanet/gkd/weights_x1/seed_101"]
    # A training that a stop has ended is not a failed one.
    (hanging / "hang").unlink()
    assert Scheduler("cpu", 1).run(study) == {}


def test_a_folder_in_which_another_process_trains_is_waited_for(study, started, logged):
    """As one that lives on when the study that started it is killed: it holds its output open."""
    job = study.teacher_job("retinanet")
    with (job.folder / "console.txt").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=log)
    result = []
    thread = threading.Thread(target=lambda: result.append(Scheduler("cpu", 1).run(study)))
    thread.start()
    wait_until(lambda: "another process trains there" in logged.text)
    assert started() == []
    for name in ("model_final.pth", "last_checkpoint"):
        (job.folder / name).touch()
    row = {"iteration": 399, "total_loss": 1.0, "bbox/AP": 33.0}
    (job.folder / "metrics.json").write_text(json.dumps(row) + "\n")
    orphan.communicate(b"\n")
    thread.join()
    assert result == [{}]
    assert "retinanet/teacher" not in started() and len(started()) == 8
    assert job.metrics() == {"bbox/AP": 33.0}


def test_waiting_for_a_folder_can_be_stopped(study, started):
    with (folder(study, "teacher") / "console.txt").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        scheduler = Scheduler("cpu", 1)
        threading.Timer(0.3, scheduler.stop).start()
        scheduler.run(study)
    assert scheduler.stopped and started() == []


def test_nothing_of_an_attempt_without_checkpoint_goes_on(study):
    job = study.student_jobs("retinanet", "alone")[1]
    (job.folder / "metrics.json").write_text('{"iteration": 7, "total_loss": 5.0, "loss_of_another_method": 1.0}\n')
    assert Scheduler("cpu", 1).run(study) == {}
    assert list(job.finished().history) == [399]
