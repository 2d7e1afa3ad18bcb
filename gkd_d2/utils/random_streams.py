"""Random streams that start anew from known seeds, so that a resumed run draws what an uninterrupted one would."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import torch


@contextlib.contextmanager
def separate_random_stream(device: torch.device, seed: int):
    """Within it torch draws from a stream of ``seed``; after it, as if nothing had been drawn.

    Args:
        device: whose generator is set beside the CPU's.
        seed: of the stream.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def mix_seed(*parts: int) -> int:
    """One seed of 32 bits out of several numbers >= 0; streams of different numbers are independent."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Set the generators of Python, NumPy and torch, on every device, to ``seed`` of 32 bits."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def separate_data_stream(seed: int):
    """Within it Python, NumPy and torch draw from streams of ``seed`` on the CPU; after it, as if nothing was drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with separate_random_stream(torch.device("cpu"), seed):
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
