"""SIGTERM where the main thread does not come back to Python, and to processes that are stopped."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from processes import PATIENCE, is_alive, wait_until

from gkd_d2.engine import sigterm
from gkd_d2.engine.sigterm import SigtermRelay, SigtermWatch

# The main thread waits within C for a lock that it holds itself, signal or not; a worker waits, too.
WAITING = """
import ctypes, multiprocessing, time
from gkd_d2.engine import sigterm

sigterm.GRACE_SECONDS = 0.2
watch = sigterm.SigtermWatch()
watch.start()
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
worker.start()
print(worker.pid, flush=True)
mutex = ctypes.create_string_buffer(64)
while True:
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.fixture
def watch():
    watch = SigtermWatch()
    watch.start()
    yield watch
    watch.release()


def test_the_process_and_its_workers_end_in_time():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", WAITING], **pipes)
    worker = int(process.stdout.readline())
    os.kill(worker, signal.SIGSTOP)
    process.terminate()
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert "SIGTERM: what was under way did not end within 0.2 s" in errors
    wait_until(lambda: not is_alive(worker))


def test_whoever_handled_the_signal_before_handles_it_again():
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    handler = signal.getsignal(signal.SIGTERM)
    before = signal.set_wakeup_fd(writer.fileno())
    try:
        # A second training in one process, too.
        for _ in range(2):
            watch = SigtermWatch()
            watch.start()
            assert not watch.asked
            signal.raise_signal(signal.SIGTERM)
            wait_until(lambda watch=watch: watch.asked)
            # An event loop goes on seeing its signals.
            assert reader.recv(1) == bytes([signal.SIGTERM])
            watch.release()
            assert signal.getsignal(signal.SIGTERM) is handler
            assert signal.set_wakeup_fd(writer.fileno()) == writer.fileno()
    finally:
        signal.set_wakeup_fd(before)
        reader.close()
        writer.close()


def test_the_signal_of_a_forked_process_is_its_own(watch):
    """As of a loader's worker, which lives on for the same time."""
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    worker.start()
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(timeout=1)
    assert worker.is_alive()
    assert not watch.asked
    worker.kill()
    worker.join()


def test_time_that_was_extended_counts_anew(watch, monkeypatch):
    ended = []
    monkeypatch.setattr(sigterm, "_end", lambda: ended.append(time.monotonic()))
    monkeypatch.setattr(sigterm, "GRACE_SECONDS", 0.5)
    signal.raise_signal(signal.SIGTERM)
    wait_until(lambda: watch.asked)
    time.sleep(0.2)
    start = time.monotonic()
    watch.extend()
    wait_until(lambda: ended)
    assert len(ended) == 1 and ended[0] - start >= 0.5


@pytest.mark.parametrize("stuck", [[0], [0, 1]])
def test_processes_that_do_not_end_are_killed(stuck, monkeypatch):
    monkeypatch.setattr(sigterm, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(sigterm, "_LAST_SECONDS", 0.2)
    handler = signal.getsignal(signal.SIGTERM)
    children = []
    for number in range(2):
        # Processes that are forked inherit it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN if number in stuck else signal.SIG_DFL)
        children.append(multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)))
        children[-1].start()
    signal.signal(signal.SIGTERM, handler)
    with SigtermRelay() as relay:
        signal.raise_signal(signal.SIGTERM)
        for child in children:
            child.join(timeout=PATIENCE)
    assert relay.killed == {children[number].pid for number in stuck}
    ends = [signal.SIGKILL if number in stuck else signal.SIGTERM for number in range(2)]
    assert [child.exitcode for child in children] == [-number for number in ends]
    assert signal.getsignal(signal.SIGTERM) == handler
