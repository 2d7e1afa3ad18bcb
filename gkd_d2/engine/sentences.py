"""Errors that end a run in a sentence."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator

from gkd_d2.engine.output import naming_output


@contextlib.contextmanager
def ending_in_a_sentence(folder: str, *kinds: type[Exception]) -> Iterator[None]:
    """End the process with the text of an error that this project raises; other errors pass.

    Args:
        folder: the run's OUTPUT_DIR, which may be read, too. An error of writing to it is an OutputError here.
        kinds: of errors.

    Raises:
        SystemExit: there was such an error; with its text.
    """
    try:
        with naming_output(folder, reads=True):
            yield
    except kinds as error:
        # What gkd_d2 refuses it says in a sentence; of any other fault the traceback says more.
        if not _raised_here(error):
            raise
        sys.exit(str(error))


def _raised_here(error: Exception) -> bool:
    """Whether the statement that raised an error is one of this project's."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith("gkd_d2.")
