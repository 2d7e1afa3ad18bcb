"""Files that appear whole or not at all, and folders that can be written to."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

# A disk that is full may still take a file's name.
_PROBE_BYTES = 4096


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Give an error of the system that names no file, as of a disk that fills up, the name of what is written.

    Args:
        path: of the file, or the folder of several.

    Raises:
        OSError: with a name.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextlib.contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when all went well, and is removed otherwise.

    Args:
        path: of the file.
        suffix: of the temporary file; the default is another in each process. With a fixed one the next writing takes
            the place of what a killed process left, which a large file needs.
    """
    temporary = path.with_name(f"{path.name}.{suffix or f'{os.getpid()}.tmp'}")
    try:
        with naming(path):
            yield temporary
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def fill(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file, and see that every byte reaches the disk."""
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def write_whole(texts: dict[Path, str]) -> None:
    """Write text files, of which a name holds all of the text or what it held before; folders are made if need be.

    Args:
        texts: path -> content. No file takes its name before each of them is on the disk.

    Raises:
        OSError: one can't be written; the folders that were made for it are removed.
    """
    with contextlib.ExitStack() as stack:
        for path in texts:
            stack.enter_context(making_folder(path.parent))
        for path, text in texts.items():
            temporary = stack.enter_context(replacing(path))
            fill(temporary, lambda file, text=text: file.write(text.encode()))


@contextlib.contextmanager
def making_folder(path: Path) -> Iterator[None]:
    """Make a folder, and the folders above it; those that were made are removed where what follows fails."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def nearest_folder(path: str | os.PathLike) -> Path:
    """The folder of ``path`` itself, or the nearest above it, that is there.

    Raises:
        NotADirectoryError: something else stands there, such as a file or a link to nothing.
    """
    path = Path(path)
    place = next(p for p in (path, *path.parents, Path()) if os.path.lexists(p))
    if not place.is_dir():
        what = "a file" if place.is_file() else "no folder" if place.exists() else "a link that leads to nothing"
        raise NotADirectoryError(f"{place} is {what}")
    return place


def check_writable(folder: str | os.PathLike, name: str) -> None:
    """Check that files can be written to a folder, or to a new one in its place; nothing is left behind.

    Args:
        folder: may be missing, and folders above it too.
        name: of the key or option that sets it, for the error.

    Raises:
        OSError: no file can be written there; the message names the folder and the reason.
    """
    try:
        place = nearest_folder(folder)
    except NotADirectoryError as error:
        reason = str(error)
    else:
        try:
            # Rights do not tell all: not of a file system that is read-only, nor of a disk that is full.
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
            return
        except OSError as error:
            reason = f"no file can be written to {place} ({error.strerror})"
    raise OSError(f"{name} is {os.fspath(folder)!r}, but {reason}: name a folder that can be written to")


def check_file_writable(path: str | os.PathLike, name: str) -> None:
    """Check that a file can be written in its folder, which is there; nothing is left behind.

    Args:
        path: of the file, which may be missing.
        name: of the option that sets it, for the error.

    Raises:
        OSError: it can't be written; the message names the file and the reason.
    """
    folder = os.path.dirname(path) or os.curdir
    if os.path.isdir(path):
        raise IsADirectoryError(f"{name} {os.fspath(path)} can't be written: it is a folder")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{name} {os.fspath(path)} can't be written: there is no folder {folder}")
    check_writable(folder, f"the folder of {name}")
