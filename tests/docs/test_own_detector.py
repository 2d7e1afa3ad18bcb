"""The code of docs/own_detector.md, as it stands there."""

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from documents import fenced_blocks
from tiny import SplitScorer, calm, detector_config, make_fcos, training_batch

from gkd_d2 import register_split
from gkd_d2.modeling.common_size import CommonSize
from gkd_d2.modeling.split import registry, split_detector

# Those of GKD() as it is.
NAMES = ("loss_gkd_gradient", "loss_bmfi_box", "loss_bmfi_image")


@pytest.fixture(autouse=True)
def _forget_splits(monkeypatch):
    monkeypatch.setattr(registry, "_SPLITS", dict(registry._SPLITS))


@pytest.fixture
def document(project):
    """What the blocks of the document define, each run by itself, as where it is pasted into a file of its own."""
    path = project / "docs" / "own_detector.md"
    defined: dict = {}
    for block in fenced_blocks(path):
        if block.language == "python":
            names: dict = {}
            # Blank lines ahead give a traceback the document's own line numbers.
            exec(compile("\n" * block.line + block.text, path, "exec"), names)
            defined |= names
    return defined


def test_the_check_runs_as_it_stands(project):
    """All that is below the heading, and nothing of what the document says before."""
    text = (project / "docs" / "own_detector.md").read_text().split("\n## Check it\n")[1]
    (code,) = (part.split("```")[0] for part in text.split("```python\n")[1:])
    names: dict = {}
    exec(code, names)
    names["check_split"](build_model(detector_config("retinanet")), training_batch())
    with pytest.raises(ValueError, match="Scorer"):
        names["check_split"](make_scorer(16), training_batch())


def test_the_config_has_keys_that_exist(project):
    (block,) = (block for block in fenced_blocks(project / "docs" / "own_detector.md") if block.language == "yaml")
    cfg = detector_config("retinanet")
    cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(block.text)))
    assert cfg.GKD.IMPORTS == ["my_project.detector", "my_project.split"]


def make_proposal_network(channels):
    cfg = detector_config("faster", channels=channels)
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    return calm(build_model(cfg))


def make_scorer(channels):
    return calm(build_model(detector_config("scorer", channels=channels)))


def train_a_step(build_distiller, make, folder):
    """Distil a student of 8 channels from a teacher of 16, and check what reaches the student."""
    torch.save({"model": make(16).state_dict()}, folder / "teacher.pth")
    teacher = make(16)
    distiller = build_distiller(make(8), teacher, str(folder / "teacher.pth")).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    saved = torch.load(folder / "teacher.pth")["model"]
    assert all(torch.equal(value, saved[name]) for name, value in before.items())
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    student = list(distiller.student.backbone.parameters())
    with EventStorage():
        losses = distiller(training_batch())
    assert set(NAMES) < set(losses)
    for name in NAMES:
        gradients = torch.autograd.grad(losses[name], student, retain_graph=True, allow_unused=True)
        norm = sum(g.square().sum() for g in gradients if g is not None) ** 0.5
        assert torch.isfinite(norm) and norm > 0, name
    first = [p.clone() for p in student]
    sum(losses.values()).backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in student)
    assert not all(torch.equal(p, q) for p, q in zip(student, first))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_example(document, tmp_path):
    document["check_split"](make_proposal_network(16), training_batch(((90, 120), (96, 100), (64, 64))))
    train_a_step(document["distilled"], make_proposal_network, tmp_path)
    with pytest.raises(ValueError, match="GKD.METHOD asks for anchors, but ProposalNetwork has none at p3"):
        split_detector(make_proposal_network(8)).anchors({"p3": torch.zeros(1, 8, 2, 2)})


def test_the_example_pads_further_for_its_teacher(document):
    (student, teacher), batch = (make_proposal_network(16) for _ in range(2)), training_batch()
    teacher.backbone._size_divisibility = 64
    size = CommonSize(split_detector(student), split_detector(teacher)).of(batch)
    assert size == split_detector(student).features(batch, size)[0].tensor.shape[2:] == (128, 128)


def test_the_example_in_a_config(document, distiller_config):
    """Of one class, which its datasets must have, too."""

    def change(cfg):
        cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()

    distiller = build_model(distiller_config("faster", change=change)).train()
    with EventStorage():
        assert all(loss.isfinite() for loss in distiller(training_batch()).values())


def test_fcos_as_a_lazy_config(document, tmp_path):
    pytest.importorskip("detectron2.modeling.meta_arch.fcos", reason="this Detectron2 has no FCOS")
    from detectron2.config import LazyCall, instantiate

    torch.save({"model": make_fcos(16).state_dict()}, tmp_path / "teacher.pth")
    config = LazyCall(document["distilled"])(
        student=LazyCall(make_fcos)(channels=8),
        teacher=LazyCall(make_fcos)(channels=16),
        teacher_weights=str(tmp_path / "teacher.pth"),
    )
    distiller = instantiate(config)
    assert distiller.student_features == ["p3", "p4", "p5", "p6", "p7"]
    assert list(distiller.align) == distiller.student_features


def draws_more(self, images, features, batched_inputs):
    torch.rand(1)
    return SplitScorer.losses(self, images, features, batched_inputs)


def leaves_one_out(self, images, features, batched_inputs):
    losses = SplitScorer.losses(self, images, features, batched_inputs)
    return {"loss_p3": losses["loss_p3"]}


def stops_the_gradient(self, images, features, batched_inputs):
    detached = {name: feature.detach() for name, feature in features.items()}
    return SplitScorer.losses(self, images, detached, batched_inputs)


def scales(self, images, features, batched_inputs):
    return {k: 2 * v for k, v in SplitScorer.losses(self, images, features, batched_inputs).items()}


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (draws_more, "other random numbers"),
        (leaves_one_out, r"returns \['loss_p3'\], the detector \['loss_p3', 'loss_p4'\]"),
        (scales, "loss_p3 differs"),
        (stops_the_gradient, "the gradient of backbone.* differs"),
    ],
)
def test_the_check_finds_a_wrong_split(document, losses, message):
    wrong = type("Wrong", (SplitScorer,), {"losses": losses})
    register_split(type(make_scorer(8)))(wrong)
    with pytest.raises(AssertionError, match=message):
        document["check_split"](make_scorer(16), training_batch())
