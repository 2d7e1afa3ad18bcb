"""The fused implementation of the losses, for where the extension ``gkd_d2._C`` is built."""

from __future__ import annotations

import torch


def unavailable_reason(device: torch.device) -> str | None:
    """Why the extension can't compute on ``device``, in one sentence; None where it can."""
    return "this version of gkd_d2 has no extension, use GKD.IMPLEMENTATION 'auto' or 'reference'"
