"""Why a process failed, as it tells the others."""

import threading

import pytest
from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store
from torch.utils.data import DataLoader, Dataset

from gkd_d2.engine import failures
from gkd_d2.engine.failures import failures_told

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:20345"


@pytest.fixture
def store(monkeypatch):
    """The store of a run, which has this process alone."""
    monkeypatch.setattr(failures, "_SECONDS", 0.5)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield _get_default_store()
    distributed.destroy_process_group()


@pytest.fixture
def report(tmp_path):
    return tmp_path / "report"


def fail(report, error, context=None):
    """Let a process fail, and return what ends it."""
    with pytest.raises((Exception, SystemExit)) as raised, failures_told(str(report)):
        try:
            if context is not None:
                raise context
        finally:
            raise error
    return raised.value


class Broken(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise ValueError("street.png: no such image")


def error_of_a_worker():
    with pytest.raises(ValueError) as error:
        next(iter(DataLoader(Broken(), num_workers=1)))
    return error.value


@pytest.mark.parametrize(
    ("make", "context", "reason"),
    [
        (lambda: ValueError("street.png: no such image"), None, "ValueError: street.png: no such image"),
        (lambda: SystemExit("street.png: no such image"), None, "street.png: no such image"),
        (error_of_a_worker, None, "ValueError: street.png: no such image"),
        (AssertionError, None, "AssertionError"),
        # What is cleaned up after the failure may fail because the others are gone.
        (lambda: RuntimeError(GLOO), KeyError("street"), "KeyError: 'street'"),
    ],
)
def test_the_reason_is_told(make, context, reason, store, report):
    error = make()
    assert fail(report, error, context) is error
    told = report.read_text()
    assert told.startswith("the process of rank 0 on ") and told.endswith(f" failed: {reason}")
    assert store.get(failures._KEY).decode() == told
    # The first counts.
    fail(report, ValueError("another"))
    assert report.read_text() == store.get(failures._KEY).decode() == told


@pytest.mark.parametrize("code", [0, 143, None])
def test_an_exit_status_is_no_failure(code, store, report):
    assert fail(report, SystemExit(code)).code == code
    assert not report.exists() and not store.check([failures._KEY])


@pytest.mark.parametrize("error", [RuntimeError(GLOO), distributed.DistNetworkError("connection reset")])
def test_a_collective_blames_who_failed_before(error, store, report, caplog):
    # Nobody said why: as where the others were killed.
    assert fail(report, error) is error
    assert not report.exists() and not store.check([failures._KEY])
    sentence = "the process of rank 1 on other failed: ValueError: street.png"
    store.set(failures._KEY, sentence)
    assert fail(report, error).code == report.read_text() == sentence
    assert sentence in caplog.text
    # A tool may make a sentence of it.
    assert fail(report, SystemExit("a process is gone"), context=error).code == sentence


def test_a_lost_store_does_not_hold_a_process(store, report, monkeypatch):
    """Its machine answers no more."""
    monkeypatch.setattr(failures, "_first_failure", lambda: threading.Event().wait())
    monkeypatch.setattr(failures, "_tell", lambda sentence: threading.Event().wait())
    for error in (RuntimeError(GLOO), ValueError("street.png: no such image")):
        assert fail(report, error) is error
