"""The package's own docstring, the start page of help(gkd_d2)."""

import doctest

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
