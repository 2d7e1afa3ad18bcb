"""Runs the trainings of a study, several at once, each in a process of its own."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from gkd_d2.study.plan import Job, Study

TRAIN = Path(__file__).resolve().parents[2] / "tools" / "train_net.py"
# What the operating system knows of a training, beside its own metrics.
COST_FILE = "study_cost.json"

logger = logging.getLogger(__name__)


class Scheduler:
    """Trains what is missing, a number of trainings at a time.

    Args:
        device: "cpu" or "cuda"; trainings take turns on all GPUs.
        at_once: number of trainings that run at the same time.
    """

    def __init__(self, device: str, at_once: int):
        self._device = device
        self._slots: queue.Queue[int] = queue.Queue()
        for slot in range(at_once):
            self._slots.put(slot)
        self._at_once = at_once
        self._stopping = threading.Event()
        self._processes: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def run(self, study: Study) -> list[Path]:
        """Train all that a study still lacks: teachers, then what chooses weights, then what is reported.

        A training that was interrupted goes on from its last checkpoint. One that fails stops none but those that
        need it.

        Returns:
            The folders of the trainings that failed or need one that did.

        Raises:
            ValueError: a folder holds another training.
        """
        teachers = {detector: study.teacher_job(detector) for detector in study.detectors}
        failed = self._run_all(study, teachers.values())
        ready = [detector for detector, job in teachers.items() if job.folder not in failed]
        pairs = [
            (detector, name) for name in study.settings for detector in ready if name in study.settings_of(detector)
        ]
        tuning = {pair: [job for jobs in study.tuning_jobs(*pair).values() for job in jobs] for pair in pairs}
        failed += self._run_all(study, [job for jobs in tuning.values() for job in jobs])
        reported = []
        for detector, name in pairs:
            chosen_by = tuning.get((detector, study.settings[name].scale_of or name), [])
            if any(job.folder in failed for job in chosen_by):
                failed.append(study.output / detector / name)
            elif not self._stopping.is_set():
                reported += study.student_jobs(detector, name).items()
        # All settings with the first seed before any with the second: what is there can be compared at any time.
        failed += self._run_all(
            study, [job for _, job in sorted(reported, key=lambda pair: study.seeds.index(pair[0]))]
        )
        return failed

    def stop(self) -> None:
        """Let running trainings save their state and end, and start none."""
        self._stopping.set()
        with self._lock:
            for process in self._processes:
                process.send_signal(signal.SIGTERM)

    @property
    def stopped(self) -> bool:
        """Whether it was told to stop."""
        return self._stopping.is_set()

    def _run_all(self, study: Study, jobs: Iterable[Job]) -> list[Path]:
        """Train what is not done; the folders of those that failed."""
        # Settings that do not differ in weights are one training.
        missing = list({job.folder: job for job in jobs if not job.done(study.dataset)}.values())
        if not missing:
            return []
        logger.info("%d trainings to go, %d at once", len(missing), self._at_once)
        with ThreadPoolExecutor(self._at_once) as pool:
            succeeded = list(pool.map(lambda job: self._run_one(study, job), missing))
        return [job.folder for job, success in zip(missing, succeeded) if not success]

    def _run_one(self, study: Study, job: Job) -> bool:
        slot = self._slots.get()
        try:
            if self._stopping.is_set():
                return False
            logger.info("%s", job.folder)
            job.folder.mkdir(parents=True, exist_ok=True)
            status = self._train(study, job, slot)
            if self._stopping.is_set():
                return False
            if status or not job.done(study.dataset):
                logger.error("%s failed with status %d: see console.txt there", job.folder, status)
                return False
            for checkpoint in job.folder.glob("model_[0-9]*.pth"):
                checkpoint.unlink()
            return True
        finally:
            self._slots.put(slot)

    def _train(self, study: Study, job: Job, slot: int) -> int:
        """Run the training to its end; its exit status."""
        environment = os.environ | study_environment(study)
        gpus = "0"
        if self._device == "cuda":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
            environment["CUDA_VISIBLE_DEVICES"] = names[slot % len(names)]
            gpus = "1"
        else:
            environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // self._at_once))
        command = [sys.executable, str(TRAIN), "--resume", "--num-gpus", gpus, "--config-file", job.config_file]
        command += [*job.options, "MODEL.DEVICE", self._device]
        with (job.folder / "console.txt").open("a", encoding="utf-8") as log:
            with self._lock:
                # A signal to the whole group, as Ctrl-C in a terminal, must not reach it twice.
                process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
                self._processes.add(process)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            with self._lock:
                self._processes.discard(process)
        if process.returncode == 0:
            cost = {"resident_megabytes": usage.ru_maxrss / 1024, "at_once": self._at_once, "device": self._device}
            (job.folder / COST_FILE).write_text(json.dumps(cost) + "\n", encoding="utf-8")
        return process.returncode


def study_environment(study: Study) -> dict[str, str]:
    """What the environment of a study's trainings has beside that of this process."""
    # Today's torch warns of much that Detectron2 does.
    environment = {"PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore")}
    if study.prepare:
        environment["DETECTRON2_DATASETS"] = str(study.output.resolve() / "datasets")
    return environment


def prepare_data(study: Study) -> None:
    """Run the tool that makes a study's data.

    Raises:
        ValueError: it failed.
    """
    if not study.prepare:
        return
    tool, *arguments = map(str, study.prepare)
    command = [sys.executable, str(TRAIN.parent / tool), *arguments]
    done = subprocess.run(command, env=os.environ | study_environment(study), capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command[1:])} failed:\n{done.stdout}{done.stderr}")
