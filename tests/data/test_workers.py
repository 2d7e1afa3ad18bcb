"""Workers of the training loader outlive SIGTERM, and a run ends where one of them is killed."""

import os
import re
import signal
import subprocess
import sys
from itertools import islice
from multiprocessing import resource_tracker

from batches import build, equal, load
from processes import PATIENCE

from gkd_d2.data.workers import outliving_sigterm


def test_workers_outlive_sigterm(cfg):
    """Slurm sends it to all processes of a job, and the trainer needs its batch to finish the iteration."""
    cfg.DATALOADER.NUM_WORKERS = 2
    whole = load(cfg, 20)
    batches = iter(build(cfg))
    # One of each worker, which is then set up.
    assert equal([next(batches), next(batches)], whole[:2])
    # This process is the trainer, whose own signals a worker obeys.
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in batches._workers)], check=True)
    assert equal(list(islice(batches, 18)), whole[2:])


def test_workers_that_are_still_starting_outlive_sigterm(cfg):
    """They import all modules first where the trainer's process was spawned, as each of several on a machine is."""
    cfg.DATALOADER.NUM_WORKERS = 2
    loader = build(cfg)
    loader.multiprocessing_context = "spawn"
    # A process that was spawned has Python's tracker of resources already, whose start would unblock the signal.
    resource_tracker.ensure_running()
    with outliving_sigterm():
        batches = iter(loader)
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in batches._workers)], check=True)
    assert equal(list(islice(batches, 4)), load(cfg, 4))
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


# One worker of two dies; the error, which nothing catches, keeps the loader and with it the other worker alive.
FAILING_RUN = """
import os, signal
from detectron2.data import DatasetCatalog
from tiny import detector_config
from gkd_d2.data.build import build_train_loader

DatasetCatalog.register("failing", lambda: [{"width": 2, "height": 1, "annotations": []}] * 9)
cfg = detector_config("retinanet")
cfg.DATASETS.TRAIN = ("failing",)
cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
cfg.DATALOADER.NUM_WORKERS = 2

def train():
    batches = iter(build_train_loader(cfg, dict))
    next(batches)
    os.kill(batches._workers[0].pid, signal.SIGKILL)
    while True:
        next(batches)

train()
"""


def test_a_run_whose_worker_is_killed_ends(project):
    """As by the kernel, when memory runs out."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAILING_RUN],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(project / "tests")])},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1
    assert re.search(r"RuntimeError: DataLoader worker \(pid.*\) is killed by signal: Killed", done.stderr)
