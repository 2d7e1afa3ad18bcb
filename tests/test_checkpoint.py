"""Checkpoints that do not fit are errors, and half-written ones do no harm."""

import contextlib
import re
import resource

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from tiny import detector_config

from gkd_d2 import config
from gkd_d2.checkpoint import CompleteCheckpointer, DamagedCheckpointError, StudentCheckpointer
from gkd_d2.data.toy_kitti import make_toy_kitti
from gkd_d2.engine.trainer import Trainer


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
    # Extra tensors, such as a distiller's align convolutions, do no harm.
    extra = model.state_dict() | {"align.p3.weight": torch.zeros(1)}
    CompleteCheckpointer(model).load(save(tmp_path / "more.pth", extra))


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


def test_a_resume_passes_over_a_missing_checkpoint(written, caplog):
    (written / "model_0000029.pth").unlink()
    assert resumed(written) == 19
    assert f"last_checkpoint names {written}/model_0000029.pth, which is no file" in caplog.text
    (written / "last_checkpoint").write_text("")
    assert resumed(written) == 19


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
    with pytest.raises(DamagedCheckpointError, match=f"no checkpoint in {written} can be read: start anew"):
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
def run_config(tmp_path, monkeypatch):
    """A function that makes any config one of two iterations on two toy scenes."""
    make_toy_kitti(tmp_path / "toy_kitti", 2, 1, 0)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))

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
