"""The devices that a run can use."""

from __future__ import annotations

import torch

from gkd_d2.utils.text import counted


def fault_of_device(name: str) -> str:
    """Why a device can't be used here, as the end of a sentence; empty where it can.

    Args:
        name: as torch takes it, such as "cuda:1".
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        return "which torch does not know"
    if device.type not in ("cpu", "cuda"):
        return "which is neither a CPU nor a GPU of CUDA"
    if device.type == "cuda" and not torch.cuda.is_available():
        return f"but torch {torch.__version__} finds no GPU"
    if device.type == "cuda" and (device.index or 0) >= (found := torch.cuda.device_count()):
        return f"but torch {torch.__version__} finds {counted(found, 'GPU')}, numbered from 0"
    return ""
