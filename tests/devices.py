"""The devices that tests run on; what needs a GPU is marked, and skipped with its reason where it can't run."""

from __future__ import annotations

import pytest
import torch

from gkd_d2.losses import fused


def _no_cuda_reason() -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    return fused.unavailable_reason(torch.device("cuda"))


CUDA_MARKS = [pytest.mark.cuda, pytest.mark.skipif(_no_cuda_reason() is not None, reason=str(_no_cuda_reason()))]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA_MARKS)]
