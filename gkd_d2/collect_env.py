"""Prints what a report about gkd_d2 should hold: ``python -m gkd_d2.collect_env``."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
from tabulate import tabulate

from gkd_d2.ops import fused


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def collect_env() -> list[tuple[str, str]]:
    """Names and values: versions, devices, and for which devices the extension gkd_d2._C has kernels."""
    cpu_reason = fused.unavailable_reason(torch.device("cpu"))
    cuda_reason = fused.unavailable_reason(torch.device("cuda"))
    if torch.cuda.is_available():
        gpus = [f"{torch.cuda.get_device_name(i)} ({_capability(i)})" for i in range(torch.cuda.device_count())]
    else:
        gpus = ["none that torch can use"]
    return [
        ("Python", platform.python_version()),
        ("Platform", platform.platform()),
        *((package, _version(package)) for package in ("gkd_d2", "detectron2", "torch", "torchvision")),
        ("CUDA of torch", torch.version.cuda or "none"),
        ("GPU", ", ".join(gpus)),
        ("CPU capability", torch.backends.cpu.get_cpu_capability()),
        ("gkd_d2._C CPU kernels", cpu_reason or "built"),
        ("gkd_d2._C CUDA kernels", cuda_reason or f"built for {', '.join(fused.cuda_architectures())}"),
    ]


def _capability(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{major}.{minor}"


if __name__ == "__main__":
    print(tabulate(collect_env()))
