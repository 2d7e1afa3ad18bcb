"""A study's folder is one process's at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

# Holds the number of the process that trains in a study's folder.
_LOCK_FILE = "study.lock"


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from training in the folder of a study, which is made if need be.

    The lock ends with this process, however that ends.

    Raises:
        ValueError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # The other one may have locked it just now, and not have written its number yet.
            time.sleep(1)
            file.seek(0)
            raise ValueError(
                f"{folder}: another run_study.py trains there, process {file.read()}: wait for its end, stop it, "
                "or choose another --output"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield
