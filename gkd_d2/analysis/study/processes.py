"""The processes that a study starts: their environment and end, and the one that makes its data."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from gkd_d2.analysis.study.plan import Study

TOOLS = Path(__file__).resolve().parents[3] / "tools"
# Of linux/prctl.h.
_PR_SET_PDEATHSIG = 1
# Loaded here, as a child of a process with threads must do as little as possible before it becomes another program.
_libc = ctypes.CDLL(None)


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
    command = [sys.executable, str(TOOLS / tool), *arguments]
    done = subprocess.run(
        command,
        env=os.environ | study_environment(study),
        capture_output=True,
        text=True,
        preexec_fn=end_with(os.getpid()),
    )
    if done.returncode:
        raise ValueError(f"{' '.join(command[1:])} failed:\n{done.stdout}{done.stderr}")


def end_with(parent: int) -> Callable[[], None] | None:
    """What a child process is to do first, so that it gets SIGTERM as soon as this process is gone, even if killed.

    The kernel means the thread that starts the child: it has to live as long.

    Args:
        parent: number of this process.
    """
    if sys.platform != "linux":
        return None

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare
