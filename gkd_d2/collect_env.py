"""Prints what a report about gkd_d2 should hold: ``python -m gkd_d2.collect_env``."""

from __future__ import annotations

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tabulate import tabulate

from gkd_d2.losses import fused


def _imported(package: str) -> str:
    """Version and folder of what is imported, which PYTHONPATH may put before what is installed."""
    module = import_module(package)
    return f"{module.__version__} in {Path(module.__file__).parent}"


def _installed(package: str) -> str:
    """Version of what some of the project needs and may be missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def collect_env() -> list[tuple[str, str]]:
    """Names and values: versions of what is imported, devices, and what the extension gkd_d2._C has kernels for."""
    cpu_reason = fused.unavailable_reason(torch.device("cpu"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cards = [torch.device("cuda", index) for index in range(count)]
    cuda_reasons = map(fused.unavailable_reason, cards or [torch.device("cuda")])
    cuda_reason = "; ".join(dict.fromkeys(reason for reason in cuda_reasons if reason))
    gpus = [f"{torch.cuda.get_device_name(card)} ({_capability(card)})" for card in cards]
    return [
        ("Python", platform.python_version()),
        ("Platform", platform.platform()),
        *((package, _imported(package)) for package in ("gkd_d2", "detectron2", "torch", "torchvision")),
        *((package, _installed(package)) for package in ("timm", "onnx", "onnxruntime")),
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
