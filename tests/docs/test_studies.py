"""The examples of docs/studies.md are studies, and its table has all keys."""

import dataclasses
import re
import typing
from collections.abc import Mapping

import pytest
import yaml
from documents import fenced_blocks

from gkd_d2.analysis.study.plan import Study
from gkd_d2.analysis.study.processes import prepare_data
from gkd_d2.analysis.study.read import BASE, read_study
from gkd_d2.config import method_names


@pytest.fixture
def document(project):
    return project / "docs" / "studies.md"


@pytest.fixture
def studies(document, project, tmp_path, monkeypatch):
    """The example, and the one that is based on it."""
    examples = [block.text for block in fenced_blocks(document) if block.language == "yaml"]
    paths = [tmp_path / name for name in ("my_study.yaml", "new_seeds.yaml")]
    for path, text in zip(paths, examples, strict=True):
        path.write_text(text)
    monkeypatch.chdir(project)
    return [read_study(path, path.with_suffix("")) for path in paths]


def test_the_example_consists_of_what_is_said(document, studies, tmp_path):
    study, _ = studies
    text = document.read_text()
    assert f"runs {len(study.lengths())} trainings" in text and f" of {len(study.lengths())}, AP " in text
    # The baseline is the student alone, and the others have the teacher's heads.
    heads = {
        name: study.student_jobs("frcnn", name)[1].config.GKD.STUDENT.INIT_FROM_TEACHER for name in ("alone", "heads")
    }
    assert heads == {"alone": False, "heads": True}
    (folder,) = re.findall(r"output/studies/(my_study/\S+/seed_1):", text)
    assert study.student_jobs("frcnn", "alone")[1].folder == tmp_path / folder
    prepare_data(study)
    assert len(list((tmp_path / "my_study" / "datasets" / "toy_kitti").rglob("*.png"))) == 50


def test_the_second_example_has_what_is_said_of_the_first(studies):
    first, second = studies
    for same in ("dataset", "prepare", "detectors", "options", "settings"):
        assert getattr(second, same) == getattr(first, same)
    assert second.tuning.seeds == first.tuning.seeds
    assert (second.seeds, second.tuning.scales) == ((4, 5, 6), (5, 25))


def test_settings_of_several_methods(document, studies, tmp_path):
    """The two that stand there, where all students have two methods."""
    text = re.sub(r"\s+", " ", document.read_text())
    both, alone = re.findall(r"`((?:both|alone): {options: {GKD.METHOD.*?})`", text)
    content = yaml.safe_load((tmp_path / "my_study.yaml").read_text())
    content["settings"] = yaml.safe_load(alone) | yaml.safe_load(both)
    content["options"]["GKD.METHODS"] = ["pkd", "fgd"]
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    study = read_study(tmp_path / "both.yaml", tmp_path / "both")
    found = {name: method_names(study.student_config("frcnn", name)) for name in study.settings}
    assert found == {"alone": ["none"], "both": ["gkd", "fitnet"]}
    assert {"GKD.LOSS_WEIGHTS.BOX", "GKD.FITNET.WEIGHT"} < study.weights("frcnn", "both").keys()


def keys(kind, place=""):
    """All keys that a dataclass of a study is read from, with NAME for any name."""
    hints = typing.get_type_hints(kind)
    for field in (field for field in dataclasses.fields(kind) if field.init and field.name != "output"):
        hint, name = hints[field.name], place + field.name
        inner = typing.get_args(hint)[1] if typing.get_origin(hint) is Mapping else None
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{name}.")
        elif dataclasses.is_dataclass(inner):
            yield from keys(inner, f"{name}.NAME.")
        else:
            yield name


def test_the_table_has_all_keys(document):
    rows = re.findall(r"^\| `([\w.]+)` \|", document.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted([BASE, *keys(Study)])
