"""Prints what a report about gkd_d2 should hold: ``python -m gkd_d2.collect_env``."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
from tabulate import tabulate

from gkd_d2.losses import fused


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def collect_env() -> list[tuple[str, str]]:
    """Names and values: versions, devices, and for which devices the extension gkd_d2._C has kernels."""
    cpu_reason = fused.unavailable_reason(torch.device("cpu"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = [torch.device("cuda", index) for index in range(count)]
    cuda_reasons = map(fused.unavailable_reason, cards or [torch.device("cuda")])
    cuda_reason = "; ".join(dict.fromkeys(reason for reason in cuda_reasons if reason))
    gpus = [f"{torch.cuda.get_device_name(card)} ({_capability(card)})" for card in cards]
    return [
        ("Python", platform.python_version()),
        ("Platform", platform.platform()),
        *((package, _version(package)) for package in ("gkd_d2", "detectron2", "torch", "torchvision")),
        ("CUDA of torch", torch.version.cuda or "none"),
        ("GPU", ", ".join(gpus) or "none that torch can use"),
        ("CPU capability", torch.backends.cpu.get_cpu_capability()),
        ("gkd_d2._C CPU kernels", cpu_reason or "built"),
        ("gkd_d2._C CUDA kernels", cuda_reason or f"built for {', '.join(fused.cuda_architectures())}"),
    ]


def _capability(card: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(card)
    return f"{major}.{minor}"


if __name__ == "__main__":
    print(tabulate(collect_env()))
