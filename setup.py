"""Builds gkd_d2._C: the C++ kernels always, the CUDA kernels where a CUDA toolkit and a CUDA build of torch are there.

Environment variables: FORCE_CUDA=1 makes it an error where the CUDA kernels can't be built, FORCE_CPU=1 leaves them
out, TORCH_CUDA_ARCH_LIST chooses their architectures, CUDA_HOME the toolkit, GKD_D2_SANITIZE=1 adds AddressSanitizer
and UndefinedBehaviorSanitizer to the C++ kernels. All else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
# Those of them that nvcc knows are built; code for 8.6 runs on 8.9 too.
DEFAULT_ARCHITECTURES = ("7.0", "7.5", "8.0", "8.6", "9.0", "10.0", "12.0")


def import_torch():
    """The torch of the environment that is built for, which pip's build isolation hides from a build."""
    try:
        import torch
    except ModuleNotFoundError:
        paths = sysconfig.get_paths()
        sys.path += [paths["purelib"], paths["platlib"]]
        try:
            import torch
        except ModuleNotFoundError:
            sys.exit(
                "gkd_d2: torch is not installed here, but its extension is compiled against it: install torch first"
            )
    return torch


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "no", "off", "false")


def find_toolkit() -> Path | None:
    """The folder of the CUDA toolkit; nvcc itself is asked, for the one on PATH may be a script that calls another."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(home) if (Path(home) / "bin" / "nvcc").exists() else None
    if nvcc := shutil.which("nvcc"):
        dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"TOP=(.+)", dryrun.stdout + dryrun.stderr)
        home = Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parent.parent
    else:
        home = Path("/usr/local/cuda")
    return home if (home / "bin" / "nvcc").exists() else None


def nvcc_output(toolkit: Path, option: str) -> str:
    result = subprocess.run([toolkit / "bin" / "nvcc", option], capture_output=True, text=True)
    return result.stdout if result.returncode == 0 else ""


def no_cuda_reason(torch, toolkit: Path | None) -> str | None:
    """Why the CUDA kernels can't be built, or None where they can."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if toolkit is None:
        return "no CUDA toolkit was found (CUDA_HOME, nvcc on PATH, /usr/local/cuda)"
    release = re.search(r"release (\d+)", nvcc_output(toolkit, "--version"))
    if release is None:
        return f"nvcc of {toolkit} does not run"
    if release.group(1) != torch.version.cuda.split(".")[0]:
        return f"the toolkit at {toolkit} is CUDA {release.group(1)}, but this torch is built for {torch.version.cuda}"
    return None


def default_architectures(toolkit: Path) -> str:
    known = re.findall(r"compute_(\d+)(\d)\b", nvcc_output(toolkit, "--list-gpu-arch"))
    known = {f"{major}.{minor}" for major, minor in known}
    chosen = [architecture for architecture in DEFAULT_ARCHITECTURES if architecture in known]
    return ";".join(chosen) + "+PTX"


def resolved_architectures() -> str:
    """What TORCH_CUDA_ARCH_LIST means to torch, names such as "Hopper" resolved: "8.0 9.0+PTX" for example."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    try:
        flags = " ".join(_get_cuda_arch_flags())
    except (ValueError, IndexError) as error:
        # An IndexError: "native" without a GPU.
        sys.exit(
            f"gkd_d2: TORCH_CUDA_ARCH_LIST is {os.environ['TORCH_CUDA_ARCH_LIST']!r}, which names no architecture "
            f"here ({error}): give numbers, such as '8.6;9.0'"
        )
    # Machine code is code=sm_90, PTX code=compute_90 beside it.
    found = re.findall(r"arch=compute_(\d+)(\d)([a-z]?),code=([a-z]+)_", flags)
    versions = sorted({(int(major), int(minor), suffix) for major, minor, suffix, _ in found})
    with_ptx = {(int(major), int(minor), suffix) for major, minor, suffix, kind in found if kind == "compute"}
    return " ".join("{}.{}{}".format(*version) + "+PTX" * (version in with_ptx) for version in versions)


def interface_version() -> str:
    """The number that gkd_d2/losses/fused.py expects of the extension."""
    return re.search(r"^INTERFACE_VERSION = (\d+)$", (ROOT / "gkd_d2/losses/fused.py").read_text(), re.M).group(1)


def find_sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def extension():
    torch = import_torch()
    toolkit = None if flag("FORCE_CPU") else find_toolkit()
    reason = "FORCE_CPU is set" if flag("FORCE_CPU") else no_cuda_reason(torch, toolkit)
    if reason and flag("FORCE_CUDA"):
        sys.exit(f"gkd_d2: FORCE_CUDA is set, but the CUDA kernels can't be built: {reason}")
    if toolkit and not reason:
        os.environ["CUDA_HOME"] = str(toolkit)  # cpp_extension reads it when it is imported
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = default_architectures(toolkit)
    os.environ.setdefault("MAX_JOBS", str(min(os.cpu_count() or 1, 4)))
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = find_sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    cxx = ["-O3", "-Wall", "-Wextra", "-Wno-unused-parameter", f"-DGKD_INTERFACE_VERSION={interface_version()}"]
    link = []
    if torch.backends.openmp.is_available():
        # at::parallel_for is a template in torch's headers: without this it runs on one thread.
        cxx.append("-fopenmp")
        link.append("-fopenmp")
    if flag("GKD_D2_SANITIZE"):
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        cxx += ["-O1", "-g", "-fno-omit-frame-pointer", *sanitizers]
        link += sanitizers
    else:
        cxx.append("-g0")
    if reason:
        print(f"gkd_d2: building gkd_d2._C with C++ kernels only: {reason}")
        cxx.append('-DGKD_CUDA_ARCHITECTURES=""')
        return CppExtension("gkd_d2._C", sources, extra_compile_args=cxx, extra_link_args=link), BuildExtension
    architectures = resolved_architectures()
    print(f"gkd_d2: building gkd_d2._C with C++ kernels and CUDA kernels for {architectures} (toolkit {toolkit})")
    cxx.append(f'-DGKD_CUDA_ARCHITECTURES="{architectures}"')
    # Headers that the pip wheels of CUDA have and a small toolkit may lack; searched last, for they may be newer.
    for folder in sorted(Path(torch.__file__).parent.parent.glob("nvidia/*/include")):
        cxx += ["-idirafter", str(folder)]
    sources += find_sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu")
    compile_args = {"cxx": cxx, "nvcc": ["-O3", "--threads=2"]}
    return CUDAExtension("gkd_d2._C", sources, extra_compile_args=compile_args, extra_link_args=link), BuildExtension


if __name__ == "__main__":
    module, build_extension = extension()
    setup(ext_modules=[module], cmdclass={"build_ext": build_extension})
