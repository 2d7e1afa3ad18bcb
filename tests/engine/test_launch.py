"""Processes of a run, whoever starts them: real ones, that talk through gloo."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.engine import default_argument_parser
from processes import PATIENCE, is_alive, wait_until
from torch.multiprocessing import ProcessExitedException

from gkd_d2.engine import launch as module
from gkd_d2.engine.launch import Place, count_processes, launch, place_from_environment

STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
# 20000 + 123456 mod 20000
PORT = 23456
OF_TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "GROUP_RANK": "1"}
OF_LAUNCHERS = STEP.keys() | OF_TORCHRUN.keys() | {"MASTER_ADDR", "MASTER_PORT"}


def arguments(*options):
    return default_argument_parser().parse_args(options)


def place(environment, *options):
    return place_from_environment(arguments(*options), environment)


def without(environment, name):
    return {key: value for key, value in environment.items() if key != name}


def test_torchrun_gives_a_place():
    expected = Place(rank=3, world_size=4, local_rank=1, machine=1, url="env://")
    assert place(OF_TORCHRUN) == place(OF_TORCHRUN, "--num-gpus", "4") == expected
    # It may run within a Slurm job.
    assert place(STEP | OF_TORCHRUN) == expected
    with pytest.raises(ValueError, match="environment variable LOCAL_RANK is '', but must be a number"):
        place(without(OF_TORCHRUN, "LOCAL_RANK"))
    with pytest.raises(ValueError, match="environment variable RANK is 'first'"):
        place(OF_TORCHRUN | {"RANK": "first"})


def test_srun_gives_a_place():
    expected = Place(rank=5, world_size=8, local_rank=1, machine=1, url=f"tcp://gpu03:{PORT}")
    assert place(STEP) == place(STEP, "--num-gpus", "0") == expected
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        with pytest.raises(ValueError, match=f"environment variable {name} is ''"):
            place(without(STEP, name))


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("login", "login"),
        ("login,gpu03", "login"),
        ("gpu[03-05,9],login", "gpu03"),
        ("gpu[7,9-12]", "gpu7"),
        ("rack[1-2]node[01-04],login", "rack1node01"),
        ("gpu[3-4].site.example", "gpu3.site.example"),
    ],
)
def test_processes_meet_at_the_first_machine_of_a_step(nodes, first):
    assert place(STEP | {"SLURM_STEP_NODELIST": nodes}).url == f"tcp://{first}:{PORT}"


def test_where_processes_meet_can_be_set():
    assert place(STEP | {"MASTER_ADDR": "10.0.0.7"}).url == f"tcp://10.0.0.7:{PORT}"
    assert place(without(STEP, "SLURM_JOB_ID") | {"MASTER_PORT": "29500"}).url == "tcp://gpu03:29500"
    with pytest.raises(ValueError, match="no SLURM_STEP_NODELIST: set MASTER_ADDR"):
        place(without(STEP, "SLURM_STEP_NODELIST"))
    # Jobs and steps on one machine do not meet each other.
    urls = {place(STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).url for job in "123" for step in "012"}
    assert len(urls) == 9


def test_other_processes_have_no_place():
    assert place({}) is None
    # In a batch script, and in a step of one task.
    batch = {"SLURM_JOB_ID": "123456", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    assert place(batch) is None
    assert place(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    # Tasks that are machines, whose processes Detectron2's launcher starts.
    assert place(STEP, "--num-gpus", "2") is None
    assert place(STEP, "--num-machines", "8") is None


@pytest.fixture
def environment(monkeypatch):
    """A function that sets variables, among which there are none of a job that runs the tests."""
    for name in OF_LAUNCHERS & os.environ.keys():
        monkeypatch.delenv(name)
    return lambda **variables: [monkeypatch.setenv(*item) for item in variables.items()]


def test_tasks_of_slurm_are_machines(environment, monkeypatch):
    """With --num-gpus above 1 each starts its processes, here those of the third of four machines."""
    places = []
    monkeypatch.setattr(module, "_run", lambda main, main_args, place, *_: places.append(place))
    monkeypatch.setattr(module, "spawn", lambda start, args, count: [start(rank, *args) for rank in range(count)])
    environment(**STEP | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_NODEID": "2", "SLURM_LOCALID": "0"})
    launch(pytest.fail, arguments("--num-gpus", "2"), (), device="cpu")
    url = f"tcp://gpu03:{PORT}"
    assert places == [Place(4, 8, local_rank=0, machine=2, url=url), Place(5, 8, local_rank=1, machine=2, url=url)]


def test_contradictions_are_refused(environment, monkeypatch):
    def refused(message, *options, device="cpu"):
        with pytest.raises(ValueError, match=message):
            launch(pytest.fail, arguments(*options), (), device=device)

    refused("--num-gpus is 0, with --num-machines 2", "--num-gpus", "0", "--num-machines", "2")
    environment(**OF_TORCHRUN, TORCHELASTIC_MAX_RESTARTS="3")
    with pytest.raises(ValueError, match="--max-restarts is 3, but without --resume .*: add --resume"):
        count_processes(arguments(), device="cpu")
    for option in ("--resume", "--eval-only"):
        assert count_processes(arguments(option), device="cpu") == 4
    for name in OF_TORCHRUN:
        monkeypatch.delenv(name)
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS")
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 1)
    refused("needs 2 GPUs .* torch finds 1: .* `MODEL.DEVICE cpu` at the end of", "--num-gpus", "2", device="cuda")


def test_processes_are_counted_before_they_start(environment, monkeypatch):
    def count(*options, device="cpu", **variables):
        with monkeypatch.context() as context:
            for name, value in variables.items():
                context.setenv(name, value)
            return count_processes(arguments(*options), device=device)

    assert count() == count("--num-gpus", "0") == 1
    assert count("--num-gpus", "3") == 3
    assert count("--num-gpus", "3", "--num-machines", "2") == 6
    assert count("--num-gpus", "3", **OF_TORCHRUN) == 4
    assert count(**STEP) == 8
    assert count("--num-gpus", "2", **STEP) == 16
    with pytest.raises(ValueError, match="--num-gpus is 0, with --num-machines 2"):
        count("--num-gpus", "0", "--num-machines", "2")
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 0)
    for variables in ({}, OF_TORCHRUN):
        with pytest.raises(ValueError, match="this run needs . GPUs? on this machine, but torch finds 0"):
            count("--num-gpus", "2", device="cuda", **variables)


@pytest.mark.parametrize("options", [(), ("--num-gpus", "0")])
def test_one_process_is_this_one(options, environment):
    called = []
    launch(lambda *values: called.append(values), arguments(*options), (1, "two"), device="cpu")
    assert called == [(1, "two")]


# What a process of a run does; processes that are started anew import it.
JOB = '''
import json, os, signal, sys, time
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from gkd_d2.engine.launch import launch

asked = []


def report(folder):
    """Write down what this process sees of the others."""
    seen = {
        "ranks": comm.all_gather(comm.get_rank()),
        "local rank": comm.get_local_rank(),
        "local size": comm.get_local_size(),
        "ranks of the machine": comm.all_gather(comm.get_rank(), group=comm._LOCAL_PROCESS_GROUP),
        "pid": os.getpid(),
    }
    path = os.path.join(folder, f"{comm.get_rank()}.json")
    with open(path + ".partial", "w") as file:
        json.dump(seen, file)
    os.rename(path + ".partial", path)


def wait_for_sigterm(folder):
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    report(folder)
    while not asked:
        time.sleep(0.05)
    # Both have the signal before one leaves.
    comm.synchronize()
    raise SystemExit(143)


def die(folder):
    report(folder)
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def fail(folder):
    report(folder)
    if comm.get_rank() == 1:
        raise ValueError("street.png: no such image")
    comm.synchronize()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    name, folder = args.opts
    launch(globals()[name], args, (folder,), device="cpu")
'''


@pytest.fixture
def start(tmp_path, project):
    """A function that starts a process of a job, with a function of JOB; at the end of the test it is ended."""
    (tmp_path / "job.py").write_text(JOB)
    started = []

    def start(name, *options, starter=(), **environment):
        command = [sys.executable, *starter, str(tmp_path / "job.py"), *options, name, str(tmp_path)]
        inherited = {key: value for key, value in os.environ.items() if key not in OF_LAUNCHERS}
        inherited |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "ignore"}
        options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        started.append(subprocess.Popen(command, env=inherited | environment, **options))
        return started[-1]

    yield start
    for process in started:
        # With the processes that it started, which may be stopped.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def status(process):
    """The exit status of a process that shall end, with what it wrote where that is not 0."""
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors if process.returncode else ""


def reports(folder, count):
    """What ``count`` processes wrote, once all have, by rank."""
    paths = [folder / f"{rank}.json" for rank in range(count)]
    wait_until(lambda: all(path.exists() for path in paths))
    return [json.loads(path.read_text()) for path in paths]


def check_reports(seen, machines):
    """Whether each process sees all, and itself on its machine; ``machines`` holds the ranks of each."""
    for ranks in machines:
        for local_rank, rank in enumerate(ranks):
            assert seen[rank]["ranks"] == list(range(len(seen)))
            assert seen[rank]["ranks of the machine"] == ranks
            assert (seen[rank]["local rank"], seen[rank]["local size"]) == (local_rank, len(ranks))


def test_sigterm_reaches_the_processes_and_their_status_comes_back(start, tmp_path):
    parent = start("wait_for_sigterm", "--num-gpus", "2")
    seen = reports(tmp_path, 2)
    check_reports(seen, [[0, 1]])
    parent.send_signal(signal.SIGTERM)
    assert status(parent)[0] == 143
    assert not any(is_alive(report["pid"]) for report in seen)


def test_a_process_that_is_killed_ends_the_run(start, tmp_path):
    parent = start("die", "--num-gpus", "2")
    seen = reports(tmp_path, 2)
    code, errors = status(parent)
    assert code == 128 + signal.SIGKILL
    assert "process 1 terminated with signal SIGKILL" in errors
    assert not any(is_alive(report["pid"]) for report in seen)


@pytest.mark.parametrize("told", [True, False])
def test_a_process_that_ended_with_a_sentence_ends_the_run_with_it(told, environment, monkeypatch, caplog):
    """It printed the sentence itself, but others may have printed after it."""

    def spawn(start, args, count):
        if told:
            Path(args[-1]).write_text("the process of rank 1 failed")
        raise ProcessExitedException("process 0 terminated with exit code 1", 0, 1234, 1)

    monkeypatch.setattr(module, "spawn", spawn)
    with pytest.raises(SystemExit) as end:
        launch(pytest.fail, arguments("--num-gpus", "2"), (), device="cpu")
    assert end.value.code == ("the process of rank 1 failed" if told else 1)
    assert ("process 0 terminated" in caplog.text) != told


def test_tasks_of_slurm_are_processes(start, tmp_path):
    """Two on one node, one on another; both nodes are this machine."""
    step = {"SLURM_STEP_NUM_TASKS": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    tasks = []
    for task, (node, local) in enumerate([(0, 0), (0, 1), (1, 0)]):
        place = {"SLURM_PROCID": str(task), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)}
        tasks.append(start("report", **step, **place))
    assert [status(task) for task in tasks] == [(0, "")] * 3
    check_reports(reports(tmp_path, 3), [[0, 1], [2]])


def test_torchrun(start, tmp_path):
    """And why one process failed stands in the last line of the other, too."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run = start("fail", starter=(*torchrun, "--redirects", "2", "--log-dir", str(tmp_path / "logs")))
    assert status(run)[0] == 1
    check_reports(reports(tmp_path, 2), [[0, 1]])
    (path,) = tmp_path.glob("logs/*/attempt_0/0/stderr.log")
    last = path.read_text().splitlines()[-1]
    assert re.fullmatch(r"the process of rank 1 on \S+ failed: ValueError: street.png: no such image", last)
