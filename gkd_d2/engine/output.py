"""What a run says where its OUTPUT_DIR can't be written to any more."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from gkd_d2.modeling.student import find_checkpoint

# Of these only writing is to blame.
_WRITING_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class OutputError(OSError):
    """A file of a run can't be written; the text names it, says why, and what a resume goes on from."""

    @classmethod
    def of(cls, what: str, error: OSError, folder: str) -> OutputError:
        """The error of a file.

        Args:
            what: the file that can't be written.
            error: what the system said.
            folder: the run's OUTPUT_DIR.
        """
        try:
            last = f"The last whole checkpoint is {find_checkpoint(Path(folder))}: --resume goes on from it"
        except OSError:
            last = f"{folder} holds no checkpoint to go on from"
        return cls(f"{what} can't be written ({error.strerror or error}). {last}")


@contextlib.contextmanager
def naming_output(folder: str, what: str = "", *, reads: bool = False) -> Iterator[None]:
    """Raise errors of writing to OUTPUT_DIR as :class:`OutputError`; all others pass.

    Args:
        folder: the run's OUTPUT_DIR.
        what: is written, for errors that name no file.
        reads: whether files of ``folder`` are read, too: then only errors that reading never meets are taken for those
            of writing, else also those that name a file there.

    Raises:
        OutputError: something can't be written.
    """
    try:
        yield
    except OutputError:
        raise
    except (OSError, RuntimeError) as error:
        fault = _system_error(error)
        if fault is None:
            raise
        path = fault.filename if isinstance(fault.filename, str) else ""
        if fault.errno not in _WRITING_ERRORS and (reads or not (path and _is_below(path, folder))):
            raise
        raise OutputError.of(path or what or f"a file in {folder}", fault, folder) from error


def _system_error(error: Exception) -> OSError | None:
    """What the system said; where torch can't write it complains about its file, and that comes before."""
    fault = error if isinstance(error, OSError) else error.__context__
    return fault if isinstance(fault, OSError) and fault.errno is not None else None


def _is_below(path: str, folder: str) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
