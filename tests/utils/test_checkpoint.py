"""Checkpoints that do not fit are errors, and half-written ones do no harm."""

import argparse
import contextlib
import io
import math
import pathlib
import pickle
import random
import re
import resource
import struct
import tarfile

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from hostile import Touch, hostile_pickles
from tiny import detector_config

from gkd_d2 import config
from gkd_d2.engine.trainer import Trainer
from gkd_d2.utils.checkpoint import (
    AverageCheckpointer,
    CheckpointError,
    CompleteCheckpointer,
    DamagedCheckpointError,
    NoAverageError,
    StudentCheckpointer,
    holds_average,
)
from gkd_d2.utils.checkpoint_files import find_damage


def save(path, state):
    torch.save({"model": state}, path)
    return str(path)


def test_a_checkpoint_that_matches_nothing_is_refused(tmp_path):
    model = build_model(detector_config("retinanet"))
    path = save(tmp_path / "other.pth", {f"wrapped.{name}": value for name, value in model.state_dict().items()})
    with pytest.raises(ValueError, match="sets none of the model's .* checkpoint wrapped.backbone"):
        StudentCheckpointer(model).load(path)


def test_a_distillers_student_starts_from_backbone_weights(tmp_path, distiller_config):
    """ImageNet checkpoints hold the bare ResNet and are matched by Detectron2's heuristics."""
    distiller = build_model(distiller_config("retinanet"))
    bottom_up = distiller.student.backbone.bottom_up
    state = {name: torch.full_like(value, 2) for name, value in bottom_up.state_dict().items()}
    torch.save({"model": state, "matching_heuristics": True, "__author__": "test"}, tmp_path / "backbone.pth")
    StudentCheckpointer(distiller).load(str(tmp_path / "backbone.pth"))
    assert all((value == 2).all() for value in bottom_up.state_dict().values())
    assert not (distiller.student.head.cls_score.weight == 2).all()


@pytest.mark.parametrize("checkpointer", [DetectionCheckpointer, StudentCheckpointer])
def test_a_distillers_student_starts_from_a_detector_of_other_classes(checkpointer, tmp_path, distiller_config, caplog):
    """What does not fit is left as it is, with Detectron2's warning."""
    cfg = detector_config("retinanet")
    cfg.MODEL.RETINANET.NUM_CLASSES = 8
    other = build_model(cfg)
    distiller = build_model(distiller_config("retinanet"))
    before = distiller.student.head.cls_score.weight.clone()
    with caplog.at_level("WARNING"):
        checkpointer(distiller).load(save(tmp_path / "other.pth", other.state_dict()))
    assert torch.equal(distiller.student.head.cls_score.weight, before)
    assert torch.equal(distiller.student.head.bbox_pred.weight, other.head.bbox_pred.weight)
    assert "head.cls_score.weight' to the model due to incompatible shapes" in caplog.text
    with pytest.raises(AttributeError, match="no attribute 'loss_normalizer'"):
        distiller.loss_normalizer  # noqa: B018


def test_a_partial_checkpoint_is_refused_where_all_is_needed(tmp_path):
    model = build_model(detector_config("retinanet"))
    state = model.state_dict()
    del state["head.cls_score.bias"], state["head.bbox_pred.weight"]
    with pytest.raises(ValueError, match="leaves 2 .* unset: head.bbox_pred.weight, head.cls_score.bias"):
        CompleteCheckpointer(model).load(save(tmp_path / "part.pth", state))
    # Extra tensors, such as a distiller's align convolutions and what its method trains, do no harm.
    extra = model.state_dict() | {"align.p3.weight": torch.zeros(1), "method.layer.bias": torch.zeros(1)}
    CompleteCheckpointer(model).load(save(tmp_path / "more.pth", extra))


def test_averaged_weights_in_place_of_the_raw_ones(tmp_path):
    model = torch.nn.Linear(2, 1)
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average = {name: tensor + 1 for name, tensor in raw.items()}
    both, alone = tmp_path / "both.pth", tmp_path / "alone.pth"
    torch.save({"model": raw, "ema_state": average, "iteration": 3}, both)
    torch.save({"model": raw}, alone)
    AverageCheckpointer(model).load_weights(str(both))
    assert all(torch.equal(tensor, average[name]) for name, tensor in model.state_dict().items())
    CompleteCheckpointer(model).load_weights(str(both))
    assert all(torch.equal(tensor, raw[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(
        NoAverageError, match=r"^MODEL.WEIGHTS: .*alone.pth holds no averaged weights: it was trained wi"
    ):
        AverageCheckpointer(model).load_weights(str(alone))

    torch.save({"model": raw, "ema_state": {"weight": average["weight"]}}, both)
    with pytest.raises(CheckpointError, match="leaves 1 of the model's parameters unset: bias"):
        AverageCheckpointer(model).load_weights(str(both))
    torch.save({"model": raw, "ema_state": {**average, "bias": torch.tensor([math.nan])}}, both)
    with pytest.raises(
        DamagedCheckpointError, match="averaged weights of .*both.pth: it holds numbers .* NaN, in bias"
    ):
        AverageCheckpointer(model).load_weights(str(both))
    CompleteCheckpointer(model).load_weights(str(both))


def test_whether_a_checkpoint_holds_an_average(tmp_path):
    model = {"weight": torch.zeros(2)}
    files = {name: tmp_path / name for name in ("both.pth", "alone.pth", "old.pth", "other.pkl", "cut.pth", "list.pth")}
    torch.save({"model": model, "ema_state": model}, files["both.pth"])
    torch.save({"model": model}, files["alone.pth"])
    torch.save({"model": model}, files["old.pth"], _use_new_zipfile_serialization=False)
    files["other.pkl"].write_bytes(pickle.dumps({"model": {"weight": np.zeros(2)}}))
    files["cut.pth"].write_bytes(files["both.pth"].read_bytes()[:-100])
    torch.save(["ema_state"], files["list.pth"])
    assert [name for name, path in files.items() if holds_average(str(path))] == ["both.pth"]


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 243\n"
WEB_PAGE = b"\n<!DOCTYPE html>\n<html><title>Sign in</title></html>"


def make_file(path, kind, state):
    """Write a file that is no whole checkpoint of ``state``."""
    whole = {"model": state}
    if kind.startswith("cut"):
        if path.suffix == ".pkl":
            path.write_bytes(pickle.dumps({"model": {k: v.numpy() for k, v in state.items()}, "__author__": "test"}))
        else:
            torch.save(whole, path, _use_new_zipfile_serialization=kind != "cut, old form")
        path.write_bytes(path.read_bytes()[: -1 if kind == "cut at its end" else 1000])
    elif kind == "objects":
        torch.save({**whole, "args": argparse.Namespace(lr=1)}, path)
    elif kind == "other form":
        torch.save({"state_dict": state, "meta": {"epoch": 1}}, path)
    elif kind == "integers":
        torch.save({"model": {0: torch.zeros(1)}}, path)
    elif kind == "strings":
        torch.save({"model": {"weight": "one"}}, path)
    elif kind == "word":
        torch.save("a model", path)
    elif kind == "list":
        torch.save([1, 2], path)
    else:
        # The number of disks stands in front of the record at a zip's end.
        disks = b"PK\x03\x04PK\x06\x07" + struct.pack("<LQL", 0, 0, 2) + b"PK\x05\x06" + bytes(18)
        contents = {
            "empty": b"",
            "LFS": LFS_POINTER,
            "page": WEB_PAGE,
            "text": b"no checkpoint",
            "many disks": disks,
            "zeros": bytes(3000),
        }
        path.write_bytes(contents[kind])


FAULTS = {
    "empty": "is damaged: it is empty",
    "cut": "is damaged: ",
    "cut at its end": "is damaged: it ends too early",
    "cut, old form": "is damaged: ",
    "LFS": "is not a checkpoint but a Git LFS pointer, which `git lfs pull` replaces",
    "page": "is not a checkpoint but a web page",
    "text": "is not a checkpoint: its content is of another form",
    "objects": r"holds objects beside arrays, tensors and plain data \(argparse.Namespace\), which could run any code",
    "other form": "is not of Detectron2's form, with .* under 'model': it holds meta, state_dict",
    "list": "is not of Detectron2's form, with .* under 'model': it holds a list",
    "integers": "is not of Detectron2's form, with the model's tensors by their names .* it holds 0",
    "strings": "is not of Detectron2's form, with .* under 'model': it holds weight",
    "word": "is not of Detectron2's form, with .* under 'model': it holds a str",
    "many disks": "is damaged: zipfiles that span multiple disks",
    "zeros": "is damaged: it begins with zeros alone",
}
PKL_FAULTS = {"empty": FAULTS["empty"], "cut": "is damaged: ", "LFS": FAULTS["LFS"], "page": FAULTS["page"]}


@pytest.mark.parametrize("reader", [StudentCheckpointer, CompleteCheckpointer])
@pytest.mark.parametrize(
    ("suffix", "kind", "message"),
    [(".pth", *fault) for fault in FAULTS.items()]
    + [(".pkl", *fault) for fault in PKL_FAULTS.items()]
    + [(".pkl", "text", "is damaged: ")],
)
def test_a_file_that_is_no_checkpoint_is_named_with_its_key(suffix, kind, message, reader, tmp_path):
    """Of teacher, student and evaluation alike, in one sentence."""
    model = torch.nn.Linear(64, 64)
    path = tmp_path / f"weights{suffix}"
    make_file(path, kind, model.state_dict())
    with pytest.raises(DamagedCheckpointError, match=f"the checkpoint {path} {message}"):
        reader(model).load(str(path))
    with pytest.raises(DamagedCheckpointError) as error:
        reader(model, str(tmp_path)).resume_or_load(str(path))
    text = str(error.value)
    assert text.startswith(f"MODEL.WEIGHTS: the checkpoint {path} ")
    assert text.endswith(". Copy or fetch it again, or name another checkpoint")
    assert "\n" not in text and len(text) < 400 + len(str(path))
    # Whole files are read after it.
    reader(model).load_weights(save(tmp_path / "whole.pth", model.state_dict()))


@pytest.mark.parametrize(
    "values",
    [
        np.array(["one", "two"]),
        np.float32(1.5),
        torch.zeros(2).to_sparse(),
        torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8),
        torch.zeros(2, device="meta"),
    ],
    ids=["text", "number", "sparse", "quantized", "meta"],
)
def test_what_is_no_dense_tensor_is_refused_by_its_name(values, tmp_path):
    state = {"weight": torch.zeros(2, 3), "bias": values}
    path = tmp_path / ("weights.pth" if torch.is_tensor(values) else "weights.pkl")
    if torch.is_tensor(values):
        torch.save({"model": state}, path)
    else:
        path.write_bytes(pickle.dumps({"model": {**state, "weight": np.zeros((2, 3), "f4")}, "__author__": "someone"}))
    with pytest.raises(DamagedCheckpointError, match="weights.* holds what is no dense tensor of numbers, in bias$"):
        CompleteCheckpointer(torch.nn.Linear(3, 2)).load(str(path))


def flipped(content, bit):
    """A file's content with one bit changed."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def held(path, state):
    """Whether the file loads, as what it was written from; None where it is refused."""
    model = torch.nn.Linear(8, 8)
    try:
        CompleteCheckpointer(model).load_weights(str(path))
    except CheckpointError as error:
        assert str(path) in str(error)
        return None
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_no_flipped_bit_gives_other_weights(tmp_path):
    """Some are in what nothing reads, such as the space between tensors."""
    path, state = tmp_path / "model.pth", torch.nn.Linear(8, 8).state_dict()
    content = pathlib.Path(save(path, state)).read_bytes()
    found = []
    for bit in random.Random(0).sample(range(8 * len(content)), 250):
        path.write_bytes(flipped(content, bit))
        found.append(held(path, state))
    assert False not in found and found.count(None) > 100 and found.count(True) > 50
    # In a tensor, and in what the zip's directory says of it: 38 bytes on, that it were a folder.
    tensor = content.index(state["weight"].numpy().tobytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"model/data/0"))
    for bit, message in (
        (8 * tensor, "does not agree with its CRC-32 sum"),
        (8 * entry + 38 * 8 + 4, "is marked as a"),
    ):
        path.write_bytes(flipped(content, bit))
        with pytest.raises(DamagedCheckpointError, match=f"{path} is damaged: its part model/data/0 {message}"):
            CompleteCheckpointer(torch.nn.Linear(8, 8)).load_weights(str(path), "GKD.TEACHER.WEIGHTS")


def test_a_resume_passes_over_a_flipped_bit(written, caplog):
    last = written / "model_0000029.pth"
    last.write_bytes(flipped(last.read_bytes(), 8 * 500_000))
    assert resumed(written) == 19
    assert f"the checkpoint {last} is damaged: its part" in caplog.text and "Falling back" in caplog.text


@pytest.fixture
def without_sums():
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch writes sums always")
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


def test_a_file_without_sums_is_read_with_a_warning(without_sums, tmp_path, caplog):
    path, state = tmp_path / "model.pth", torch.nn.Linear(8, 8).state_dict()
    save(path, state)
    assert held(path, state)
    assert f"{path} was written without CRC-32 sums: damage to its numbers can't be found" in caplog.text
    # A sum, after the directory's signature, that is no longer 0.
    path.write_bytes(flipped(path.read_bytes(), 8 * (path.read_bytes().index(b"PK\x01\x02") + 16)))
    assert held(path, state) is None


def mutated(content, rng):
    """A file's content that was cut off, or in which a few bytes changed, were lost or came in."""
    content, place = bytearray(content), rng.randrange(len(content))
    # The ends, which hold the file's structure, more often than the tensors.
    place = rng.choice([place, place % 400, -1 - place % 400])
    change = rng.choice(["cut", "lose", "insert", "change", "change"])
    if change == "cut":
        return content[:place]
    if change == "lose":
        del content[place : place + 20]
    elif change == "insert":
        content[place:place] = rng.randbytes(9)
    else:
        for _ in range(rng.choice([1, 2, 5])):
            content[place] = rng.randrange(256)
            place = rng.randrange(len(content))
    return content


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["zip", "old", "zoo"])
def test_mutated_files_load_or_are_refused(form, tmp_path):
    """300 of each form; none ends in another error than those that the tools report."""
    state = torch.nn.Linear(3, 2).state_dict()
    path = tmp_path / ("whole.pkl" if form == "zoo" else "whole.pth")
    if form == "zoo":
        arrays = {name: value.numpy() for name, value in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}, protocol=2))
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=form == "zip")
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        path.write_bytes(mutated(whole, rng))
        try:
            CompleteCheckpointer(torch.nn.Linear(3, 2)).load_weights(str(path))
        except (CheckpointError, OSError) as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


def test_memory_that_can_not_be_had_is_not_called_a_damaged_file(tmp_path):
    """For a resume would fall back to the checkpoint before it."""
    path = tmp_path / "large.pkl"
    # The length of a string, 2**60 bytes.
    path.write_bytes(b"\x80\x04\x8d" + (2**60).to_bytes(8, "little"))
    with pytest.raises(OSError, match=f"{path} can't be read: it needs more memory than there is, or is damaged"):
        StudentCheckpointer(torch.nn.Linear(3, 2)).load(str(path))


def test_forms_of_checkpoints_that_detectron2_reads(tmp_path):
    """The model zoo's pickles, torch's old form, and tensors without the key 'model'."""
    model = torch.nn.Linear(3, 2)
    state = {name: torch.full_like(value, 5) for name, value in model.state_dict().items()}
    zoo = {"model": {name: value.numpy() for name, value in state.items()}, "__author__": "Detectron2 Model Zoo"}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(zoo, protocol=2))
    torch.save({"model": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"model_state": state | {"num_batches_tracked": torch.zeros(1)}}, tmp_path / "pycls.pyth")
    blobs = {"weight": zoo["model"]["weight"], "bias": zoo["model"]["bias"], "weight_momentum": np.zeros(3, "f4")}
    (tmp_path / "detectron.pkl").write_bytes(pickle.dumps({"blobs": blobs, "cfg": "MODEL: {}"}, protocol=0))
    (tmp_path / "caffe2.pkl").write_bytes(pickle.dumps(blobs, protocol=2))
    for path in tmp_path.iterdir():
        for reader in (StudentCheckpointer, CompleteCheckpointer):
            torch.nn.init.zeros_(model.weight)
            reader(model).load_weights(str(path))
            assert (model.weight == 5).all(), path
            assert find_damage(str(path)) == ""


def test_torchs_form_under_the_name_of_another(tmp_path):
    path = save(tmp_path / "torch.pkl", torch.nn.Linear(3, 2).state_dict())
    with pytest.raises(DamagedCheckpointError, match=f"{path} is of the form of a .pth: give it a name that ends so"):
        StudentCheckpointer(torch.nn.Linear(3, 2)).load_weights(path)


def test_a_damaged_file_in_the_cache_is_named_with_its_url(tmp_path, monkeypatch):
    """What was fetched once is not fetched again."""
    cached = tmp_path / "R-50.pkl"
    cached.write_bytes(b"")
    url = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    monkeypatch.setattr(PathManager, "get_local_path", lambda path, **_: str(cached) if path == url else path)
    message = f"the checkpoint {cached} is damaged: it is empty. Remove it to fetch {url} again, or name another"
    with pytest.raises(DamagedCheckpointError, match=message):
        StudentCheckpointer(torch.nn.Linear(3, 2)).load_weights(url)


def test_a_checkpoint_that_does_not_fit_is_named_with_its_key(tmp_path):
    model = torch.nn.Linear(3, 2)
    path = save(tmp_path / "other.pth", {"other": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=f"MODEL.WEIGHTS: {path} does not fit the detector that the config"):
        StudentCheckpointer(model).resume_or_load(path, resume=False)
    with pytest.raises(CheckpointError, match=f"GKD.TEACHER.WEIGHTS: {path} does not fit the teacher: the ch.* 2 of"):
        CompleteCheckpointer(model).load_weights(path, "GKD.TEACHER.WEIGHTS", "the teacher")


def test_a_disk_that_can_not_be_read_is_not_called_a_damaged_file(tmp_path, monkeypatch):
    path = save(tmp_path / "whole.pth", {})

    def fails(*args, **kwargs):
        raise OSError("Input/output error")

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(OSError, match="Input/output error"):
        StudentCheckpointer(torch.nn.Linear(3, 2)).load(path)


def number_checkpointer(folder, number=0.0):
    """A checkpointer of a model of 1 MB whose every weight is ``number``."""
    model = torch.nn.Linear(512, 512)
    torch.nn.init.constant_(model.weight, number)
    return StudentCheckpointer(model, str(folder))


@pytest.fixture
def written(tmp_path):
    """A folder with checkpoints after iterations 9, 19 and 29, whose weights are these numbers."""
    for iteration in (9, 19, 29):
        number_checkpointer(tmp_path, iteration).save(f"model_{iteration:07d}", iteration=iteration)
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def resumed(folder):
    """The iteration that a resume finds, which is also that of the weights."""
    checkpointer = number_checkpointer(folder)
    rest = checkpointer.resume_or_load("")
    assert (checkpointer.model.weight == rest["iteration"]).all()
    return rest["iteration"]


# Marks of pickles that let objects in, in a .pkl and as torch.save writes them.
HOSTILE = {
    **{f"{kind}.pkl": kind for kind in hostile_pickles("mark")},
    **{name: name for name in ("zip.pth", "old.pth", "zip.pyth", "old.pyth", "deep.pth", "plain.pth", ".pkl")},
}


def make_hostile(folder, name, mark):
    """A file of weights that makes the file ``mark`` where what it asks for is run."""
    path, inside = folder / name, Touch(mark)
    if HOSTILE[name] in (kinds := hostile_pickles(mark)):
        path.write_bytes(kinds[HOSTILE[name]])
    elif name in (".pkl", "plain.pth"):
        path.write_bytes(kinds["protocol 2"])
    else:
        key = "model_state" if name.endswith(".pyth") else "model"
        content = {key: {"weight": [{"deep": inside}] if name == "deep.pth" else inside}}
        torch.save(content, path, _use_new_zipfile_serialization="old" not in name)
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_in_a_file_is_run(name, tmp_path, monkeypatch, caplog):
    """As weights, teacher, and through last_checkpoint; nor where the environment tells torch to run it."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark, model = tmp_path / "mark", torch.nn.Linear(3, 2)
    path = make_hostile(tmp_path, name, mark)
    for kind, key in ((StudentCheckpointer, "MODEL.WEIGHTS"), (CompleteCheckpointer, "GKD.TEACHER.WEIGHTS")):
        with pytest.raises(DamagedCheckpointError) as error:
            kind(model).load_weights(str(path), key)
        text = str(error.value)
        assert text.startswith(f"{key}: the checkpoint {path} ") and "\n" not in text and "weights_only" not in text
        if name != "plain.pth":
            assert re.search(
                r"holds objects beside arrays, tensors and plain data \(.*[Oo.][\w. ']+\), which could", text
            )
            assert "where you trust it, write its tensors alone into a .pth" in text
        causes = [error.value.__cause__, error.value.__cause__.__cause__]
        assert not any("weights_only" in str(cause) for cause in causes)
    number_checkpointer(tmp_path, 9).save("model_0000009", iteration=9)
    (tmp_path / "last_checkpoint").write_text(name)
    assert resumed(tmp_path) == 9 and name in caplog.text
    for path in tmp_path.glob("model_*.pth"):
        path.unlink()
    with pytest.raises(DamagedCheckpointError):
        resumed(tmp_path)
    assert not mark.exists()


def test_torch_is_always_told_to_read_tensors_alone(tmp_path, monkeypatch):
    """Before 2.6 it does not by itself, nor with it for two old forms."""
    told, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: told.append(options) or load(*args, **options))
    state = torch.nn.Linear(3, 2).state_dict()
    for name, content in (("a.pth", {"model": state}), ("a.pyth", {"model_state": state})):
        torch.save(content, tmp_path / name)
        StudentCheckpointer(torch.nn.Linear(3, 2)).load_weights(str(tmp_path / name))
    assert [options["weights_only"] for options in told] == [True, True]
    torch.jit.script(torch.nn.Linear(3, 2)).save(str(tmp_path / "script.pth"))
    with tarfile.open(tmp_path / "tar.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    for name, message in (
        ("script.pth", "is a TorchScript program, and not"),
        ("tar.pth", "is a tar archive, as torch"),
    ):
        with pytest.raises(DamagedCheckpointError, match=message):
            StudentCheckpointer(torch.nn.Linear(3, 2)).load_weights(str(tmp_path / name))
    assert len(told) == 2


@contextlib.contextmanager
def file_size_limit(size):
    """Within it no file can grow above ``size`` bytes, as on a full disk."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)


# A new name, and one that a whole checkpoint has.
@pytest.mark.parametrize("name", ["model_0000039", "model_0000029"])
@pytest.mark.parametrize("size", [0, 500_000])
def test_a_full_disk_leaves_the_earlier_checkpoints(name, size, written):
    before = contents(written)
    with file_size_limit(size), pytest.raises(OSError) as error:
        number_checkpointer(written, 39).save(name, iteration=39)
    assert f"the checkpoint {written}/{name}.pth can't be written" in str(error.value)
    assert "File too large" in str(error.value)
    assert f"The last whole one: {written}/model_0000029.pth" in str(error.value)
    assert contents(written) == before
    assert resumed(written) == 29


def test_a_full_disk_at_the_first_checkpoint(tmp_path):
    with file_size_limit(1000), pytest.raises(OSError, match="The last whole one: none"):
        number_checkpointer(tmp_path).save("model_0000009")
    assert contents(tmp_path) == {}


class Unpicklable:
    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


@pytest.mark.parametrize("error", [TypeError("no"), KeyboardInterrupt()])
def test_a_writing_that_breaks_off_leaves_the_earlier_checkpoints(error, written):
    """It ends within the file, where the weights are written already."""
    before = contents(written)
    with pytest.raises(type(error)):
        number_checkpointer(written, 39).save("model_0000029", iteration=Unpicklable(error))
    assert contents(written) == before


class Interrupted(io.FileIO):
    """A file in whose writing Ctrl-C falls."""

    def write(self, data):
        if self.tell() > 100_000:
            raise KeyboardInterrupt
        return super().write(data)


def test_ctrl_c_while_the_weights_are_written_is_not_called_a_full_disk(written, monkeypatch):
    before = contents(written)
    monkeypatch.setattr(pathlib.Path, "open", lambda path, mode: Interrupted(path, mode))
    with pytest.raises(KeyboardInterrupt):
        number_checkpointer(written, 39).save("model_0000039")
    assert contents(written) == before


@pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
def test_a_resume_passes_over_a_damaged_checkpoint(part, written, caplog):
    last = written / "model_0000029.pth"
    whole = last.read_bytes()
    assert resumed(written) == 29
    last.write_bytes(whole[: int(part * len(whole))])
    assert resumed(written) == 19
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert re.match(f"the checkpoint {last} is damaged: \\w.*Falling back to the checkpoint before it", warning)
    (written / "model_0000019.pth").write_bytes(b"no checkpoint")
    assert resumed(written) == 9
    # What the fallback left is overwritten by and by.
    number_checkpointer(written, 19).save("model_0000019", iteration=19)
    assert resumed(written) == 19


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    model = torch.nn.Linear(2, 2)
    state = {"weight": torch.tensor([[1.0, 2.0], [value, 3.0]]), "bias": torch.zeros(2)}
    torch.save({"model": state}, tmp_path / "bad.pth")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({k: v.numpy() for k, v in state.items()}))
    for kind, name in ((StudentCheckpointer, "bad.pth"), (CompleteCheckpointer, "bad.pkl")):
        path = tmp_path / name
        with pytest.raises(CheckpointError, match=f"{path} holds numbers that are infinite or NaN, in weight"):
            kind(model).load_weights(str(path), "GKD.TEACHER.WEIGHTS")


def test_a_resume_passes_over_weights_that_are_not_finite(written, caplog):
    last = written / "model_0000029.pth"
    checkpoint = torch.load(last, weights_only=True)
    next(iter(checkpoint["model"].values())).fill_(float("nan"))
    torch.save(checkpoint, last)
    assert resumed(written) == 19
    assert "holds numbers that are infinite or NaN" in caplog.text


def test_a_resume_passes_over_a_missing_checkpoint(written, caplog):
    (written / "model_0000029.pth").unlink()
    assert resumed(written) == 19
    assert f"last_checkpoint names {written}/model_0000029.pth, which is no file" in caplog.text
    (written / "last_checkpoint").write_text("")
    assert resumed(written) == 19


def test_an_evaluation_takes_the_last_checkpoint_of_a_run_or_none(written):
    evaluated = CompleteCheckpointer(torch.nn.Linear(512, 512), str(written))
    assert evaluated.resume_or_load("")["iteration"] == 29 and (evaluated.model.weight == 29).all()
    advice = "name another checkpoint as MODEL.WEIGHTS, without --resume"
    last = written / "model_0000029.pth"
    torch.save({"model": {"other": torch.zeros(1)}}, last)
    with pytest.raises(CheckpointError, match=f"OUTPUT_DIR: {last} does not fit the detector .* unset: .*; {advice}"):
        evaluated.resume_or_load("")
    last.write_bytes(b"")
    message = f"OUTPUT_DIR: the checkpoint {last} is damaged: it is empty. Copy it again, or {advice}"
    with pytest.raises(DamagedCheckpointError, match=message):
        evaluated.resume_or_load("")
    last.unlink()
    with pytest.raises(DamagedCheckpointError, match=f"OUTPUT_DIR: last_checkpoint names {last}, which is no file. C"):
        evaluated.resume_or_load("")


def test_a_fallback_takes_no_later_checkpoint(written):
    """It is of another run, as where a run was started anew in the folder of an older one."""
    number_checkpointer(written, 9).save("model_0000009", iteration=9)
    number_checkpointer(written, 19).save("model_0000019", iteration=19)
    (written / "model_0000019.pth").write_bytes(b"")
    assert resumed(written) == 9
    number_checkpointer(written).save("model_final", iteration=0)
    (written / "model_final.pth").write_bytes(b"")
    assert resumed(written) == 29


def test_checkpoints_of_which_none_is_whole(written):
    for path in written.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        DamagedCheckpointError,
        match=f"of the checkpoints in {written} none can be read that a resume may take .*: start anew",
    ):
        resumed(written)


def test_a_checkpoint_to_look_at_is_not_resumed(written):
    number_checkpointer(written, 35).save("model_stopped", resumable=False, iteration=35)
    assert torch.load(written / "model_stopped.pth")["iteration"] == 35
    assert resumed(written) == 29


def test_weights_are_loaded_where_nothing_is_resumed(written, tmp_path_factory):
    weights = tmp_path_factory.mktemp("weights") / "start.pth"
    torch.save({"model": torch.nn.Linear(512, 512).state_dict(), "iteration": 77}, weights)
    expected = torch.load(weights)["model"]["weight"]
    for folder, resume in ((written, False), (weights.parent, True), (weights.parent, False)):
        checkpointer = number_checkpointer(folder)
        checkpointer.resume_or_load(str(weights), resume=resume)
        assert torch.equal(checkpointer.model.weight, expected)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpointError, match=f"the checkpoint {weights} is damaged"):
        number_checkpointer(written).resume_or_load(str(weights), resume=False)


@pytest.fixture
def run_config(toy_scenes, tmp_path):
    """A function that makes any config one of two iterations on two toy scenes."""

    def change(cfg, output):
        (tmp_path / output).mkdir()
        cfg = cfg.clone()
        cfg.merge_from_list(
            f"""
            DATASETS.TRAIN ("toy_kitti_train",) DATASETS.TEST () DATALOADER.NUM_WORKERS 0 INPUT.MIN_SIZE_TRAIN (64,)
            SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 2 SOLVER.STEPS () OUTPUT_DIR {tmp_path / output}
            """.split()
        )
        return cfg

    return change


def tensors(value):
    """All tensors in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in values for tensor in tensors(part)]


def test_a_checkpoint_of_a_run_is_plain_data(run_config, distiller_config, tmp_path):
    """Loaded without unpickling objects, it sets optimizer and scheduler to where they were."""
    cfg = run_config(distiller_config("retinanet", teacher_channels=24), "output")
    trainer = Trainer(cfg)
    trainer.train()
    checkpoint = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)
    assert checkpoint["iteration"] == 1
    momenta = [state["momentum_buffer"] for state in checkpoint["trainer"]["_trainer"]["optimizer"]["state"].values()]
    assert len(momenta) == len(list(trainer.model.parameters())) and any(momentum.any() for momentum in momenta)

    again = Trainer(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 2
    for name in ("model", "optimizer"):
        ours, theirs = (getattr(t._trainer, name).state_dict() for t in (again, trainer))
        assert all(torch.equal(a, b) for a, b in zip(tensors(ours), tensors(theirs), strict=True))
    assert again.scheduler.state_dict()["last_epoch"] == trainer.scheduler.state_dict()["last_epoch"] == 2


def test_a_distillers_checkpoint_is_as_large_as_the_students(run_config, project, tmp_path):
    """ResNet-18 with 64 channels, under a teacher that has as many and under one that has 256."""
    toy, on_the_cpu = project / "configs" / "toy", ["MODEL.DEVICE", "cpu"]
    cfg = config.read_config(str(toy / "gkd_retinanet.yaml"), on_the_cpu)
    cfg.GKD.STUDENT.INIT_FROM_TEACHER = False

    def checkpoint(cfg, name):
        """One of a run whose optimizer has made a step, and its size in bytes."""
        trainer = Trainer(run_config(cfg, name))
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        trainer._trainer.optimizer.step()
        trainer.save("model")
        path = tmp_path / name / "model.pth"
        size, data = path.stat().st_size, torch.load(path)
        path.unlink()
        return size, data

    size, student = checkpoint(config.detector_config(cfg), "student")
    assert size > 2 * 4 * 11e6
    for channels in (64, 256):
        teacher = config.read_config(str(toy / "Base-RetinaNet-Toy.yaml"), on_the_cpu)
        teacher.MODEL.FPN.OUT_CHANNELS = channels
        weights = build_model(teacher).state_dict()
        torch.save({"model": weights}, tmp_path / "teacher.pth")
        (tmp_path / "teacher.yaml").write_text(teacher.dump())
        cfg.merge_from_list(["GKD.TEACHER.CONFIG_FILE", str(tmp_path / "teacher.yaml")])
        cfg.merge_from_list(["GKD.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth")])
        distilled_size, distilled = checkpoint(cfg, f"distilled{channels}")
        (tmp_path / "teacher.pth").unlink()

        align = {f"align.p{level}.weight" for level in range(3, 8)} if channels == 256 else set()
        assert distilled["model"].keys() == student["model"].keys() | align
        momenta = [len(x["trainer"]["_trainer"]["optimizer"]["state"]) for x in (student, distilled)]
        assert momenta[1] == momenta[0] + len(align)
        # Not under another name either; tensors of one value, such as biases, are equal in all networks.
        drawn = {tensor.numpy().tobytes() for tensor in weights.values() if (tensor != tensor.flatten()[0]).any()}
        assert len(drawn) > 30
        assert not drawn & {tensor.numpy().tobytes() for tensor in tensors(distilled)}
        assert size <= distilled_size <= 1.02 * size
