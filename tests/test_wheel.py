"""The source archive holds the project, and the wheel made of it imports and trains outside the source tree."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

FOLDERS = ("configs", "csrc", "docs", "examples", "gkd_d2", "tests", "tools")
FILES = ("LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml", "setup.py")

TRAIN = """
import json
import sys
from pathlib import Path

from detectron2.config import get_cfg

import gkd_d2
import gkd_d2._C
from gkd_d2.data.toy import make_toy_kitti
from gkd_d2.engine.trainer import Trainer

make_toy_kitti("datasets/toy_kitti", 2, 1, 0)
cfg = get_cfg()
gkd_d2.add_gkd_config(cfg)
cfg.merge_from_file(sys.argv[1])
cfg.GKD.IMPLEMENTATION = "fused"
cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy_kitti_train",), ()
cfg.DATALOADER.NUM_WORKERS = 0
cfg.INPUT.MIN_SIZE_TRAIN = (64,)
cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, 1, ()
cfg.OUTPUT_DIR = "output"
Path("output").mkdir()
trainer = Trainer(cfg)
before = trainer.model.student.backbone.bottom_up.stem.conv1.weight.detach().clone()
trainer.train()
after = trainer.model.student.backbone.bottom_up.stem.conv1.weight.detach()
scalars = {name: value for name, (value, _) in trainer.storage.latest().items()}
origins = [gkd_d2.__file__, gkd_d2._C.__file__]
moved = (after - before).abs().max().item()
Path("report.json").write_text(json.dumps({"origins": origins, "moved": moved, **scalars}))
"""


def run(*command, cwd: Path, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def source_archive(project, tmp_path_factory) -> Path:
    """Made from a copy of what is no leftover of a build or a run."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "project"
    copy.mkdir()
    names = [*FOLDERS, *FILES, "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "MANIFEST.in", ".clang-format"]
    for name in names:
        (copy / name).symlink_to(project / name)
    run("-c", f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})", cwd=copy, FORCE_CPU="1")
    (archive,) = folder.glob("gkd_d2-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(source_archive, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = ("-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder)
    run(*pip, source_archive, cwd=folder, FORCE_CPU="1")
    (path,) = folder.glob("gkd_d2-*.whl")
    return path


def sources(folder: Path) -> set[str]:
    files = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {str(file.relative_to(folder.parent)) for file in files if file.suffix != ".so"}


def test_the_source_archive_holds_the_project(project, source_archive):
    with tarfile.open(source_archive) as tar:
        held = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
    assert set(FILES) | set().union(*(sources(project / folder) for folder in FOLDERS)) <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def test_the_wheel_holds_the_package_and_nothing_else(project, wheel):
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
        metadata = file.read(next(name for name in held if name.endswith("METADATA"))).decode()
    (extension,) = (name for name in held if re.fullmatch(r"gkd_d2/_C\..*so", name))
    info = {name for name in held if ".dist-info/" in name}
    assert held - info - {extension} == sources(project / "gkd_d2")
    assert any(name.endswith("licenses/LICENSE") for name in info)
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: torch>=2.4" in metadata


def test_the_wheel_trains_outside_the_source_tree(wheel, distiller_config, tmp_path):
    target = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "student.yaml").write_text(distiller_config("retinanet", channels=8).dump())
    run(
        "train.py",
        "student.yaml",
        cwd=tmp_path,
        PYTHONPATH=os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")])),
        DETECTRON2_DATASETS=str(tmp_path / "datasets"),
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(Path(origin).is_relative_to(target) for origin in report["origins"])
    assert report["moved"] > 0
    for name in ("loss_gkd_gradient", "loss_bmfi_box", "loss_bmfi_attention", "loss_bmfi_image", "loss_cls"):
        assert 0 < report[name] < float("inf"), name
    assert (tmp_path / "output" / "model_final.pth").is_file()
