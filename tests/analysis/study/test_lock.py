"""A study's folder has one process at a time."""

import os
import subprocess
import sys

import pytest

from gkd_d2.analysis.study.lock import lock_folder

# In another process.
HOLD = """
import pathlib, sys, time
from gkd_d2.analysis.study.lock import lock_folder
with lock_folder(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_trains_in_a_folder(tmp_path):
    """Until it ends, even if it is killed."""
    folder = tmp_path / "runs" / "small"
    command = [sys.executable, "-c", HOLD, str(folder)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"{folder}: another run_study.py trains there, process {other.pid} on "):
        lock_folder(folder).__enter__()
    other.kill()
    other.wait()
    with lock_folder(folder), pytest.raises(ValueError, match=f"process {os.getpid()} on "):
        lock_folder(folder).__enter__()
    with lock_folder(folder):
        pass
