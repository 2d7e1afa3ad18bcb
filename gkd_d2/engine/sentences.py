"""Errors that end a run in a sentence, in whichever of its processes they come up."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator

from torch.multiprocessing import ProcessRaisedException

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


class LastSentence:
    """Lets a run of several processes end with the sentence of the one that failed, after all else that they print.

    Args:
        main: what each process of the run calls. Called in its place, this does the same, and keeps the sentence.
    """

    def __init__(self, main: Callable):
        self._main = main
        self._receiver, self._sender = multiprocessing.Pipe(duplex=False)

    def __call__(self, *args):
        try:
            return self._main(*args)
        except SystemExit as end:
            if not isinstance(end.code, str):
                raise
            self._sender.send(end.code)
            raise SystemExit(1) from end

    @contextlib.contextmanager
    def said_last(self) -> Iterator[None]:
        """Within it the processes are started and waited for.

        Raises:
            SystemExit: with the sentence, where there is one.
        """
        try:
            yield
        except (SystemExit, ProcessRaisedException):
            if not self._receiver.poll():
                raise
            sys.exit(self._receiver.recv())
