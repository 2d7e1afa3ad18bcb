"""Why a run of several processes failed, told by the process that failed to those that fail because of it."""

from __future__ import annotations

import contextlib
import datetime
import logging
import socket
import threading
from collections.abc import Callable, Iterator

from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

_KEY = "gkd_d2/failure"
# For a store whose machine may be lost.
_SECONDS = 3


@contextlib.contextmanager
def failures_told(report: str | None) -> Iterator[None]:
    """Tell the other processes of the run why this one fails, in the statements of the ``with``; the first counts.

    Args:
        report: a file that is written where this process fails and none before it, for the process that started it;
            None where nothing reads one.

    Raises:
        SystemExit: with a sentence that names the process that failed and its reason, where this one fails in a
            collective because of it.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        errors = list(_chain(error))
        if not _is_of_collective(errors[-1]):
            reason = _reason(next(e for e in errors if not _is_of_collective(e)))
            if reason:
                sentence = f"the process of rank {distributed.get_rank()} on {socket.gethostname()} failed: {reason}"
                _within(_SECONDS, _tell, sentence)
                _write(report, sentence)
            raise
        sentence = _within(_SECONDS, _first_failure)
        if sentence is None:
            raise
        _write(report, sentence)
        logging.getLogger(__name__).error("%s", sentence)
        raise SystemExit(sentence) from None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came of, the first of them at the end."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_collective(error: BaseException) -> bool:
    """Whether it says no more than that other processes are gone; gloo's errors have no class of their own."""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _reason(error: BaseException) -> str:
    """An error in a few words; empty for an exit with a number, which is no failure or was told."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, str) else ""
    text = str(error).strip()
    # That of a loader's worker comes with its traceback.
    if "\nOriginal Traceback " in text:
        return text.splitlines()[-1]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _tell(sentence: str) -> None:
    _get_default_store().compare_set(_KEY, "", sentence)


def _first_failure() -> str:
    store = _get_default_store()
    store.wait([_KEY], datetime.timedelta(seconds=_SECONDS))
    return store.get(_KEY).decode()


def _write(report: str | None, sentence: str) -> None:
    if report is not None:
        with contextlib.suppress(OSError), open(report, "x", encoding="utf-8") as file:
            file.write(sentence)


def _within(seconds: float, function: Callable, *args):
    """What a function returns; None where it takes longer, or the store's process is gone."""
    results = []

    def call():
        with contextlib.suppress(distributed.DistError):
            results.append(function(*args))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
