"""Which checkpoint of a folder a run goes on from, where last_checkpoint does not tell."""

import os

import pytest
import torch
from detectron2.config import get_cfg

from gkd_d2.analysis.runs import Run
from gkd_d2.config import add_gkd_config
from gkd_d2.engine.preflight import _weights
from gkd_d2.engine.run import YacsRun
from gkd_d2.modeling.student import find_checkpoint
from gkd_d2.utils.checkpoint import CompleteCheckpointer, DamagedCheckpointError, StudentCheckpointer
from gkd_d2.utils.last_checkpoint import find_resumable, has_checkpoint


def checkpointer(folder, kind=StudentCheckpointer, number=0.0, **options):
    """Of a model whose every weight is ``number``."""
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, number)
    return kind(model, str(folder), **options)


def resumed(folder, kind=StudentCheckpointer):
    found = checkpointer(folder, kind)
    rest = found.resume_or_load("")
    assert (found.model.weight == rest["iteration"]).all()
    return rest["iteration"]


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.fixture
def written(tmp_path):
    """A folder with checkpoints after iterations 9, 19 and 29, whose weights are these numbers, and others beside."""
    for iteration in (19, 9, 29):
        checkpointer(tmp_path, number=iteration).save(f"model_{iteration:07d}", iteration=iteration)
    checkpointer(tmp_path, number=35).save("model_stopped", resumable=False, iteration=35)
    for name in ("teacher.pth", "model_0000099.pth.partial", "model_0000098.pkl"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "model_0000097.pth").mkdir()
    return tmp_path


def spoil(folder, kind):
    """Make last_checkpoint one that names nothing to go on from."""
    pointer = folder / "last_checkpoint"
    pointer.unlink()
    contents = {
        "bytes": b"\xff\xfe\x00model",
        "empty": b"",
        "blank": b"\n \n",
        "outside": b"../model_0000009.pth",
        "absolute": str(folder / "model_0000009.pth").encode(),
        "parent": b"..",
        "long": b"m" * 300 + b".pth",
        "control": b"model\x1b[2J\x00.pth",
        "pickle": b"model_0000098.pkl",
    }
    if kind == "folder":
        (pointer / "inside").mkdir(parents=True)
    elif kind == "loop":
        pointer.symlink_to(pointer)
    elif kind != "absent":
        pointer.write_bytes(contents[kind])


FAULTS = {
    "bytes": "/last_checkpoint is no text: ",
    "empty": "/last_checkpoint is empty: ",
    "blank": "/last_checkpoint is empty: ",
    "outside": "/last_checkpoint names '../model_0000009.pth', which is no file of its folder: ",
    "absolute": "/model_0000009.pth', which is no file of its folder: ",
    "parent": "/last_checkpoint names .., but a run goes on from a .pth alone: ",
    "long": ", which is no file of its folder: ",
    "control": "/last_checkpoint names 'model\\x1b[2J\\x00.pth', which is no file of its folder: ",
    "pickle": "/last_checkpoint names model_0000098.pkl, but a run goes on from a .pth alone: ",
    "folder": "/last_checkpoint is no file: ",
    "loop": "/last_checkpoint can't be read (Too many levels of symbolic links): ",
    "absent": " holds checkpoints but no last_checkpoint: ",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_the_newest_whole_checkpoint_is_taken_with_a_warning(kind, written, caplog):
    spoil(written, kind)
    for reader in (StudentCheckpointer, CompleteCheckpointer):
        caplog.clear()
        assert resumed(written, reader) == 29
        (warning,) = warnings(caplog)
        assert FAULTS[kind] in warning and warning.startswith(str(written))
        assert warning.endswith(f": {written}/model_0000029.pth is taken, the newest checkpoint there by its name")
    caplog.clear()
    (written / "model_0000029.pth").write_bytes(b"cut")
    assert resumed(written) == 19
    assert len(warnings(caplog)) == 2 and "Falling back to the checkpoint before it" in warnings(caplog)[1]
    checkpointer(written, number=39).save("model_final", iteration=39)
    assert (written / "last_checkpoint").read_text() == "model_final.pth" and resumed(written) == 39
    (written / "last_checkpoint").write_bytes(b"\xff")
    assert resumed(written) == 39


def test_all_agree_on_whether_there_is_something_to_resume(written, tmp_path_factory, monkeypatch):
    """With and without last_checkpoint: the preflight, the trainer's checkpointer, reports and tools."""
    cfg = get_cfg()
    add_gkd_config(cfg)
    cfg.MODEL.WEIGHTS = "none.pth"
    empty = tmp_path_factory.mktemp("empty")
    (empty / "model_stopped.pth").write_bytes(b"x")
    for folder, expected in (
        (written, True),
        (empty, False),
        (empty / "nowhere", False),
        (written / "teacher.pth", False),
    ):
        cfg.OUTPUT_DIR = str(folder)
        for _ in range(2):
            assert has_checkpoint(str(folder)) is expected
            assert (_weights(YacsRun(cfg), False, True) == []) is expected
            assert Run("", folder).has_checkpoint is expected
            assert checkpointer(folder).has_checkpoint() is expected
            assert bool(checkpointer(folder).get_checkpoint_file()) is expected
            if expected:
                assert find_checkpoint(folder) == folder / "model_0000029.pth"
                (folder / "last_checkpoint").unlink(missing_ok=True)
    monkeypatch.chdir(written)
    assert has_checkpoint("") and find_resumable("").last == "model_0000029.pth"


def test_a_pointer_to_nothing_is_no_start_at_0(tmp_path):
    """Where nothing else is there a resume is refused, as where the named file is damaged."""
    (tmp_path / "last_checkpoint").write_bytes(b"\xff")
    assert _weights_are_not_read(tmp_path)
    for reader in (StudentCheckpointer, CompleteCheckpointer):
        with pytest.raises(
            DamagedCheckpointError,
            match="last_checkpoint is no text, and .* holds no checkpoint of a run.* without --resume",
        ):
            resumed(tmp_path, reader)
    with pytest.raises(FileNotFoundError, match="last_checkpoint is no text: name a checkpoint"):
        find_checkpoint(tmp_path)


def _weights_are_not_read(folder):
    cfg = get_cfg()
    add_gkd_config(cfg)
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = "none.pth", str(folder)
    return _weights(YacsRun(cfg), False, True) == []


def test_the_order_is_that_of_the_names_whatever_the_folder_lists_first(written, monkeypatch):
    """So that the processes of a run choose the same."""
    for name in ("model_19.pth", "model_019.pth"):
        (written / name).write_bytes((written / "model_0000019.pth").read_bytes())
    found, listed = find_resumable(str(written)).paths, os.listdir(written)
    names = [os.path.basename(path) for path in found]
    assert names == ["model_0000029.pth", "model_19.pth", "model_019.pth", "model_0000019.pth", "model_0000009.pth"]
    for order in (sorted(listed), sorted(listed, reverse=True)):
        monkeypatch.setattr(os, "listdir", lambda _, order=order: order)
        assert find_resumable(str(written)).paths == found


def test_a_run_that_overwrites_an_earlier_one_says_so_once(written, tmp_path, caplog):
    weights = tmp_path / "teacher.pth"
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, weights)
    checkpointer(written).resume_or_load(str(weights), resume=False)
    (warning,) = warnings(caplog)
    assert f"the last of them {written}/model_0000029.pth, and this run overwrites them: --resume continues" in warning
    caplog.clear()
    # Of several processes one says it; a resume, and a run in a folder of its own, have nothing to say.
    checkpointer(written, save_to_disk=False).resume_or_load(str(weights), resume=False)
    checkpointer(tmp_path / "new").resume_or_load(str(weights), resume=False)
    checkpointer(tmp_path / "new").resume_or_load(str(weights), resume=True)
    assert resumed(written) == 29
    assert warnings(caplog) == []
