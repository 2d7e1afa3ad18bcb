"""Runs the trainings of a study, several at once, each in a process of its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import torch

from gkd_d2.analysis.study.job import COST_FILE, Job
from gkd_d2.analysis.study.lock import lock_folder
from gkd_d2.analysis.study.plan import Study
from gkd_d2.analysis.study.processes import TOOLS, end_with, prepare_data, study_environment
from gkd_d2.analysis.study.progress import Progress
from gkd_d2.utils.files import write_whole
from gkd_d2.utils.last_checkpoint import has_checkpoint
from gkd_d2.utils.text import counted

TRAIN = TOOLS / "train_net.py"
# Between two looks whether a folder is free.
LOCK_SECONDS = 1.0

logger = logging.getLogger(__name__)


class Scheduler:
    """Trains what is missing, a number of trainings at a time.

    Args:
        device: "cpu" or "cuda"; trainings take turns on all GPUs.
        at_once: number of trainings that run at the same time.
        imports: modules that each training imports, as by --import.

    Attributes:
        stopped: whether it was told to stop.
    """

    def __init__(self, device: str, at_once: int, *, imports: Sequence[str] = ()):
        self.stopped = False
        self._device = device
        self._slots: queue.Queue[int] = queue.Queue()
        for slot in range(at_once):
            self._slots.put(slot)
        self._at_once = at_once
        self._imports = [text for module in imports for text in ("--import", module)]
        # Of the running trainings.
        self._pids: set[int] = set()
        # A second signal may come while the first one is handled, in the same thread.
        self._lock = threading.RLock()

    def run_all(self, studies: Sequence[Study]) -> dict[Path, str]:
        """Make the data of studies and train all that they lack, while no other process trains in their folders.

        Returns:
            As of :meth:`run`, of all studies.

        Raises:
            ValueError: a folder is taken or holds another training, or data can't be made.
        """
        failed = {}
        with contextlib.ExitStack() as locks:
            for study in studies:
                locks.enter_context(lock_folder(study.output))
            for study in studies:
                prepare_data(study)
            for study in studies:
                failed |= self.run(study)
        return failed

    def run(self, study: Study) -> dict[Path, str]:
        """Train all that a study still lacks: teachers, then what chooses weights, then what is reported.

        A training that was interrupted goes on from its last checkpoint. One that fails stops none but those that
        need it.

        Returns:
            Folder -> why it holds no finished training.

        Raises:
            ValueError: a folder holds another training.
        """
        progress = Progress(study)
        teachers = {detector: study.teacher_job(detector) for detector in study.detectors}
        failed = self._train_all(study, teachers.values(), progress)
        ready = [detector for detector, teacher in teachers.items() if teacher.finished()]
        pairs = [
            (detector, name) for name in study.settings for detector in ready if name in study.settings_of(detector)
        ]
        tuning = [job for pair in pairs for jobs in study.tuning_jobs(*pair).values() for job in jobs]
        failed |= self._train_all(study, tuning, progress)
        reported = {pair: study.student_jobs(*pair) for pair in pairs}
        # All settings with the first seed before any with the second: what is there can be compared at any time.
        in_turn = [jobs[seed] for seed in study.seeds for jobs in reported.values() if jobs]
        failed |= self._train_all(study, in_turn, progress)
        for (detector, name), jobs in reported.items():
            if not jobs:
                failed[study.output / detector / name] = "needs the trainings that choose its weights"
        return failed

    def stop(self) -> None:
        """Let running trainings save their state and end, and start none."""
        with self._lock:
            self.stopped = True
            for pid in self._pids:
                # It may have ended just now.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

    def _train_all(self, study: Study, jobs: Iterable[Job], progress: Progress) -> dict[Path, str]:
        """Train what is not finished; folder -> why it failed."""
        # Settings that do not differ in weights are one training.
        missing = {job.folder: job for job in jobs if not job.finished()}
        if not missing or self.stopped:
            return {}
        logger.info("%s to go, %d at once", counted(len(missing), "training"), self._at_once)
        with ThreadPoolExecutor(self._at_once) as pool:
            reasons = list(pool.map(lambda job: self._train_one(study, job, progress), missing.values()))
        return {folder: reason for folder, reason in zip(missing, reasons) if reason}

    def _train_one(self, study: Study, job: Job, progress: Progress) -> str:
        """Train in a slot of one's own; why it failed."""
        slot = self._slots.get()
        try:
            before = job.iterations()
            reason = self._train(study, job, slot)
            # A stop may have left it unfinished.
            if job.finished():
                logger.info("%s: %s", job.folder, progress.ended(job, job.config.SOLVER.MAX_ITER - before))
        except (OSError, ValueError) as error:
            reason = str(error)
        finally:
            self._slots.put(slot)
        if reason:
            logger.error("%s: %s", job.folder, reason)
        return reason

    def _train(self, study: Study, job: Job, slot: int) -> str:
        """Train in a folder that no other process trains in; why it failed."""
        job.folder.mkdir(parents=True, exist_ok=True)
        with (job.folder / "console.txt").open("a", encoding="utf-8") as log:
            self._lock_folder(job.folder, log)
            if self.stopped:
                return ""
            status = 0
            if not job.finished():
                # Nothing of an attempt that left no checkpoint goes on.
                if not has_checkpoint(str(job.folder)):
                    (job.folder / "metrics.json").unlink(missing_ok=True)
                logger.info("%s: starts", job.folder)
                status = self._run(study, job, slot, log)
            if job.finished():
                for checkpoint in job.folder.glob("model_[0-9]*.pth"):
                    checkpoint.unlink()
                return ""
        if self.stopped:
            return ""
        if status == 0:
            return f"the training ended, but holds no evaluation on {study.dataset}"
        return f"the training ended with status {status}: see console.txt there"

    def _lock_folder(self, folder: Path, log: IO[str]) -> None:
        """Wait until no other process trains in a folder, and keep others from it until this training has ended.

        The lock is on the open file that the training inherits as its output: it lasts as long as the training, even
        where this process is killed and the training still saves its state.
        """
        said = False
        while not self.stopped:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not said:
                    logger.info("%s: another process trains there; waiting for its end", folder)
                said = True
                time.sleep(LOCK_SECONDS)

    def _run(self, study: Study, job: Job, slot: int, log: IO[str]) -> int:
        """Run the training to its end; its exit status, negative where a signal ended it."""
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
        command += [*self._imports, *job.options, "MODEL.DEVICE", self._device]
        with self._lock:
            if self.stopped:
                return 0
            # A signal to the whole group, as Ctrl-C in a terminal, must not reach it twice.
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=end_with(os.getpid()),
            )
            self._pids.add(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        with self._lock:
            self._pids.discard(process.pid)
        if process.returncode == 0:
            cost = {"resident_megabytes": usage.ru_maxrss / 1024, "at_once": self._at_once, "device": self._device}
            write_whole({job.folder / COST_FILE: json.dumps(cost) + "\n"})
        return process.returncode
