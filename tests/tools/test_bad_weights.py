"""Weights that no tool can use: a sentence with key, file and fault, and exit status 1."""

import pickle

import pytest
import torch
from hostile import Touch

from gkd_d2.config import read_config
from gkd_d2.modeling.student import build_student

FAULTS = {
    "empty": (b"", "is damaged: it is empty"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "Git LFS pointer"),
    "page": (b"<!doctype html><html>", "a web page"),
    # Begins as a checkpoint in torch's old form does, so that only its reader sees the fault.
    "cut": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9", "is damaged: "),
}
# What only the reading of the whole file finds.
LATE_FAULTS = ("cut",)
STUDENT = ("--config-file", "student.yaml")
TOOLS = {
    "train, student": ("train_net.py", *STUDENT, "--num-gpus", 0, "MODEL.WEIGHTS", "bad.pth"),
    "train, teacher": ("train_net.py", *STUDENT, "--num-gpus", 0, "GKD.TEACHER.WEIGHTS", "bad.pth"),
    "evaluate": ("train_net.py", *STUDENT, "--num-gpus", 0, "--eval-only", "MODEL.WEIGHTS", "bad.pth"),
    "suggest, student": ("suggest_weights.py", *STUDENT, "MODEL.WEIGHTS", "bad.pth"),
    "suggest, teacher": ("suggest_weights.py", *STUDENT, "GKD.TEACHER.WEIGHTS", "bad.pth"),
    "visualize": ("visualize_gkd.py", *STUDENT, "MODEL.WEIGHTS", "bad.pth"),
    "export": ("export_student.py", *STUDENT, "--weights", "bad.pth", "--output", "exported"),
}


@pytest.fixture
def work(distiller_config, toy_scenes, tmp_path, monkeypatch):
    """The working folder, with student.yaml and its data."""
    monkeypatch.chdir(tmp_path)
    cfg = distiller_config("retinanet")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy_kitti_train",), ("toy_kitti_val",)
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = 0, 2
    cfg.OUTPUT_DIR = "output"
    (tmp_path / "student.yaml").write_text(cfg.dump())
    return tmp_path


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_weights_are_a_sentence(fault, tool, work, run_here):
    content, message = FAULTS[fault]
    (work / "bad.pth").write_bytes(content)
    status, said = run_here(*TOOLS[tool])
    assert status == 1 and "Traceback" not in said
    assert message in said and "bad.pth" in said
    *_, key, _ = TOOLS[tool]
    assert tool == "export" or key in said
    if fault not in LATE_FAULTS and tool != "export":
        assert "This run can't start" in said and not (work / "output").exists()


@pytest.mark.parametrize("tool", TOOLS)
def test_objects_and_flipped_bits_are_a_sentence(tool, work, run_here):
    """Before the first step; and nothing in the file is run."""
    name, *arguments = TOOLS[tool]
    (work / "objects.pkl").write_bytes(pickle.dumps({"model": {"a": Touch(work / "mark")}, "__author__": "someone"}))
    content = bytearray((work / "teacher.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (work / "flipped.pth").write_bytes(content)
    for kind, message in (("objects.pkl", "io.open), which could run"), ("flipped.pth", "agree with its CRC-32 sum")):
        status, said = run_here(name, *(kind if argument == "bad.pth" else argument for argument in arguments))
        assert status == 1 and "Traceback" not in said and "weights_only" not in said
        assert f"{kind} " in said and message in said
        assert tool == "export" or arguments[-2] in said
        assert "Starting training" not in said
    assert not (work / "mark").exists()


def test_weights_of_another_detector_are_a_sentence(work, run_here):
    torch.save({"model": {"other": torch.zeros(1)}}, work / "bad.pth")
    for tool in ("train, student", "train, teacher", "evaluate"):
        status, said = run_here(*TOOLS[tool])
        assert status == 1 and "bad.pth does not fit the detector that" in said, tool


def test_a_run_of_which_no_checkpoint_is_whole_is_not_resumed(work, run_here):
    (work / "output").mkdir()
    (work / "output" / "last_checkpoint").write_text("model_0000009.pth")
    (work / "output" / "model_0000009.pth").write_bytes(b"")
    status, said = run_here("train_net.py", *STUDENT, "--num-gpus", 0, "--resume")
    assert status == 1 and "of the checkpoints in output none can be read that a resume may take (" in said
    status, said = run_here("train_net.py", *STUDENT, "--num-gpus", 0, "--resume", "--eval-only")
    assert status == 1 and "Traceback" not in said
    assert said.endswith(
        "OUTPUT_DIR: the checkpoint output/model_0000009.pth is damaged: it is empty. Copy it again, or name another "
        "checkpoint as MODEL.WEIGHTS, without --resume"
    )


def test_a_run_whose_last_checkpoint_is_unreadable_goes_on(work, run_here):
    """In training and evaluation, from the newest; without --resume the run begins anew and says what it overwrites."""
    pointer, final = work / "output" / "last_checkpoint", work / "output" / "model_final.pth"

    def said_at(*options):
        status, printed = run_here("train_net.py", *STUDENT, "--num-gpus", 0, *options, *small)
        assert status == 0
        return printed

    small = ("MODEL.WEIGHTS", "", "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", ())
    assert "checkpoints of an earlier run" not in said_at()
    weights = final.read_bytes()
    pointer.write_bytes(b"\xff\xfe")
    warning = "output/last_checkpoint is no text: output/model_final.pth is taken, the newest checkpoint there"
    for options in (("--resume",), ("--resume", "--eval-only")):
        assert said_at(*options).count(warning) == 1
    pointer.unlink()
    assert "output holds checkpoints but no last_checkpoint: output/model_final.pth is taken" in said_at("--resume")
    assert final.read_bytes() == weights
    assert said_at().count("output holds checkpoints of an earlier run, the last of them output/model_final.pth") == 1


@pytest.mark.parametrize("tool", TOOLS)
def test_weights_that_become_infinite_are_a_sentence(tool, work, run_here):
    """float32 can't hold them. With such running statistics a student would train, and evaluate to an AP of NaN."""
    name = "backbone.bottom_up.stem.conv1.norm.running_mean"
    state = torch.load(work / "teacher.pth")
    if "teacher" not in tool:
        state["model"] = build_student(read_config("student.yaml", [])).state_dict()
    state["model"][name] = torch.full(state["model"][name].shape, 1e300, dtype=torch.float64)
    torch.save(state, work / "bad.pth")
    status, said = run_here(*TOOLS[tool])
    assert status == 1 and "Traceback" not in said, said
    assert "infinite or NaN" in said and name in said
