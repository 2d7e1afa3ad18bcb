"""A loader's worker processes outlive SIGTERM, so that the trainer can finish its iteration and save."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def outliving_sigterm() -> Iterator[None]:
    """Within it a loader's workers start such that SIGTERM does not end them before :func:`init_worker` handles it.

    Where the trainer's own process was spawned they are, too, and import all modules anew: that takes seconds.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(worker: int) -> None:
    """Keep a worker alive when SIGTERM comes: a ``worker_init_fn`` of DataLoader.

    Slurm signals every process of a job, and a worker that died of it would keep the trainer from saving. Only the
    trainer's own SIGTERM, which Python sends to its workers when it ends, is obeyed.

    Args:
        worker: its number.
    """

    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    if not hasattr(signal, "sigwaitinfo"):
        return  # macOS, which has no Slurm either
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()
