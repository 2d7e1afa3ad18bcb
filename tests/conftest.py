"""Fixtures that several tests share."""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from coco_json import write_coco
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_model
from detectron2.utils.logger import setup_logger
from tiny import calm, detector_config

from gkd_d2.analysis.runs import Run
from gkd_d2.data.toy import make_toy_kitti
from gkd_d2.methods import METHOD_REGISTRY

PROJECT = Path(__file__).resolve().parent.parent
SHARED_DATA = PROJECT.parent / "shared" / "data"
SHARED_WEIGHTS = PROJECT.parent / "shared" / "weights"
# The files that take longest. Where processes share the tests file by file, one of these begun last would leave the
# others idle at the end.
LONGEST = (
    "tools/test_faults.py",
    "tools/test_run_study.py",
    "tools/test_lazyconfig_train_net.py",
    "tools/test_train_net.py",
    "test_docs.py",
    "test_wheel.py",
    "tools/test_compare_runs.py",
    "engine/test_distributed.py",
    "tools/test_export_student.py",
    "engine/test_launch.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the longest files come first."""
    order = {PROJECT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session")
def project() -> Path:
    """The project's root folder."""
    return PROJECT


def _sample(name: str) -> Path:
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"{name} does not lie beside this project")
    return folder


@pytest.fixture
def kitti_sample() -> Path:
    """81 real KITTI images, which lie beside the project where it is developed."""
    return _sample("kitti_sample")


@pytest.fixture
def coco_sample() -> Path:
    """59 real COCO images, which lie beside the project where it is developed."""
    return _sample("coco_sample")


@pytest.fixture
def timm_weights() -> Path:
    """A folder of timm's weights of ImageNet, which lies beside the project where it is developed."""
    pytest.importorskip("timm")
    if not SHARED_WEIGHTS.is_dir():
        pytest.skip("weights do not lie beside this project")
    return SHARED_WEIGHTS


@pytest.fixture(scope="session")
def demo(project, tmp_path_factory) -> tuple[Path, str]:
    """The demo, cut short: its output folder, with three runs on toy scenes, and what it printed.

    It is made once, also where several processes share the tests.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, printed = base / "demo", base / "demo.txt"
    with (base / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.is_file():
            command = [sys.executable, str(project / "tools" / "demo.py"), "--output", str(folder)]
            command += ["--train", "8", "--val", "4", "--iterations", "2"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
            printed.write_text(done.stdout, encoding="utf-8")
    return folder, printed.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def _toy_scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy_scenes")
    make_toy_kitti(folder / "toy_kitti", 2, 2, image_size=(160, 64))
    return folder


@pytest.fixture
def toy_scenes(_toy_scenes, monkeypatch) -> Path:
    """Two scenes each of toy_kitti_train and toy_kitti_val, to be read alone: all tests share them."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(_toy_scenes))
    yield _toy_scenes
    # An evaluation has left its ground truth there, which is the process's own.
    vars(MetadataCatalog.get("toy_kitti_val")).pop("json_file", None)


@pytest.fixture
def coco_dataset(tmp_path):
    """:func:`coco_json.write_coco` in a folder of its own; what is registered is removed at the end."""
    registered = set(DatasetCatalog.list()), set(MetadataCatalog.list())
    (tmp_path / "coco_json").mkdir()
    yield functools.partial(write_coco, tmp_path / "coco_json")
    for catalog, before in zip((DatasetCatalog, MetadataCatalog), registered):
        for name in set(catalog.list()) - before:
            catalog.remove(name)


@pytest.fixture
def main_of_tool(project, monkeypatch):
    """Run a file of tools/ within this process, up to the sentence that it ends with."""

    def run(name: str, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(project / "tools" / name), run_name="__main__")
        return end.value.code

    return run


@pytest.fixture
def run_tool(project, tmp_path):
    """Run a file of tools/ in an empty folder and return what it printed."""

    def run(name: str, *arguments, fails: bool = False, **environment: str) -> str:
        command = [sys.executable, str(project / "tools" / name), *map(str, arguments)]
        environment = os.environ | {"PYTHONWARNINGS": "ignore"} | environment
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


@pytest.fixture
def run_here(project, monkeypatch, capfd):
    """Run a file of tools/ in this process; returns its exit status and what it printed."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "gkd_d2")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    with_ground_truth = {name for name in MetadataCatalog.list() if "json_file" in vars(MetadataCatalog.get(name))}

    def reset() -> None:
        for logger, (handlers, propagate, level) in zip(loggers, before):
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)
        # It sets a logger up once for each file.
        setup_logger.cache_clear()
        # Where an evaluation has left its ground truth, which is the run's own.
        for name in {*MetadataCatalog.list()} - with_ground_truth:
            vars(MetadataCatalog.get(name)).pop("json_file", None)

    def run(name: str, *arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        status, message = 0, ""
        reset()
        try:
            runpy.run_path(str(project / "tools" / name), run_name="__main__")
        except SystemExit as end:
            # As the interpreter does: a text is printed, and the status is 1.
            status, message = (1, end.code) if isinstance(end.code, str) else (end.code or 0, "")
        return status, f"{''.join(capfd.readouterr())}{message}"

    yield run
    reset()


# The tests' tensors are so small that more threads cost time, much of it where others use the cores too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _repeatable():
    """TorchScript compiles fvcore's focal loss anew in its first calls, which changes the last bits between them."""
    torch.manual_seed(0)
    with torch.jit.optimized_execution(False):
        yield


def _distiller_config(
    folder: Path,
    kind: str = "faster",
    *,
    teacher_kind: str = "",
    teacher_channels: int = 16,
    teacher_width: int = 16,
    teacher_options: tuple = (),
    change=None,
    **student,
) -> CfgNode:
    """A distiller's config; the teacher's config and checkpoint are written into ``folder``.

    Args:
        folder: exists.
        kind: as for :func:`tiny.detector_config`.
        teacher_kind: the same of the teacher; by default ``kind``.
        teacher_channels, teacher_width: of the teacher; ``student`` holds those of the student.
        teacher_options: keys and values of the teacher's config.
        change: applied to both configs before the teacher is built.
    """
    teacher, cfg = (
        detector_config(teacher_kind or kind, channels=teacher_channels, width=teacher_width),
        detector_config(kind, **student),
    )
    teacher.merge_from_list(list(teacher_options))
    if change is not None:
        change(teacher)
        change(cfg)
    torch.manual_seed(100)
    torch.save({"model": calm(build_model(teacher)).state_dict()}, folder / "teacher.pth")
    (folder / "teacher.yaml").write_text(teacher.dump())
    cfg.GKD.STUDENT.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "GKDDistiller"
    cfg.GKD.TEACHER.CONFIG_FILE = str(folder / "teacher.yaml")
    cfg.GKD.TEACHER.WEIGHTS = str(folder / "teacher.pth")
    return cfg


@pytest.fixture(scope="session")
def make_distiller_config():
    """A function that makes the config of a distiller in a given folder."""
    return _distiller_config


@pytest.fixture
def distiller_config(tmp_path):
    """A function that makes the config of a distiller, with its teacher's config and checkpoint on disk."""
    return functools.partial(_distiller_config, tmp_path)


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """A function that writes a Python module into the working folder; nothing that it registers outlives the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    for registry in (BACKBONE_REGISTRY, META_ARCH_REGISTRY, METHOD_REGISTRY):
        monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))

    def write(name: str, text: str = "VALUE = 1") -> None:
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def make_run(tmp_path):
    """A function that writes the folder of a finished run, config.yaml and metrics.json, and returns the run."""

    def make(name: str, cfg: CfgNode, rows: list[dict]) -> Run:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(cfg.dump())
        (folder / "metrics.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return Run(name, folder)

    return make
