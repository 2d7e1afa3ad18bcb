"""SIGTERM, noticed by a process whose main thread can't, and passed on to the processes that it started."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

# What a shell reports of a process that SIGTERM ended.
EXIT_BY_SIGTERM = 128 + signal.SIGTERM
# For the iteration that is under way, and again for its checkpoint; Slurm's own limit is half of it by default.
GRACE_SECONDS = 60
# For the other processes of a run that is stopped, from the end of the first one on.
_LAST_SECONDS = 5
# No signal has this number.
_STOP = b"\0"


class SigtermWatch:
    """Gives the process GRACE_SECONDS from SIGTERM on, and then ends it with EXIT_BY_SIGTERM, whatever it does.

    Python's own handlers run in the main thread, which never comes back from a collective whose other processes are
    gone. The signal's number, which Python also writes to a socket, is read by a thread instead.

    Attributes:
        asked: whether the signal has come, or the time was extended.
    """

    def __init__(self):
        self.asked = False
        # A handler may interrupt the thread that holds it.
        self._lock = threading.RLock()
        self._deadline: threading.Timer | None = None
        self._handler: Callable | int | None = None
        self._writer: socket.socket | None = None
        self._wakeup = -1

    def start(self) -> None:
        """Handle the signal from now on; to be called in the main thread."""
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self._thread.start()
        # Without a handler Python writes nothing; and a forked process has this one alone.
        self._handler = signal.signal(signal.SIGTERM, lambda *_: self._ask())
        _started.add(self)

    def extend(self) -> None:
        """Give the process GRACE_SECONDS from now on, whether it has had the signal or another process of the run."""
        with self._lock:
            self.asked = True
            if self._deadline is not None:
                self._deadline.cancel()
            self._deadline = threading.Timer(GRACE_SECONDS, _end)
            self._deadline.daemon = True
            self._deadline.start()

    def release(self) -> None:
        """Leave the signal to whoever handled it before, and the process its time; the main thread's, as start."""
        if self._writer is not None:
            _started.discard(self)
            if self._handler is not None:
                signal.signal(signal.SIGTERM, self._handler)
            signal.set_wakeup_fd(self._wakeup)
            self._writer.send(_STOP)
            self._thread.join()
            self._writer.close()
            self._writer = None
        with self._lock:
            if self._deadline is not None:
                self._deadline.cancel()

    def _ask(self) -> None:
        with self._lock:
            if not self.asked:
                self.extend()

    def _read(self, reader: socket.socket) -> None:
        with reader:
            while (number := reader.recv(1)) != _STOP:
                if number[0] == signal.SIGTERM:
                    self._ask()
                # Of whoever asked Python for them before, as an event loop does.
                if self._wakeup != -1:
                    with contextlib.suppress(OSError):
                        os.write(self._wakeup, number)


class SigtermRelay:
    """Passes SIGTERM on to the processes that this one started, within a ``with`` statement of the main thread.

    Those that do not end in time are killed, as one is that is stopped and handles no signal.

    Attributes:
        killed: numbers of these processes.
    """

    def __init__(self):
        self.killed: set[int] = set()
        self._asked = False
        self._handler: Callable | int | None = None

    def __enter__(self) -> SigtermRelay:
        self._handler = signal.signal(signal.SIGTERM, self._pass_on)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGTERM, self._handler)

    def _pass_on(self, number: int, frame) -> None:
        children = multiprocessing.active_children()
        for child in children:
            os.kill(child.pid, number)
        if not children:
            raise SystemExit(EXIT_BY_SIGTERM)
        if not self._asked:
            self._asked = True
            threading.Thread(target=self._kill_the_last, args=(children,), daemon=True).start()

    def _kill_the_last(self, children: list[BaseProcess]) -> None:
        # Only the main thread may ask a process for its status.
        left = {child.sentinel: child.pid for child in children}
        end = time.monotonic() + 2 * GRACE_SECONDS + _LAST_SECONDS
        while left and (seconds := end - time.monotonic()) > 0:
            for sentinel in wait(left, seconds):
                del left[sentinel]
                end = min(end, time.monotonic() + _LAST_SECONDS)
        for pid in left.values():
            self.killed.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _end() -> None:
    """End the process and its loaders' workers, whatever holds them."""
    # The main thread may hold the lock of a log, and stay where it is.
    text = f"SIGTERM: what was under way did not end within {GRACE_SECONDS:g} s; the last checkpoint stays as it is"
    message = threading.Thread(target=logging.getLogger(__name__).error, args=(text,), daemon=True)
    message.start()
    message.join(timeout=1)
    try:
        for worker in multiprocessing.active_children():
            worker.kill()
    finally:
        os._exit(EXIT_BY_SIGTERM)


# The watches that read signals, and what Python wrote to before a process was forked.
_started: set[SigtermWatch] = set()
_wakeup_of_parent: list[int] = []


def _before_fork() -> None:
    """A forked process would write its own signals to its parent's socket."""
    if _started and threading.current_thread() is threading.main_thread():
        _wakeup_of_parent.append(signal.set_wakeup_fd(-1))


def _after_fork() -> None:
    if _wakeup_of_parent and threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(_wakeup_of_parent.pop())


def _in_forked_process() -> None:
    if _started:
        signal.set_wakeup_fd(-1)
    _started.clear()
    _wakeup_of_parent.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_forked_process)
