"""How a file becomes the config of a student and of its teacher."""

import os

import pytest
from config_files import read, write

from gkd_d2.config import teacher_config

PATHS = "GKD: {TEACHER: {CONFIG_FILE: teacher.yaml, WEIGHTS: teacher.pth}}"


def test_teacher_is_found_in_the_working_folder_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = write(tmp_path / "configs" / "student.yaml", PATHS)
    for name in ("teacher.yaml", "teacher.pth"):
        write(tmp_path / "configs" / name, "")
    beside = {"CONFIG_FILE": f"{tmp_path}/configs/teacher.yaml", "WEIGHTS": f"{tmp_path}/configs/teacher.pth"}
    for path in (student, "configs/student.yaml"):
        assert read(path).GKD.TEACHER.items() >= beside.items()
    write(tmp_path / "teacher.yaml", "")
    write(tmp_path / "teacher.pth", "")
    teacher = read(student).GKD.TEACHER
    assert (teacher.CONFIG_FILE, teacher.WEIGHTS) == ("teacher.yaml", "teacher.pth")


def test_teacher_paths_of_a_base_are_relative_to_its_folder(tmp_path, monkeypatch):
    """Each key to the file in the chain that sets it, and an argument's to --config-file."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write(tmp_path / "shared" / "deep" / "base.yaml", PATHS)
    write(tmp_path / "shared" / "base.yaml", "_BASE_: deep/base.yaml\nGKD: {TEACHER: {WEIGHTS: other.pth}}")
    student = write(tmp_path / "mine" / "student.yaml", "_BASE_: ../shared/base.yaml")
    for name in ("shared/deep/teacher.yaml", "shared/other.pth", "mine/teacher.yaml", "mine/other.pth", "mine/my.pth"):
        write(tmp_path / name, "VERSION: 2")
    teacher = read(student).GKD.TEACHER
    assert os.path.samefile(teacher.CONFIG_FILE, tmp_path / "shared" / "deep" / "teacher.yaml")
    assert os.path.samefile(teacher.WEIGHTS, tmp_path / "shared" / "other.pth")
    teacher = read(student, "GKD.TEACHER.WEIGHTS", "my.pth").GKD.TEACHER
    assert os.path.samefile(teacher.CONFIG_FILE, tmp_path / "shared" / "deep" / "teacher.yaml")
    assert teacher.WEIGHTS == f"{tmp_path}/mine/my.pth"
    # With a key of its own the student's file decides.
    write(student, "_BASE_: ../shared/base.yaml\nGKD: {TEACHER: {CONFIG_FILE: teacher.yaml}}")
    assert read(student).GKD.TEACHER.CONFIG_FILE == f"{tmp_path}/mine/teacher.yaml"


def test_a_teacher_that_is_nowhere_is_looked_for_in_both_folders(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write(tmp_path / "shared" / "base.yaml", PATHS)
    cfg = read(write(tmp_path / "student.yaml", "_BASE_: shared/base.yaml"))
    with pytest.raises(FileNotFoundError) as error:
        teacher_config(cfg)
    assert f"GKD.TEACHER.CONFIG_FILE is '{tmp_path}/shared/teacher.yaml', which is no file." in str(error.value)
    assert f"the working folder, {tmp_path}/elsewhere" in str(error.value)
    # It may be trained yet.
    assert cfg.GKD.TEACHER.WEIGHTS == "teacher.pth"


def test_a_teacher_of_a_base_is_not_looked_for_beside_other_files(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    base = write(tmp_path / "base" / "base.yaml", PATHS)
    student = write(tmp_path / "mine" / "student.yaml", "_BASE_: ../base/base.yaml")
    for name in ("teacher.yaml", "teacher.pth"):
        write(tmp_path / "mine" / name, "VERSION: 2")
    for pairs in ([], ["SEED", "1"]):
        teacher = read(student, *pairs).GKD.TEACHER
        assert teacher.WEIGHTS == "teacher.pth"
        assert teacher.CONFIG_FILE == f"{tmp_path}/base/teacher.yaml"
    # What a file sets itself, be it the same name, and what the arguments set, is.
    beside = f"{tmp_path}/mine/teacher.pth"
    assert read(student, "GKD.TEACHER.WEIGHTS", "teacher.pth").GKD.TEACHER.WEIGHTS == beside
    write(student, "_BASE_: ../base/base.yaml\nGKD: {TEACHER: {WEIGHTS: teacher.pth}}")
    assert read(student).GKD.TEACHER.WEIGHTS == beside
    write(base.with_name("teacher.pth"), "")
    write(student, "_BASE_: ../base/base.yaml")
    assert os.path.samefile(read(student).GKD.TEACHER.WEIGHTS, base.with_name("teacher.pth"))


def test_a_config_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"there is no config file {tmp_path}/none.yaml"):
        read(tmp_path / "none.yaml")


def test_a_distilled_student_can_be_a_teacher(distiller_config, tmp_path):
    """Its config says GKDDistiller, its checkpoint is a plain student's."""
    cfg = distiller_config("retinanet")
    (tmp_path / "distilled.yaml").write_text(cfg.dump())
    cfg.GKD.TEACHER.CONFIG_FILE = str(tmp_path / "distilled.yaml")
    teacher = teacher_config(cfg)
    assert teacher.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert teacher.MODEL.WEIGHTS == cfg.GKD.TEACHER.WEIGHTS


def test_an_unknown_device_is_named(project):
    with pytest.raises(ValueError, match="MODEL.DEVICE is 'gpu', which torch does not know: give cuda"):
        read(project / "configs" / "toy" / "gkd_frcnn.yaml", "MODEL.DEVICE", "gpu")
