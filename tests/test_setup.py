"""What setup.py makes of its environment."""

import runpy

import pytest
import torch


@pytest.fixture(scope="module")
def setup(project):
    """The functions of setup.py, without a build."""
    return runpy.run_path(str(project / "setup.py"))


@pytest.mark.parametrize(
    ("variable", "architectures"),
    [
        ("9.0", "9.0"),
        ("7.5;8.0 8.6+PTX", "7.5 8.0 8.6+PTX"),
        # In the order of the numbers, not of the text.
        ("9.0a+PTX;8.0;9.0", "8.0 9.0 9.0a+PTX"),
        ("Hopper", "9.0+PTX"),
        ("Turing Ampere", "7.5+PTX 8.0 8.6+PTX"),
    ],
)
def test_architectures_are_those_that_torch_builds_for(setup, variable, architectures, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", variable)
    assert setup["resolved_architectures"]() == architectures


def test_an_unknown_architecture_is_named(setup, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hooper")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST is '8.0;Hooper', which names no architecture .*Hooper"):
        setup["resolved_architectures"]()


def test_native_without_a_gpu_is_no_traceback(setup, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST is 'native', which names no architecture here"):
        setup["resolved_architectures"]()
