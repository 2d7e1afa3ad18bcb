"""The distiller: what it adds to a student's training, and what it leaves alone."""

import logging
import math

import pytest
import torch
from detectron2.modeling import ROI_HEADS_REGISTRY, build_model
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from tiny import ARCHITECTURES, calm, train, training_batch, watched

from gkd_d2.config import detector_config, teacher_spec
from gkd_d2.engine.hooks import PeriodicPicture
from gkd_d2.losses import LossWeights, distillation_losses
from gkd_d2.modeling.split import split_detector
from gkd_d2.modeling.teacher import build_teacher

NAMES = ("loss_gkd_gradient", "loss_bmfi_box", "loss_bmfi_attention", "loss_bmfi_image")


def set_weights(cfg, gradient, box, attention, image):
    cfg.GKD.LOSS_WEIGHTS.GRADIENT = gradient
    cfg.GKD.LOSS_WEIGHTS.BOX = box
    cfg.GKD.LOSS_WEIGHTS.ATTENTION = attention
    cfg.GKD.LOSS_WEIGHTS.IMAGE = image


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_losses_equal_an_independent_computation(kind, distiller_config):
    """The four terms from the two networks run one after the other by hand."""
    cfg = distiller_config(kind)
    cfg.GKD.FEATURES = ["p3", "p4"]
    set_weights(cfg, 0.5, 1e-3, 5e-4, 1e-3)
    distiller = build_model(cfg).train()
    batch = training_batch(((90, 120), (96, 100), (64, 64)))
    with EventStorage():
        torch.manual_seed(1)
        losses = distiller(batch)
        student = split_detector(distiller.student)
        torch.manual_seed(1)
        if kind == "retinanet":
            distiller.student.loss_normalizer = 100
        images, features = student.features(batch)
        leaves = {name: f.detach().requires_grad_() for name, f in features.items()}
        own = student.losses(images, leaves, batch)
        sum(own.values()).backward()
        teacher = build_teacher(teacher_spec(cfg).build, cfg.GKD.TEACHER.WEIGHTS, cfg.SEED)
        teacher_features, teacher_grads = teacher.observe(batch, ["p3", "p4"], with_gradients=True).at(["p3", "p4"])
    expected = distillation_losses(
        [features["p3"], features["p4"]],
        teacher_features,
        [leaves["p3"].grad, leaves["p4"].grad],
        teacher_grads,
        [x["instances"].gt_boxes.tensor for x in batch],
        tuple(images.tensor.shape[2:]),
        weights=LossWeights(0.5, 1e-3, 5e-4, 1e-3),
        map_region="boxes",
    )
    assert set(losses) == set(own) | set(NAMES)
    for name, value in {**own, **expected}.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-6, atol=1e-9, msg=name)
        assert losses[name] > 0


@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_a_loss_of_weight_0_is_not_reported(implementation, distiller_config):
    cfg = distiller_config("retinanet")
    set_weights(cfg, 0.02, 1e-2, 0.0, 1e-3)
    cfg.GKD.IMPLEMENTATION = implementation
    distiller = build_model(cfg).train()
    measurement = watched(distiller)
    with EventStorage():
        losses = distiller(training_batch())
    assert set(losses) - {"loss_cls", "loss_box_reg"} == {"loss_gkd_gradient", "loss_bmfi_box", "loss_bmfi_image"}
    assert {term for term, _ in measurement.report.values} == {"gradient", "box", "image"}


@pytest.mark.parametrize("counts", [(2, 1, 0), (0, 0, 2), (0, 0, 0)])
def test_each_image_keeps_its_own_boxes(counts, distiller_config):
    distiller = build_model(distiller_config("retinanet")).train()
    batch = training_batch(((64, 96),) * 3)
    objects = batch[0]["instances"]
    for number, (sample, count) in enumerate(zip(batch, counts)):
        sample["instances"] = objects[:count]
        sample["instances"].gt_boxes = Boxes(objects.gt_boxes.tensor[:count] + number)
    with EventStorage():
        seen = distiller.observe(batch, student_grad=False, teacher_grad=False)
    assert [len(boxes) for boxes in seen.boxes] == list(counts)
    for boxes, sample in zip(seen.boxes, batch):
        assert torch.equal(boxes, sample["instances"].gt_boxes.tensor)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("channels", [16, 8])
def test_all_four_losses_fall_on_a_repeated_batch(kind, channels, distiller_config):
    cfg = distiller_config(kind, channels=channels)
    cfg.SOLVER.BASE_LR = 0.02
    set_weights(cfg, 0.1, 1e-3, 5e-4, 1e-3)
    distiller = build_model(cfg)
    # A head that learns to detect changes the student's maps, too.
    history = train(distiller, cfg, training_batch(), 40, learned=NAMES)
    assert len(distiller.align) == (0 if channels == 16 else len(distiller.student_features))
    for name in NAMES:
        first = sum(losses[name] for losses in history[:10])
        last = sum(losses[name] for losses in history[-10:])
        assert 0 < last < first, name


AUTHORS = {"WEIGHTING": "attention_gradient", "RECTIFIER": "relu", "LOSS_WEIGHTS.RELATION": 1e-5}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [
        {"MAP_REGION": "image", "LOSS_WEIGHTS.GRADIENT": 0.2},
        AUTHORS,
        {"IMPORTANCE": "element"},
        {"IMPORTANCE": "norm", "IMPORTANCE_FLOOR": 0.5, "IMPORTANCE_CAP": 5.0},
        {"IMPORTANCE": "student", "WEIGHTING": "attention_gradient"},
    ],
    ids=lambda options: ",".join(map(str, options.values())),
)
def test_every_option_teaches(kind, options, distiller_config):
    """Through convolutions that align channels, so that the student's gradient of each cell is solved for."""
    cfg = distiller_config(kind, channels=8)
    cfg.SOLVER.BASE_LR = 0.02
    set_weights(cfg, 0.1, 1e-3, 1e-4, 1e-3)
    cfg.merge_from_list([part for key, value in options.items() for part in (f"GKD.{key}", value)])
    distiller = build_model(cfg)
    names = distiller.method.active()
    history = train(distiller, cfg, training_batch(), 40, learned=names)
    for name in names:
        first = sum(losses[name] for losses in history[:10])
        last = sum(losses[name] for losses in history[-10:])
        assert 0 < last < first, name


@pytest.mark.parametrize("channels", [16, 8])
def test_fused_and_reference_trainings_end_alike(channels, distiller_config):
    """In float64: so small a network makes differences in the last bits grow tenfold a step."""
    cfg = distiller_config("retinanet", channels=channels)
    cfg.SOLVER.BASE_LR = 0.005
    batch = training_batch()
    ends = []
    for implementation in ("fused", "reference"):
        cfg.GKD.IMPLEMENTATION = implementation
        torch.manual_seed(5)
        ends.append(train(build_model(cfg).double(), cfg, batch, 6))
    fused, reference = ends
    assert reference[-1] != reference[0]
    for name, value in reference[-1].items():
        assert fused[-1][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_fused_and_reference_give_one_step_alike(kind, distiller_config):
    cfg = distiller_config(kind, channels=8)
    batch = training_batch()
    results = []
    for implementation in ("fused", "reference"):
        cfg.GKD.IMPLEMENTATION = implementation
        torch.manual_seed(5)
        distiller = build_model(cfg).train()
        with EventStorage():
            losses = distiller(batch)
        parameters = [*distiller.student.backbone.parameters(), *distiller.align.parameters()]
        distillation = sum(losses[name] for name in NAMES)
        results.append((losses, torch.autograd.grad(distillation, parameters, allow_unused=True)))
    (fused, fused_grads), (reference, reference_grads) = results
    for name, value in reference.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-5, atol=1e-7, msg=name)
    for ours, theirs in zip(fused_grads, reference_grads):
        if theirs is not None:
            assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max() + 1e-7


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_weights_0_train_exactly_as_the_student_alone(kind, distiller_config):
    cfg = distiller_config(kind, channels=8)
    set_weights(cfg, 0.0, 0.0, 0.0, 0.0)
    batch = training_batch()
    results = []
    for config in (cfg, detector_config(cfg)):
        torch.manual_seed(5)
        model = build_model(config)
        history = train(model, config, batch, 3)
        results.append((history, model.state_dict(), torch.rand(4)))
    (distilled, distilled_state, draw), (alone, alone_state, alone_draw) = results
    assert distilled == alone
    assert list(distilled_state) == list(alone_state)
    assert all(torch.equal(value, alone_state[name]) for name, value in distilled_state.items())
    assert torch.equal(draw, alone_draw)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_student_starts_and_draws_the_same_with_distillation(kind, distiller_config):
    cfg = distiller_config(kind, channels=8)
    batch = training_batch()
    results = []
    for config in (cfg, detector_config(cfg)):
        torch.manual_seed(5)
        model = build_model(config).train()
        with EventStorage():
            losses = model(batch)
        results.append((losses, torch.rand(4)))
    (distilled, draw), (alone, alone_draw) = results
    assert torch.equal(draw, alone_draw)
    for name, value in alone.items():
        assert torch.equal(distilled[name], value), name


@pytest.mark.parametrize("method", ["gkd", "fitnet", "fgfi", "fgd", "pkd"])
@pytest.mark.parametrize("disabled", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_losses_are_the_students_own(disabled, method, distiller_config):
    """A validation loss is computed in training mode under no_grad, also where a measurement and a picture are due."""
    cfg = distiller_config("retinanet", channels=8)
    cfg.GKD.METHOD = method
    distiller = build_model(cfg).train()
    measurement = watched(distiller)
    PeriodicPicture(distiller, 1).before_train()
    batch = training_batch()
    distiller.student.loss_normalizer = 100
    with disabled(), EventStorage() as storage:
        losses = distiller(batch)
        assert storage._vis_data == []
    distiller.student.loss_normalizer = 100
    with EventStorage():
        own = distiller.student(batch)
        trained = distiller(batch)
    assert losses.keys() == own.keys()
    for name, value in own.items():
        assert torch.equal(losses[name], value), name
    assert trained.keys() > own.keys() and measurement.report is not None


def test_teacher_is_untouched_by_training(distiller_config):
    cfg = distiller_config("retinanet")
    distiller = build_model(cfg)
    teacher = distiller._teacher.model
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    history = train(distiller, cfg, training_batch(), 3)
    assert history[0] != history[-1]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert teacher.loss_normalizer == 100 if "loss_normalizer" in vars(teacher) else True
    distiller.train(False)
    distiller.train(True)
    assert not teacher.backbone.training
    assert teacher.head.training


@pytest.mark.parametrize("relation", [0.0, 1e-5])
def test_state_dict_is_the_students_and_loads_both_ways(relation, distiller_config):
    cfg = distiller_config("faster", channels=8)
    cfg.GKD.LOSS_WEIGHTS.RELATION = relation
    distiller = build_model(cfg)
    alone = build_model(detector_config(cfg))
    state = distiller.state_dict()
    align = {f"align.{level}.weight" for level in ("p2", "p3", "p4", "p5")}
    beside = align | {f"method.{name}" for name in distiller.method.state_dict()}
    assert (beside == align) == (relation == 0)
    assert set(state) == set(alone.state_dict()) | beside
    assert not any(
        parameter is other for parameter in distiller.parameters() for other in teacher_parameters(distiller)
    )

    result = distiller.load_state_dict(alone.state_dict(), strict=False)
    assert set(result.missing_keys) == beside
    assert not result.unexpected_keys
    assert all(torch.equal(distiller.state_dict()[name], value) for name, value in alone.state_dict().items())

    other = build_model(detector_config(cfg))
    result = other.load_state_dict(state, strict=False)
    assert set(result.unexpected_keys) == beside
    assert not result.missing_keys
    assert all(torch.equal(other.state_dict()[name], state[name]) for name in other.state_dict())
    # The versions of the modules are saved under the same names: FrozenBatchNorm2d converts by them.
    assert set(alone.state_dict()._metadata) <= set(state._metadata)

    again = build_model(cfg)
    again.load_state_dict(state)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in state.items())
    with pytest.raises(RuntimeError, match="Missing key.*backbone.bottom_up.stem.conv1.weight"):
        again.load_state_dict({name: value for name, value in state.items() if "stem.conv1.weight" not in name})


def teacher_parameters(distiller):
    return list(distiller._teacher.model.parameters())


def test_optimizer_holds_all_that_trains_and_nothing_of_the_teacher(distiller_config):
    cfg = distiller_config("faster", channels=8)
    cfg.GKD.LOSS_WEIGHTS.RELATION = 1e-5
    distiller = build_model(cfg)
    held = {id(p) for group in build_optimizer(cfg, distiller).param_groups for p in group["params"]}
    parts = distiller.student, distiller.align, distiller.method
    assert held == {id(parameter) for part in parts for parameter in part.parameters()}
    assert all(list(part.parameters()) for part in parts)


def test_teacher_follows_to_another_dtype(distiller_config):
    distiller = build_model(distiller_config("retinanet")).double()
    assert {p.dtype for p in teacher_parameters(distiller)} == {torch.float64}
    with EventStorage():
        losses = distiller.train()(training_batch())
    assert losses["loss_gkd_gradient"].dtype == torch.float64


def test_evaluation_is_the_students(distiller_config):
    cfg = distiller_config("faster")
    distiller = build_model(cfg).eval()
    batch = training_batch()
    with torch.no_grad():
        ours, students = distiller(batch), distiller.student(batch)
    for mine, theirs in zip(ours, students):
        assert torch.equal(mine["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor)
        assert torch.equal(mine["instances"].scores, theirs["instances"].scores)


def test_warm_up_ramps_the_four_weights_linearly(distiller_config):
    cfg = distiller_config("retinanet")
    cfg.GKD.WARMUP_ITERS = 4
    distiller = build_model(cfg).train()
    batch = training_batch()
    values = []
    with EventStorage() as storage:
        for _ in range(6):
            distiller.student.loss_normalizer = 100
            losses = distiller(batch)
            values.append(torch.stack([losses[name] for name in NAMES[1:]]).detach())
            storage.step()
    # The student does not move, so only the ramp changes the imitation losses.
    for value, factor in zip(values, (0.25, 0.5, 0.75, 1, 1, 1)):
        torch.testing.assert_close(value, factor * values[-1], rtol=1e-4, atol=0)


KEYPOINTS = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,))


@pytest.mark.parametrize("student", ARCHITECTURES)
@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        (("MODEL.MASK_ON", True), "masks"),
        (("MODEL.MASK_ON", False, *KEYPOINTS), "keypoints"),
        (("MODEL.MASK_ON", True, *KEYPOINTS), "masks and keypoints"),
    ],
)
def test_teacher_of_masks_and_keypoints_teaches_boxes(student, options, kinds, make_distiller_config, tmp_path, caplog):
    """The usual pair of Detectron2's zoo: the student's mapper loads boxes alone."""
    teacher = make_distiller_config(tmp_path, "mask", teacher_options=options)
    cfg = teacher
    if student == "retinanet":
        (tmp_path / "student").mkdir()
        cfg = make_distiller_config(tmp_path / "student", "retinanet")
        cfg.GKD.TEACHER = teacher.GKD.TEACHER
    cfg.MODEL.MASK_ON = False
    distiller = build_model(cfg)
    calm(distiller.student)
    with caplog.at_level(logging.INFO, logger="gkd_d2"):
        history = train(distiller, cfg, training_batch(), 2)
    assert all(math.isfinite(value) for value in history[-1].values()) and history[-1]["loss_bmfi_box"] > 0
    assert caplog.text.count(f"without its head for {kinds}, which the student does not detect") == 1


def test_student_of_masks_keeps_the_teachers_masks(distiller_config):
    cfg = distiller_config("mask")
    distiller = build_model(cfg)
    assert distiller._teacher.model.roi_heads.mask_on
    losses = train(distiller, cfg, training_batch(masks=True), 1)[0]
    assert losses["loss_mask"] > 0


def test_teacher_without_its_proposals_is_refused(distiller_config):
    options = ("MODEL.LOAD_PROPOSALS", True, "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    with pytest.raises(ValueError, match="teacher has no proposal generator and takes proposals with the images"):
        build_model(distiller_config(teacher_options=options))


@ROI_HEADS_REGISTRY.register()
class AlwaysMasks(StandardROIHeads):
    """ROI heads with a mask head, whatever MODEL.MASK_ON says."""

    @classmethod
    def from_config(cls, cfg, input_shape):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.MASK_ON = True
        return super().from_config(cfg, input_shape)


def test_teacher_that_insists_on_masks_is_refused(distiller_config):
    cfg = distiller_config(teacher_options=("MODEL.ROI_HEADS.NAME", "AlwaysMasks"))
    with pytest.raises(ValueError, match="teacher's AlwaysMasks learns from masks, although its config"):
        build_model(cfg)


def test_frozen_student_backbone_is_refused(distiller_config):
    distiller = build_model(distiller_config("retinanet")).train()
    distiller.student.backbone.requires_grad_(False)
    with EventStorage(), pytest.raises(RuntimeError, match="student's p3 carries no gradient"):
        distiller(training_batch())


def test_features_of_other_size_are_refused(distiller_config):
    distiller = build_model(distiller_config("retinanet")).train()
    # What a teacher of another padding would give.
    distiller._teacher.model.backbone._size_divisibility = 256
    with EventStorage(), pytest.raises(RuntimeError, match=r"student's p3 is \(2, 16, 12, 16\), the teacher's"):
        distiller(training_batch())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("GKD.TEMPERATURE", 0.0, "GKD.TEMPERATURE is 0.0"),
        ("GKD.WEIGHTING", "foo", "GKD.WEIGHTING is 'foo'"),
        ("GKD.RECTIFIER", "foo", "GKD.RECTIFIER is 'foo'"),
        ("GKD.IMPLEMENTATION", "foo", "GKD.IMPLEMENTATION is 'foo'"),
        ("GKD.WARMUP_ITERS", -1, "GKD.WARMUP_ITERS is -1"),
        ("GKD.LOSS_WEIGHTS.BOX", -1.0, "loss weight box is -1.0"),
        (
            "GKD.METHOD",
            "foo",
            "GKD.METHOD is 'foo', which is not registered; registered are crosskd, fgd, fgfi, fitnet, gkd, ",
        ),
        (
            "GKD.IMPORTS",
            "['no.such']",
            "GKD.IMPORTS names the module no.such, which is not found .*: it is looked for on PYTHONPATH",
        ),
        ("GKD.TEACHER.WEIGHTS", "", "GKD.TEACHER.WEIGHTS is empty"),
        ("GKD.TEACHER.CONFIG_FILE", "", "GKD.TEACHER.CONFIG_FILE is empty"),
        ("GKD.TEACHER.ROI_BATCH_SIZE", -1, "GKD.TEACHER.ROI_BATCH_SIZE is -1"),
        ("GKD.TEACHER.ROI_BATCH_SIZE", 8, "teacher.yaml describes a RetinaNet, which samples no proposals"),
        ("GKD.STUDENT.META_ARCHITECTURE", "", "GKD.STUDENT.META_ARCHITECTURE is ''"),
        ("MODEL.RETINANET.NUM_CLASSES", 5, "student detects 5 classes"),
        ("INPUT.FORMAT", "L", "given images in L, which can't be made into the teacher's BGR"),
    ],
)
def test_bad_config_is_refused_when_the_model_is_built(key, value, message, distiller_config):
    cfg = distiller_config("retinanet")
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_missing_teacher_config_is_refused(distiller_config):
    cfg = distiller_config("retinanet")
    cfg.GKD.TEACHER.CONFIG_FILE = "nowhere/teacher.yaml"
    with pytest.raises(FileNotFoundError, match="nowhere/teacher.yaml"):
        build_model(cfg)


BUFFER = "backbone.bottom_up.stem.conv1.norm.running_var"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("network", "name", "owner"),
    [
        ("teacher", "head.bbox_pred.weight", "the teacher's"),
        ("teacher", BUFFER, "the teacher's"),
        ("student", "head.bbox_pred.weight", "the student's"),
        ("student", BUFFER, "the student's"),
        ("align", "p3.weight", "the align convolutions'"),
        ("method", "relation.p3.teacher.norm.weight", "the method's"),
    ],
)
def test_networks_that_are_not_finite_are_refused_in_the_first_step(network, name, owner, value, distiller_config):
    """Built in code, or loaded by a checkpointer that takes any numbers. Some of them would train on."""
    cfg = distiller_config("retinanet", channels=8)
    cfg.GKD.LOSS_WEIGHTS.RELATION = 1e-5
    model = build_model(cfg).train()
    getattr(model, network).state_dict()[name].view(-1)[0] = value
    with (
        EventStorage(),
        pytest.raises(ValueError, match=f"infinite or NaN values in {owner} {name}: .* must name a so"),
    ):
        model(training_batch())


def test_a_buffer_of_no_checkpoint_may_be_infinite(distiller_config):
    """As the mask of an attention layer."""
    model = build_model(distiller_config("retinanet")).train()
    model.student.register_buffer("mask", torch.full((2, 2), -math.inf), persistent=False)
    with EventStorage():
        assert model(training_batch())
    model.student.mask[0, 0] = math.nan
    with pytest.raises(ValueError, match="infinite or NaN values in the student's mask"):
        model.check_finite()
