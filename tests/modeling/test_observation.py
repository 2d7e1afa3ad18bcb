"""Listeners: when they are told, of what, and that they leave no trace."""

import copy
import pickle

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from documents import fenced_blocks
from tiny import training_batch, watched

from gkd_d2 import Listener


class Recorder(Listener):
    """Keeps what is asked of an observation, in the batches that it is due for."""

    def __init__(self, due=(True,), *, student=False, teacher=False, take=lambda distiller, seen: seen):
        self.needs_student_grad, self.needs_teacher_grad = student, teacher
        self._due, self._take = iter(due), take
        self.told = []

    def due(self):
        return next(self._due, False)

    def __call__(self, distiller, seen):
        self.told.append(self._take(distiller, seen))


@pytest.fixture
def distiller(distiller_config):
    """Of a method that needs no gradients."""
    cfg = distiller_config("retinanet", channels=8)
    cfg.GKD.METHOD = "fitnet"
    return build_model(cfg).train()


def step(distiller, batches=1, parts=((90, 120), (96, 100))):
    """Forwards of one batch; the losses of the last."""
    with EventStorage() as storage:
        for _ in range(batches):
            torch.manual_seed(2)
            distiller.student.loss_normalizer = 100
            losses = distiller(training_batch(parts))
            storage.step()
    return losses


@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize("teacher", [False, True])
def test_gradients_are_there_for_whoever_needs_them(student, teacher, distiller):
    recorder = Recorder(student=student, teacher=teacher)
    distiller.listen(recorder)
    step(distiller)
    (seen,) = recorder.told
    assert (seen.student_grad is not None, seen.teacher_grad is not None) == (student, teacher)
    assert seen.image_size == (96, 128) and [len(boxes) for boxes in seen.boxes] == [2, 2]
    assert len(seen.student) == len(seen.teacher) == len(distiller.student_features) == len(distiller.strides)


def test_it_is_told_of_what_it_is_due_for_once(distiller):
    recorder, other = Recorder(due=(False, True, False)), Recorder(due=(True, True, True))
    for listener in (recorder, other, recorder):
        distiller.listen(listener)
    step(distiller, batches=3)
    assert (len(recorder.told), len(other.told)) == (1, 3)
    distiller.unlisten(other)
    assert distiller.listeners == [recorder]
    distiller.unlisten(recorder)
    distiller.unlisten(recorder)
    assert distiller.listeners is None


def test_it_is_given_nothing_of_the_graph_and_draws_for_itself(distiller):
    alone = step(distiller)
    draw = torch.rand(1)
    recorder = Recorder(take=lambda distiller, seen: (seen, torch.rand(3)), student=True, teacher=True)
    distiller.listen(recorder)
    told = step(distiller)
    assert torch.equal(torch.rand(1), draw)
    assert {name: value.item() for name, value in told.items()} == {name: value.item() for name, value in alone.items()}
    (seen, _), *_ = recorder.told
    tensors = [*seen.student, *seen.student_grad, *seen.teacher, *seen.teacher_grad, *seen.losses.values()]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_a_copy_of_the_model_has_no_listeners(distiller):
    """As an average of the weights makes one, in the middle of a run."""
    watched(distiller)
    listeners = distiller.listeners
    for other in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        assert other.listeners is None
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in distiller.state_dict().items())
    assert distiller.listeners is listeners
    distiller.listeners = []
    assert copy.deepcopy(distiller).listeners == []


def test_what_is_no_listener_is_refused(distiller):
    with pytest.raises(TypeError, match="can't listen: derive its class from gkd_d2.Listener"):
        distiller.listen(lambda distiller, seen: None)


def test_its_error_is_that_of_the_training(distiller):
    def fail(distiller, seen):
        raise RuntimeError("no room for what was seen")

    distiller.listen(Recorder(take=fail))
    with pytest.raises(RuntimeError, match="no room for what was seen"):
        step(distiller)


def test_the_listener_of_the_documents(distiller, project, capsys):
    (block,) = (b for b in fenced_blocks(project / "docs" / "reliability.md") if "Listener" in b.text)
    exec(block.text, {"model": distiller})
    step(distiller)
    said = capsys.readouterr().out
    assert all(f"'{name}': " in said for name in distiller.student_features)
