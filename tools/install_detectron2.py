#!/usr/bin/env python3
"""Put Detectron2 into the environment of the Python that runs this, and say what was done and why.

Upstream publishes no package of its own name, so there are three ways, tried in this order:

1. ``DETECTRON2`` is set to a pip requirement, a URL or a local folder: pip installs that.
2. ``import detectron2`` works already: nothing is done.
3. Otherwise the source archive of v0.5 is fetched by pip, checked, edited to run on today's torch, Pillow,
   setuptools and pycocotools without compiled operators, and installed by pip under the name ``detectron2``.

Example:
    DETECTRON2=../my/detectron2 python tools/install_detectron2.py
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

SDIST = "detectron2-cdo==0.5"
SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"

# pip 26.3 and later refuse the archive, because one of its extras names a URL.
LAST_PIP = "26.2.1"

IMPORT_C = "from detectron2 import _C\n"
OPTIONAL_C = "try:\n    from detectron2 import _C\nexcept ImportError:\n    _C = None\n"

# (file, text of v0.5, text that runs today)
EDITS = (
    ("layers/deform_conv.py", IMPORT_C, OPTIONAL_C),
    ("layers/roi_align_rotated.py", IMPORT_C, OPTIONAL_C),
    ("layers/rotated_boxes.py", IMPORT_C, OPTIONAL_C),
    ("data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR"),
    (
        "evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "try:\n    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "except ImportError:\n    COCOeval_opt = COCOeval\n",
    ),
    ("model_zoo/model_zoo.py", "import pkg_resources\n", ""),
    (
        "model_zoo/model_zoo.py",
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
        'os.path.join(os.path.dirname(__file__), "configs", config_path)',
    ),
    # Only its Caffe2 exporter needs caffe2, which torch no longer holds.
    ("export/__init__.py", "from .api import *\n", "try:\n    from .api import *\nexcept ImportError:\n    pass\n"),
)

# Projects that upstream's own setup puts below detectron2.projects.
PROJECTS = ("PointRend/point_rend", "DeepLab/deeplab", "Panoptic-DeepLab/panoptic_deeplab")

# Upstream's list without what only its Caffe2 export and its formatting need.
SETUP_PY = """\
from setuptools import find_namespace_packages, setup

setup(
    name="detectron2",
    version="0.5",
    description="Detectron2 v0.5 without compiled operators, edited for current dependencies",
    url="https://github.com/facebookresearch/detectron2",
    license="Apache-2.0",
    packages=find_namespace_packages(include=["detectron2", "detectron2.*"]),
    package_data={"detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py"]},
    install_requires=[
        "Pillow>=7.1", "matplotlib", "pycocotools>=2.0.2", "termcolor>=1.1", "yacs>=0.1.6", "tabulate",
        "cloudpickle", "tqdm>4.29.0", "tensorboard", "fvcore>=0.1.5,<0.1.6", "iopath>=0.1.7,<0.1.10",
        "omegaconf>=2.1", "hydra-core>=1.1",
    ],
)
"""


class InstallError(Exception):
    """Something that the user can act on; its text says how."""


def say(message: str) -> None:
    """Print one line of the tool's own, recognisable between pip's."""
    print(f"install_detectron2: {message}", flush=True)


def run(*command: str | Path) -> None:
    """Run ``command`` and let its output through.

    Raises:
        InstallError: it exits with another status than 0.
    """
    if subprocess.run([str(part) for part in command]).returncode:
        raise InstallError(f"this command failed, its reason stands above: {' '.join(map(str, command))}")


def ensure_wheels_can_be_built(folder: Path) -> None:
    """Fetch what builds wheels into ``folder`` for the pips that are run later, where this environment has none.

    A build that must see torch can't be isolated, so pip fetches nothing for it. A new environment of Python 3.11 or
    earlier has a setuptools that can't build wheels by itself, one of later Pythons has none.
    """
    try:
        if importlib.util.find_spec("setuptools.command.bdist_wheel") or importlib.util.find_spec("wheel"):
            return
    except ModuleNotFoundError:
        pass
    say("setuptools and wheel are fetched for this build alone, for this environment can't build wheels")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, "setuptools", "wheel")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def probe_import() -> tuple[str | None, str]:
    """Try ``import detectron2`` in a fresh interpreter.

    Returns:
        The version and the folder; or None and the reason, which is empty where there is no detectron2 at all.
    """
    code = (
        "import importlib.util as u, sys\n"
        "if u.find_spec('detectron2') is None: sys.exit(3)\n"
        "import detectron2, os\n"
        "import detectron2.modeling, detectron2.engine, detectron2.evaluation\n"
        "print(getattr(detectron2, '__version__', 'unknown'), os.path.dirname(str(detectron2.__file__)), sep='\\n')"
    )
    # Another working folder, so that a checkout lying in this one is not mistaken for an installed package.
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    if done.returncode == 0:
        version, path = done.stdout.strip().splitlines()[-2:]
        return version, path
    lines = done.stderr.strip().splitlines()
    return None, "" if done.returncode == 3 else (lines[-1] if lines else f"exit status {done.returncode}")


def pip_that_fetches(folder: Path) -> list[str | Path]:
    """The command of a pip that accepts the archive: the environment's own, or an older one fetched as a wheel."""
    own = [sys.executable, "-m", "pip"]
    major, minor = (int(part) for part in metadata.version("pip").split(".")[:2])
    if (major, minor) < (26, 3):
        return own
    say(f"pip {major}.{minor} refuses the archive's metadata, so pip {LAST_PIP} fetches it (your pip stays)")
    run(*own, "download", "--quiet", "--no-deps", "--dest", folder, f"pip=={LAST_PIP}")
    return [sys.executable, next(folder.glob("pip-*.whl")) / "pip"]


def fetch(folder: Path) -> Path:
    """Download the archive of v0.5 into ``folder`` and check its sha256.

    Raises:
        InstallError: it can't be had, or is not the file that was tested.
    """
    try:
        metadata.version("torch")
    except metadata.PackageNotFoundError:
        raise InstallError("torch is missing and Detectron2 needs it first: pip install torch torchvision") from None
    pip = pip_that_fetches(folder)
    ensure_wheels_can_be_built(folder / "builds")
    # The archive's setup.py imports torch, which an isolated build would not see.
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", folder]
    run(*pip, "download", *options, SDIST)
    archive = next(folder.glob("detectron2*.tar.gz"))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise InstallError(f"{archive.name} has sha256 {digest}, expected {SHA256}: not the file that was tested")
    return archive


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack ``archive`` below ``folder`` and return the source tree's root."""
    with tarfile.open(archive) as tar:
        # `filter` came with security releases of 3.10 and 3.11; the checked sha256 stands in where it is missing.
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(path.parent for path in folder.glob("*/setup.py"))


def apply_edits(package: Path) -> None:
    """Apply EDITS to the ``detectron2`` package folder.

    Raises:
        InstallError: a file is missing or a text does not stand in it exactly once.
    """
    for name, old, new in EDITS:
        path = package / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.count(old) != 1:
            raise InstallError(
                f"{name}: expected the text {old.strip().splitlines()[0]!r} exactly once, found it {text.count(old)} "
                "times; this is not Detectron2 v0.5 as it was tested"
            )
        path.write_text(text.replace(old, new), encoding="utf-8")


def install_v05() -> None:
    """Fetch, check, edit and install v0.5."""
    with tempfile.TemporaryDirectory(prefix="detectron2-") as name:
        folder = Path(name)
        root = unpack(fetch(folder), folder)
        apply_edits(root / "detectron2")
        for project in PROJECTS:
            shutil.copytree(root / "projects" / project, root / "detectron2" / "projects" / Path(project).name)
        (root / "setup.py").write_text(SETUP_PY, encoding="utf-8")
        (root / "setup.cfg").unlink()
        say(f"v0.5 unpacked, sha256 as expected, {len(EDITS)} edits applied; installing it")
        # This setup.py does not need torch, so pip can fetch what builds it.
        run(sys.executable, "-m", "pip", "install", "--quiet", root)


def install() -> None:
    """Install Detectron2 in the first of the three ways that applies.

    Raises:
        InstallError: the way that applies did not work.
    """
    wanted = os.environ.get("DETECTRON2", "").strip()
    version, detail = probe_import()
    if wanted:
        say(f"installing {wanted!r}, because DETECTRON2 asks for it")
        with tempfile.TemporaryDirectory(prefix="detectron2-") as folder:
            if not wanted.endswith(".whl"):
                ensure_wheels_can_be_built(Path(folder))
            run(sys.executable, "-m", "pip", "install", "--no-build-isolation", wanted)
    elif version:
        say(f"Detectron2 {version} can be imported from {detail}; nothing to do")
        return
    elif detail:
        raise InstallError(
            f"a detectron2 is there, but importing it fails: {detail}. "
            "Mend or uninstall it, or set DETECTRON2 to the one to install"
        )
    else:
        say("DETECTRON2 is not set and there is no detectron2 to import, so v0.5 is fetched")
        install_v05()
    version, detail = probe_import()
    if not version:
        raise InstallError(f"pip installed it, but importing it fails: {detail or 'no module named detectron2'}")
    say(f"Detectron2 {version} is ready in {detail}")


def main() -> int:
    """Run the command line; returns the exit status."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        install()
    except InstallError as error:
        print(f"install_detectron2: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
