"""Which checkpoint of a run's folder a resume goes on from."""

from __future__ import annotations

import dataclasses
import os
import re

_POINTER = "last_checkpoint"
_LONGEST_NAME = 255


@dataclasses.dataclass(frozen=True)
class Resumable:
    """What a folder holds to go on from.

    Attributes:
        paths: of checkpoints; the one to take, and those to fall back to where it is damaged. The first may not exist.
        fault: why ``last_checkpoint`` does not tell which to take; empty where it does, or where nothing is there.
    """

    paths: tuple[str, ...]
    fault: str

    @property
    def last(self) -> str:
        """The one to take; empty where there is none."""
        return self.paths[0] if self.paths else ""

    @property
    def warning(self) -> str:
        """What to say before it is taken; empty where all is well."""
        if not (self.fault and self.paths):
            return ""
        return f"{self.fault}: {self.last} is taken, the newest checkpoint there by its name"


def has_checkpoint(folder: str) -> bool:
    """Whether a run in ``folder`` has left something to go on from, even if damaged."""
    found = find_resumable(folder)
    return bool(found.paths or found.fault)


def find_resumable(folder: str) -> Resumable:
    """Look for the checkpoints of a run that can go on, by their names; none is opened.

    The first is the one that ``last_checkpoint`` names. Where it names none, it is model_final.pth or else the one of
    the latest iteration. model_stopped.pth and other names are never taken by themselves.

    Args:
        folder: OUTPUT_DIR of the run.
    """
    files = [name for name in _names(folder) if os.path.isfile(os.path.join(folder, name))]
    numbered = [name for name in files if _iteration(name) is not None]
    # All processes of a run must find the same order, of names with the same number too.
    numbered.sort(key=lambda name: (_iteration(name), name), reverse=True)
    newest = ["model_final.pth", *numbered] if "model_final.pth" in files else numbered
    fault = ""
    try:
        named = _read_pointer(folder)
        # Those of a later iteration are of another run, which the folder held earlier.
        end = _iteration(named)
        names = [named, *(name for name in numbered if name != named and (end is None or _iteration(name) < end))]
    except (FileNotFoundError, NotADirectoryError):
        names = newest
        fault = f"{folder} holds checkpoints but no {_POINTER}" if newest else ""
    except _PointerError as error:
        names = newest
        fault = f"{os.path.join(folder, _POINTER)} {error}"
    return Resumable(tuple(os.path.join(folder, name) for name in names), fault)


class _PointerError(ValueError):
    """last_checkpoint names no checkpoint; the text is what to say after its name."""


def _read_pointer(folder: str) -> str:
    """The name that last_checkpoint holds."""
    path = os.path.join(folder, _POINTER)
    if os.path.exists(path) and not os.path.isfile(path):
        raise _PointerError("is no file")
    try:
        with open(path, "rb") as file:
            content = file.read(4096)
        name = content.decode("utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except UnicodeDecodeError:
        raise _PointerError("is no text") from None
    except OSError as error:
        raise _PointerError(f"can't be read ({error.strerror})") from None
    if not name:
        raise _PointerError("is empty")
    if name != os.path.basename(name) or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise _PointerError(f"names {name[:_LONGEST_NAME]!a}, which is no file of its folder")
    if not name.endswith(".pth"):
        raise _PointerError(f"names {name}, but a run goes on from a .pth alone")
    return name


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder or os.curdir)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _iteration(name: str) -> int | None:
    """The number in the name of a checkpoint that was written on the way."""
    match = re.fullmatch(r"model_(\d+)\.pth", name)
    return int(match[1]) if match else None
