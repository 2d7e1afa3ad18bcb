"""The watch over the distillation losses, in short real trainings on toy scenes."""

import dataclasses
import itertools
import logging
import re
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from short_runs import checkpoints, metrics, train
from tiny import TOY_SCENES

from gkd_d2.data.datasets.kitti import load_kitti
from gkd_d2.engine.hooks import DeadLossError
from gkd_d2.engine.trainer import Trainer
from gkd_d2.methods import METHOD_REGISTRY, LevelwiseMethod, Term
from gkd_d2.methods.fgfi import FGFI
from gkd_d2.modeling.measure import TermReport

TERMS = {
    "gradient": "loss_gkd_gradient",
    "box": "loss_bmfi_box",
    "attention": "loss_bmfi_attention",
    "image": "loss_bmfi_image",
}


@pytest.fixture
def without_boxes(datasets):
    """A function that registers the toy scenes, some of them without their boxes."""
    name = "toy_kitti_without_boxes"

    def register(cfg, empty):
        records = load_kitti(datasets / "toy_kitti", "train")
        for index in empty:
            records[index]["annotations"] = []
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).thing_classes = MetadataCatalog.get("toy_kitti_train").thing_classes
        cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = (name,), False

    yield register
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def history(trainer, name):
    """Iteration -> value of a scalar."""
    return {iteration: value for value, iteration in trainer.storage.history(name).values()}


def test_a_ratio_limit_that_is_not_above_0_is_refused(training):
    cfg = training(iterations=1)
    cfg.GKD.WATCH_MAX_RATIO = 0.0
    with pytest.raises(ValueError, match="GKD.WATCH_MAX_RATIO is 0.0, but must be > 0"):
        Trainer(cfg)


@pytest.mark.parametrize("key", ["GKD.WATCH_PERIOD", "GKD.WATCH_PATIENCE"])
def test_periods_below_1_are_refused(key, training):
    cfg = training(iterations=1)
    cfg.merge_from_list([key, 0])
    with pytest.raises(ValueError, match=f"{key} is 0, but must be >= 1"):
        Trainer(cfg)


def test_the_watch_writes_values_and_ratios(training, tmp_path):
    cfg = training("faster", iterations=20)
    cfg.GKD.WATCH_PERIOD = 8
    trainer = train(cfg)
    measured = [0, 7, 15, 19]
    values = {f"gkd_value/{term}/{level}" for term in TERMS for level in ("p3", "p4")}
    ratios = {f"gkd_ratio/{term}{level}" for term in TERMS for level in ("", "/p3", "/p4")}
    for name in values | ratios:
        assert list(history(trainer, name)) == measured, name
    for term, loss in TERMS.items():
        for iteration in measured:
            levels = sum(history(trainer, f"gkd_value/{term}/{level}")[iteration] for level in ("p3", "p4"))
            assert levels == pytest.approx(history(trainer, loss)[iteration], rel=1e-5)
    # Detectron2 writes the latest value of every scalar once in 20 iterations.
    row = metrics(tmp_path / "output")[19]
    assert values | ratios <= row.keys()
    assert all(row[name] > 0 for name in ratios)
    for name in values:
        assert row[name] == history(trainer, name)[19]


def test_the_ratios_are_logged_once_a_period(training, caplog):
    cfg = training(iterations=5)
    cfg.GKD.WATCH_PERIOD = 2
    cfg.GKD.LOSS_WEIGHTS.IMAGE = 0.0
    with caplog.at_level(logging.INFO, logger="gkd_d2.engine.hooks"):
        trainer = train(cfg)
    lines = [line for line in caplog.messages if line.startswith("gkd_ratio at ")]
    ratios = {term: history(trainer, f"gkd_ratio/{term}") for term in ("gradient", "box", "attention")}
    assert lines == [
        f"gkd_ratio at iteration {i}: " + ", ".join(f"{term} {values[i]:.2g}" for term, values in ratios.items())
        for i in (0, 1, 3, 4)
    ]


@pytest.mark.parametrize(("box", "warmup"), [(1.0, 4), (1e12, 0)])
def test_a_loss_that_swamps_detection_is_warned_of(box, warmup, training, caplog):
    """Once, with the weight that gives a ratio of 0.3."""
    cfg = training(iterations=3)
    cfg.SOLVER.BASE_LR = 0.0
    cfg.GKD.LOSS_WEIGHTS.GRADIENT = cfg.GKD.LOSS_WEIGHTS.ATTENTION = cfg.GKD.LOSS_WEIGHTS.IMAGE = 1e-6
    cfg.GKD.LOSS_WEIGHTS.BOX = box
    cfg.GKD.WATCH_PERIOD, cfg.GKD.WARMUP_ITERS = 1, warmup
    torch.manual_seed(0)
    ratio = history(train(cfg), "gkd_ratio/box")[0]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("The box loss swamps the detection losses: at iteration 0 ")
    assert f" has {ratio:.3g} times the norm of theirs, more than GKD.WATCH_MAX_RATIO 10. " in warning
    assert ("(of which the warm-up applies 0.25)" in warning) == bool(warmup)
    assert "tools/suggest_weights.py" in warning
    weight = re.search(r"GKD.LOSS_WEIGHTS.BOX is \S+( \(.*?\))?; (\S+) would give a ratio of 0.3", warning)[2]

    cfg.GKD.LOSS_WEIGHTS.BOX = float(weight)
    cfg.GKD.WARMUP_ITERS = 0
    caplog.clear()
    torch.manual_seed(0)
    assert history(train(cfg), "gkd_ratio/box")[0] == pytest.approx(0.3, rel=0.05)
    assert "swamps" not in caplog.text


def test_no_gradient_of_the_detection_losses_is_warned_of(training, caplog):
    """As where a loss that swamps it has ended a student."""
    trainer = Trainer(training(iterations=1))
    with torch.no_grad():
        for layer in (trainer.model.student.head.cls_score, trainer.model.student.head.bbox_pred):
            layer.weight.zero_()
    trainer.train()
    assert "gkd_ratio at iteration 0 is undefined: the gradient of the detection losses" in caplog.text


def test_a_resumed_run_takes_a_new_weight(training):
    cfg = training(iterations=4)
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    before = history(train(cfg), "loss_bmfi_box")
    cfg.GKD.LOSS_WEIGHTS.BOX /= 10
    (Path(cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000001.pth")
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert resumed.start_iter == 2
    assert history(resumed, "loss_bmfi_box")[2] == pytest.approx(before[2] / 10, rel=1e-4)


def test_no_watch_without_distillation(training, tmp_path):
    cfg = training(iterations=2)
    cfg.merge_from_list([item for term in TERMS for item in (f"GKD.LOSS_WEIGHTS.{term.upper()}", 0.0)])
    train(cfg)
    assert not any(name.startswith("gkd_") for row in metrics(tmp_path / "output").values() for name in row)


def test_a_dead_level_stops_the_run_and_keeps_its_checkpoints(training, tmp_path):
    """Of a map of one cell nothing can be learnt."""
    cfg = training(iterations=30)
    cfg.GKD.FEATURES = ["p4", "p7"]
    cfg.INPUT.MAX_SIZE_TRAIN = 100
    cfg.GKD.WATCH_PATIENCE = 3
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    with pytest.raises(DeadLossError) as error:
        train(cfg)
    text = str(error.value)
    assert text.startswith(
        "the gradient of the gradient loss (GKD.LOSS_WEIGHTS.GRADIENT) at the student's p7 was exactly 0 in the last 3 "
        "iterations with objects, up to iteration 2: "
    )
    assert "Set GKD.FEATURES to ['p4'], without p7, or set GKD.LOSS_WEIGHTS.GRADIENT to 0. " in text
    assert "raise GKD.WATCH_PATIENCE, which is 3, for instance by `GKD.WATCH_PATIENCE 30" in text
    # Every scalar is written before the end.
    assert metrics(tmp_path / "output")[2]["gkd_ratio/gradient/p7"] == 0
    assert metrics(tmp_path / "output")[2]["gkd_ratio/image/p7"] > 0
    assert checkpoints(tmp_path / "output") == {"model_0000001.pth", "model_stopped.pth"}
    assert torch.load(tmp_path / "output" / "model_stopped.pth")["iteration"] == 2
    assert (tmp_path / "output" / "last_checkpoint").read_text() == "model_0000001.pth"
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2


class Patchy(LevelwiseMethod):
    """Imitation of all cells alike, with no gradient in some iterations at levels of some strides."""

    def __init__(self, iterations, strides, level_assigned):
        super().__init__({"loss_patchy": Term("patchy", 1e-3, "GKD.METHOD_OPTIONS.WEIGHT", level_assigned)})
        self.iterations = iterations
        self.strides = strides

    def level_losses(self, level):
        stride = level.image_size[0] // level.student.shape[2]
        alive = get_event_storage().iter not in self.iterations or stride not in self.strides
        return {"loss_patchy": alive * (level.student - level.teacher).square().mean()}


@pytest.fixture
def patchy(monkeypatch):
    """A function that makes a config's method a :class:`Patchy`."""

    def choose(cfg, iterations, *, strides=(16,), level_assigned=False):
        # Not registered for good: other tests list the methods.
        methods = METHOD_REGISTRY._obj_map | {"patchy": lambda cfg: Patchy(iterations, strides, level_assigned)}
        monkeypatch.setattr(METHOD_REGISTRY, "_obj_map", methods)
        cfg.GKD.METHOD = "patchy"

    return choose


@pytest.mark.parametrize("patience", [2, 3])
def test_only_as_many_iterations_in_a_row_stop_a_run(patience, training, patchy):
    cfg = training(iterations=6)
    patchy(cfg, iterations=(1, 2))
    cfg.GKD.WATCH_PERIOD, cfg.GKD.WATCH_PATIENCE = 2, patience
    trainer = Trainer(cfg)
    if patience == 2:
        with pytest.raises(DeadLossError, match="up to iteration 2"):
            trainer.train()
        return
    trainer.train()
    assert trainer.iter == 6
    values = history(trainer, "gkd_value/patchy/p4")
    # The first, every second, and all until the loss is seen alive.
    assert list(values) == [0, 1, 2, 3, 5]
    assert [iteration for iteration, value in values.items() if value == 0] == [1, 2]


@pytest.mark.parametrize("strides", [(16,), (8, 16)])
def test_a_loss_of_assigned_objects_is_judged_over_all_levels(strides, training, patchy):
    cfg = training(iterations=4)
    patchy(cfg, range(4), strides=strides, level_assigned=True)
    cfg.GKD.WATCH_PATIENCE = 2
    if strides == (16,):
        assert train(cfg).iter == 4
        return
    with pytest.raises(DeadLossError) as error:
        train(cfg)
    text = str(error.value)
    assert "the patchy loss (GKD.METHOD_OPTIONS.WEIGHT) at all levels of the student was exactly 0" in text
    assert "GKD.FEATURES" not in text


def test_fgfi_assigns_objects_to_levels():
    """With the largest overlap over all levels a coarse level often has no cell near an object."""
    assert all(term.level_assigned for term in FGFI().terms.values())


def test_images_without_boxes_stop_no_healthy_run(training, without_boxes, caplog):
    """Two of six images have boxes; a resumed run comes to its end too."""
    cfg = training("faster", iterations=12)
    without_boxes(cfg, range(2, TOY_SCENES))
    cfg.GKD.WATCH_PERIOD, cfg.GKD.WATCH_PATIENCE, cfg.SOLVER.CHECKPOINT_PERIOD = 1, 2, 6
    # Neither is a ratio on an image without objects a reason to warn.
    cfg.GKD.WATCH_MAX_RATIO = 1e-9
    with caplog.at_level(logging.INFO, logger="gkd_d2.engine.hooks"):
        trainer = train(cfg)
    dead = [iteration for iteration, value in history(trainer, "gkd_value/box/p3").items() if value == 0]
    assert {later - earlier for earlier, later in itertools.pairwise(dead)} >= {1}, "no two in a row"
    notes = [line for line in caplog.messages if "(no object in the batch)" in line]
    assert [int(re.search(r"iteration (\d+): ", line)[1]) for line in notes] == dead
    warned = [int(re.search(r"at iteration (\d+) ", line)[1]) for line in caplog.messages if "swamps" in line]
    assert len(warned) == 4 and not set(warned) & set(dead)
    (Path(cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000005.pth")
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 6
    resumed.train()
    assert resumed.iter == 12


def test_images_without_boxes_do_not_start_the_count_anew(training, without_boxes, patchy):
    cfg = training(iterations=10)
    order = list(itertools.islice(TrainingSampler(TOY_SCENES, seed=cfg.SEED), 6))
    without_boxes(cfg, order[1:3])
    patchy(cfg, range(10))
    cfg.GKD.WATCH_PATIENCE = 3
    # Of the iterations 0 to 4 three have objects.
    with pytest.raises(DeadLossError, match="in the last 3 iterations with objects, up to iteration 4: "):
        train(cfg)


def test_boxes_of_another_process_count(training, without_boxes, patchy, monkeypatch):
    cfg = training(iterations=5)
    without_boxes(cfg, range(TOY_SCENES))
    patchy(cfg, range(5))
    cfg.GKD.WATCH_PATIENCE = 2
    assert train(cfg).iter == 5

    def gathered(value):
        return [value, dataclasses.replace(value, boxes=1)] if isinstance(value, TermReport) else [value]

    monkeypatch.setattr(comm, "all_gather", gathered)
    with pytest.raises(DeadLossError, match="up to iteration 1: "):
        train(cfg)


@pytest.mark.parametrize("boxes", [True, False])
def test_a_gradient_that_is_not_finite_stops_the_run(boxes, training, without_boxes, tmp_path):
    """With float16 and too large a scale, which the trainer by itself would go on lowering."""
    cfg = training(iterations=10)
    without_boxes(cfg, range(0 if boxes else TOY_SCENES))
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, "float16"
    cfg.GKD.WATCH_PATIENCE = 2
    trainer = Trainer(cfg)
    step = trainer._trainer
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60).state_dict()
    step.load_state_dict({**step.state_dict(), "grad_scaler": scaler})
    with pytest.raises(
        DeadLossError, match="at the student's p3 was not finite in the last 2 iterations, up to iteration 1"
    ):
        trainer.train()
    saved = torch.load(tmp_path / "output" / "model_stopped.pth")["model"]
    assert all(value.isfinite().all() for value in saved.values())
    assert not (tmp_path / "output" / "last_checkpoint").exists()
