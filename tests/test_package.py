"""The package's own docstring, the start page of help(gkd_d2)."""

import doctest
import importlib.util
import re

import torch
from detectron2.modeling import build_model
from tiny import calm, detector_config

import gkd_d2


def test_its_examples_run(tmp_path, monkeypatch):
    cfg = detector_config("faster")
    (tmp_path / "student.yaml").write_text(cfg.dump())
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    torch.save({"model": calm(build_model(cfg)).state_dict()}, tmp_path / "teacher.pth")
    monkeypatch.chdir(tmp_path)
    (examples,) = doctest.DocTestFinder(recurse=False).find(gkd_d2, globs={})
    report: list[str] = []
    result = doctest.DocTestRunner().run(examples, out=report.append, clear_globs=False)
    assert (result.failed, result.attempted > 15) == (0, True), "".join(report)
    assert isinstance(examples.globs["model"], gkd_d2.GKDDistiller)
    assert all(loss > 0 for loss in examples.globs["losses"].values())
    assert examples.globs["student"].grad.abs().max() > 0


def test_what_it_exports_is_there():
    assert all(getattr(gkd_d2, name).__doc__ for name in gkd_d2.__all__)


def test_docstrings_refer_to_what_is_there(project):
    """A name of the package in a :func:, :class:, :mod:, :meth: or :attr:."""
    role = re.compile(r":(?:func|class|mod|meth|attr):`~?(gkd_d2(?:\.\w+)*)`")
    texts = {path: path.read_text() for path in (project / "gkd_d2").rglob("*.py")}
    assert sum(len(role.findall(text)) for text in texts.values()) > 30
    lost = [f"{path}: {name}" for path, text in texts.items() for name in role.findall(text) if not exists(name)]
    assert not lost


def exists(name: str) -> bool:
    parts = name.split(".")
    module = next(m for m in (".".join(parts[:count]) for count in range(len(parts), 0, -1)) if find_module(m))
    found = importlib.import_module(module)
    for part in parts[module.count(".") + 1 :]:
        if part in getattr(found, "__annotations__", {}):
            return True
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def find_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
