"""What a run's seed is, and what a resume takes over and notices."""

import hashlib
import itertools
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.engine import HookBase
from detectron2.utils import comm
from tiny import ARCHITECTURES

from gkd_d2.config import config_differences, detector_config
from gkd_d2.engine.resume import ResumeError, settle_seed
from gkd_d2.engine.trainer import Trainer


def test_a_given_seed_stays_and_a_drawn_one_is_kept_at_a_resume(training, tmp_path):
    cfg = training(iterations=1)
    assert settle_seed(cfg, resume=False).SEED == cfg.SEED == 7
    cfg.SEED = -1
    drawn = {settle_seed(cfg, resume=False).SEED for _ in range(3)}
    assert len(drawn) == 3 and min(drawn) >= 0
    (tmp_path / "output" / "config.yaml").write_text("SEED: 12\n")
    assert settle_seed(cfg, resume=True).SEED == 12
    assert settle_seed(cfg, resume=False).SEED != 12


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"SEED: -1\n", "config.yaml: SEED is -1, but must be a whole number >= 0. "),
        (b"SEED: 1.5\n", "config.yaml: SEED is 1.5, but must be a whole number >= 0. "),
        (b"MODEL: {}\n", "config.yaml holds no SEED. "),
        (b"", "config.yaml holds no SEED. "),
        (b"SEED: [", "config.yaml: while parsing a flow"),
        (b"SEED: \xff", "config.yaml: 'utf-8' codec can't decode"),
    ],
)
def test_a_drawn_seed_that_is_lost_is_asked_for(content, said, training, tmp_path):
    cfg = training(iterations=1)
    cfg.SEED = -1
    (tmp_path / "output" / "config.yaml").write_bytes(content)
    with pytest.raises(ResumeError, match=f"{re.escape(said)}(.|\\n)*The run draws its seed, .*: set SEED to it"):
        settle_seed(cfg, resume=True)


def resume(cfg):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    return trainer


def test_a_resume_takes_over_the_averages_and_says_what_changed(training, caplog, tmp_path):
    cfg = training("retinanet", iterations=2)
    trainer = Trainer(cfg)
    trainer.train()
    average = trainer.model.student.loss_normalizer
    # Detectron2's HEAD sets it in the first iteration.
    assert average != getattr(Trainer(cfg).model.student, "loss_normalizer", None)

    cfg.OUTPUT_DIR, output = str(tmp_path / "elsewhere"), cfg.OUTPUT_DIR
    shutil.copytree(output, cfg.OUTPUT_DIR)
    cfg.DATALOADER.NUM_WORKERS, cfg.GKD.WATCH_PERIOD, cfg.TEST.EVAL_PERIOD = 1, 7, 9
    again = resume(cfg)
    assert again.start_iter == 2
    assert again.model.student.loss_normalizer == average
    assert "the resumed run differs" not in caplog.text
    ours, theirs = again.optimizer.state_dict(), trainer.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert len(ours["state"]) == len(theirs["state"]) > 50
    for index, state in ours["state"].items():
        assert torch.equal(state["momentum_buffer"], theirs["state"][index]["momentum_buffer"])

    cfg.SOLVER.IMS_PER_BATCH, cfg.SEED, cfg.GKD.LOSS_WEIGHTS.BOX = 2, 8, 0.5
    cfg.DATASETS.TRAIN = ("toy_kitti_train", "toy_kitti_val")
    resume(cfg)
    (record,) = [record for record in caplog.records if "the resumed run differs" in record.message]
    assert record.levelname == "WARNING"
    assert record.message == (
        "From iteration 2 the resumed run differs from the one before: DATASETS.TRAIN was ['toy_kitti_train'] and is "
        "['toy_kitti_train', 'toy_kitti_val'], GKD.LOSS_WEIGHTS.BOX was 0.001 and is 0.5, SEED was 7 and is 8, "
        "SOLVER.IMS_PER_BATCH was 1 and is 2, number of images was 6 and is 7"
    )


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_method_with_parameters_resumes_bit_for_bit(kind, training, tmp_path):
    """With their momentum: those of the relation loss of fgd, at the middle of a run."""
    cfg = training(kind, iterations=4)
    cfg.merge_from_list(["GKD.METHOD", "fgd", "GKD.FGD.RELATION_WEIGHT", 1e-5, "SOLVER.CHECKPOINT_PERIOD", 2])
    final = tmp_path / "output" / "model_final.pth"
    Trainer(cfg).train()
    whole = torch.load(final)
    final.unlink()
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000001.pth")
    again = resume(cfg)
    assert again.start_iter == 2
    middle = {name: value.clone() for name, value in again.model.state_dict().items()}
    again.train()
    resumed = torch.load(final)
    assert resumed["model"].keys() == whole["model"].keys()
    assert all(torch.equal(value, whole["model"][name]) for name, value in resumed["model"].items())
    moved = {name for name, value in resumed["model"].items() if not torch.equal(value, middle[name])}
    for level, network in itertools.product(("p3", "p4"), ("student", "teacher")):
        assert {f"method.relation.{level}.{network}.expand.{part}" for part in ("weight", "bias")} <= moved
    names, optimizers = zip(*((o["parameters"], o["optimizer"]["state"]) for o in map(train_step, (resumed, whole))))
    assert names[0] == names[1] and len(optimizers[0]) == len(optimizers[1]) == len(names[0])
    for number, name in enumerate(names[0]):
        ours, theirs = (state[number]["momentum_buffer"] for state in optimizers)
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_methods_of_predictions_resume_bit_for_bit(kind, training, tmp_path):
    """In bfloat16; a RetinaNet's depend on its moving average, which is no part of its state_dict."""
    cfg = training(kind, iterations=4)
    cfg.merge_from_list(["GKD.METHOD", "logits", "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.AMP.ENABLED", True])
    cfg.SOLVER.AMP.DTYPE = "bfloat16"
    final = tmp_path / "output" / "model_final.pth"
    Trainer(cfg).train()
    whole = torch.load(final)["model"]
    final.unlink()
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000001.pth")
    resume(cfg).train()
    resumed = torch.load(final)["model"]
    assert not any(name.startswith("method.") for name in resumed)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def train_step(checkpoint):
    return checkpoint["trainer"]["_trainer"]


def test_a_resume_from_another_folder_has_the_same_teacher(training, caplog, tmp_path, monkeypatch):
    cfg = training("retinanet", iterations=1)
    monkeypatch.chdir(tmp_path)
    cfg.GKD.TEACHER.CONFIG_FILE, cfg.GKD.TEACHER.WEIGHTS = "teacher.yaml", "teacher.pth"
    Trainer(cfg).train()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    cfg.GKD.TEACHER.CONFIG_FILE, cfg.GKD.TEACHER.WEIGHTS = "../teacher.yaml", str(tmp_path / "teacher.pth")
    resume(cfg)
    assert "the resumed run differs" not in caplog.text
    # The same content at another place.
    for name in ("teacher.yaml", "teacher.pth"):
        shutil.copy(tmp_path / name, name)
    cfg.GKD.TEACHER.CONFIG_FILE, cfg.GKD.TEACHER.WEIGHTS = "teacher.yaml", "teacher.pth"
    resume(cfg)
    assert "the resumed run differs" not in caplog.text


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def test_a_resume_names_a_teacher_whose_files_have_changed(training, caplog, tmp_path):
    """At the same paths."""
    cfg = training("retinanet", iterations=1)
    weights, config = tmp_path / "teacher.pth", tmp_path / "teacher.yaml"
    Trainer(cfg).train()
    before = digest(weights)
    state = torch.load(weights)
    state["model"]["head.bbox_pred.bias"] += 1
    torch.save(state, weights)
    resume(cfg)
    changed = f"GKD.TEACHER.WEIGHTS was {weights} with SHA-256 {before}... and is {weights} with SHA-256 "
    assert caplog.records[-1].message == (
        f"From iteration 1 the resumed run differs from the one before: {changed}{digest(weights)}..."
    )
    # How a teacher was trained does not matter.
    text = config.read_text().replace("BASE_LR: 0.001", "BASE_LR: 0.5")
    config.write_text(text.replace("FOCAL_LOSS_GAMMA: 2.0", "FOCAL_LOSS_GAMMA: 1.0"))
    resume(cfg)
    assert caplog.records[-1].message == (
        "From iteration 1 the resumed run differs from the one before: the teacher's MODEL.RETINANET.FOCAL_LOSS_GAMMA "
        f"was 2.0 and is 1.0, {changed}{digest(weights)}..."
    )


def test_a_resume_of_a_checkpoint_that_knows_no_checksum(training, caplog, tmp_path):
    """As those of earlier versions: the paths are compared."""
    cfg = training("retinanet", iterations=1)
    Trainer(cfg).train()
    path = Path(cfg.OUTPUT_DIR) / "model_final.pth"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["trainer"]["run"]["teacher"]
    torch.save(checkpoint, path)
    assert resume(cfg).start_iter == 1
    assert "the resumed run differs" not in caplog.text
    (tmp_path / "elsewhere").mkdir()
    cfg.GKD.TEACHER.WEIGHTS = shutil.copy(tmp_path / "teacher.pth", tmp_path / "elsewhere")
    resume(cfg)
    teachers = f"GKD.TEACHER.WEIGHTS was {tmp_path}/teacher.pth and is {tmp_path}/elsewhere/teacher.pth"
    assert f"From iteration 1 the resumed run differs from the one before: {teachers}" in caplog.text


OTHERWISE = {
    "method": (["GKD.METHOD", "fitnet"], "GKD.METHOD was gkd and is fitnet"),
    "option of a method": (["GKD.RECTIFIER", "relu"], "GKD.RECTIFIER was abs and is relu"),
    "weight": (["GKD.LOSS_WEIGHTS.IMAGE", 0.5], "GKD.LOSS_WEIGHTS.IMAGE was 0.001 and is 0.5"),
    "weight of another method": (["GKD.FITNET.WEIGHT", 0.5], "GKD.FITNET.WEIGHT was 1.0 and is 0.5"),
    "precision": (
        ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"],
        "SOLVER.AMP.DTYPE was float16 and is bfloat16, SOLVER.AMP.ENABLED was False and is True",
    ),
}


@pytest.mark.parametrize(("options", "named"), OTHERWISE.values(), ids=OTHERWISE)
def test_a_resume_names_another_method_weight_or_precision(options, named, training, caplog):
    cfg = training(iterations=1)
    Trainer(cfg).train()
    cfg.merge_from_list(options)
    resume(cfg)
    assert caplog.records[-1].message == f"From iteration 1 the resumed run differs from the one before: {named}"


@pytest.mark.parametrize("distilled", [True, False])
def test_a_run_does_not_start_with_values_that_are_not_finite(distilled, training):
    """Of the config, and numbers that float32 can't hold."""
    cfg = training(iterations=1)
    if not distilled:
        cfg = detector_config(cfg)
    cfg.defrost()
    state = Trainer(cfg).checkpointer.model.state_dict()
    cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/large.pth"
    torch.save({"model": {name: value.double() for name, value in state.items()}}, cfg.MODEL.WEIGHTS)
    Trainer(cfg).resume_or_load(resume=False)
    large = {name: value.double().fill_(1e300) if "bbox_pred.bias" in name else value for name, value in state.items()}
    torch.save({"model": large}, cfg.MODEL.WEIGHTS)
    owner = "student" if distilled else "detector"
    with pytest.raises(ValueError, match=f"infinite or NaN values in the {owner}'s head.bbox_pred.bias: MODEL.WEIGHTS"):
        Trainer(cfg).resume_or_load(resume=False)
    cfg.MODEL.WEIGHTS, cfg.MODEL.PIXEL_STD = "", [1.0, float("nan"), 1.0]
    with pytest.raises(ValueError, match=f"in the {owner}'s pixel_std: .*MODEL.PIXEL_STD must be finite"):
        Trainer(cfg).resume_or_load(resume=False)


SCHEDULES = {
    "rate": {"BASE_LR": 0.004},
    "steps": {"STEPS": (2,), "GAMMA": 0.5},
    "longer": {"MAX_ITER": 8, "LR_SCHEDULER_NAME": "WarmupCosineLR"},
    "warm-up": {"WARMUP_ITERS": 5, "WARMUP_FACTOR": 0.1},
}


@pytest.mark.parametrize("changes", SCHEDULES.values(), ids=SCHEDULES)
def test_a_resume_follows_the_schedule_of_its_config(changes, training, caplog):
    """From its first iteration, as a run that had this config from the start would."""
    cfg = detector_config(training(iterations=5))
    cfg.defrost()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = 0.01, (4,), 2
    cfg.SOLVER.CHECKPOINT_PERIOD = 3
    Trainer(cfg).train()
    (Path(cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000002.pth")
    before = cfg.SOLVER.clone()
    for key, value in changes.items():
        cfg.SOLVER[key] = value

    reference = Trainer(cfg)
    rates = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        rates.append(reference.optimizer.param_groups[0]["lr"])
        reference.optimizer.step()
        reference.scheduler.step()
    again = resume(cfg)
    again.train()
    used = {iteration: rate for rate, iteration in again.storage.history("lr").values()}
    assert used == dict(enumerate(rates[3:], start=3))
    for key, value in changes.items():
        assert f"SOLVER.{key} was {as_text(before[key])} and is {as_text(value)}" in caplog.text


def as_text(value):
    return str(list(value) if isinstance(value, tuple) else value)


def test_a_resume_takes_momentum_and_weight_decay_from_its_config(training, caplog):
    cfg = training(iterations=1)
    Trainer(cfg).train()
    cfg.merge_from_list(["SOLVER.MOMENTUM", 0.5, "SOLVER.WEIGHT_DECAY", 0.25, "SOLVER.WEIGHT_DECAY_NORM", 0.125])
    cfg.SOLVER.NESTEROV = True
    again = resume(cfg)
    groups = again.optimizer.param_groups
    assert all(group["momentum"] == 0.5 and group["nesterov"] for group in groups)
    decays = [group["weight_decay"] for group in groups]
    assert decays == [group["weight_decay"] for group in Trainer(cfg).optimizer.param_groups]
    assert {0.25, 0.125} <= set(decays)
    assert "SOLVER.MOMENTUM was 0.9 and is 0.5" in caplog.text


FROZEN = ["MODEL.BACKBONE.FREEZE_AT", 2]
CHANGES = {
    "another stage frozen": (FROZEN, "MODEL.BACKBONE.FREEZE_AT was 0 and is 2"),
    "other shapes": (["MODEL.FPN.OUT_CHANNELS", 8], "MODEL.FPN.OUT_CHANNELS was 16 and is 8"),
    "blocks of the relation loss": (
        ["GKD.LOSS_WEIGHTS.RELATION", 5e-6],
        "GKD.LOSS_WEIGHTS.RELATION was 0.0 and is 5e-06",
    ),
    "a level with an align convolution": (["GKD.FEATURES", ["p3"]], "GKD.FEATURES was ['p3', 'p4'] and is ['p3']"),
}


@pytest.mark.parametrize(("options", "named"), CHANGES.values(), ids=CHANGES)
def test_a_resume_with_other_parameters_is_refused(options, named, training, distiller_config, monkeypatch):
    cfg = training(iterations=1)
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    distiller_config("retinanet", teacher_channels=24)
    Trainer(cfg).train()
    cfg.merge_from_list(["SOLVER.MAX_ITER", 2, *options])
    with pytest.raises(ResumeError) as error:
        resume(cfg)
    final = f"{cfg.OUTPUT_DIR}/model_final.pth"
    assert str(error.value) == (
        f"{final} can't be resumed, because the model or its trainable parameters have changed: {named}; to start from "
        f"its weights, set MODEL.WEIGHTS {final}, without --resume and in another OUTPUT_DIR"
    )
    # What the sentence advises.
    cfg.MODEL.WEIGHTS = final
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    assert trainer.start_iter == 0


def test_a_frozen_part_that_the_checkpoint_does_not_hold(training):
    """The trainable parameters are the same."""
    cfg = training(iterations=1)
    cfg.MODEL.BACKBONE.FREEZE_AT = 5
    Trainer(cfg).train()
    cfg.MODEL.RESNETS.DEPTH = 101
    with pytest.raises(ResumeError, match="have changed: MODEL.RESNETS.DEPTH was 50 and is 101; to start from"):
        resume(cfg)


def test_a_loader_that_can_not_start_in_the_middle_is_refused(training):
    class WithDetectron2sLoader(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg)

    with pytest.raises(TypeError, match="the training loader is a .* that can't start at a given batch"):
        WithDetectron2sLoader(training("retinanet", iterations=1))


def test_a_schedule_that_has_already_ended(training):
    """A run of 4 iterations is resumed with MAX_ITER 2: there is nothing left to train."""
    cfg = training(iterations=4)
    Trainer(cfg).train()
    cfg.SOLVER.MAX_ITER = 2
    again = resume(cfg)
    assert again.start_iter == 4
    again.train()


class AdamTrainer(Trainer):
    """A trainer of the user's own with another optimizer."""

    @classmethod
    def build_optimizer(cls, cfg, model):
        return torch.optim.AdamW(model.parameters(), cfg.SOLVER.BASE_LR)


def test_a_resume_with_another_optimizer_is_refused(training):
    cfg = training(iterations=1)
    Trainer(cfg).train()
    with pytest.raises(ResumeError, match="was trained by the optimizer SGD.* and this trainer builds AdamW"):
        AdamTrainer(cfg).resume_or_load(resume=True)


@pytest.mark.parametrize("absent", [("run",), ("run", "config")])
def test_a_checkpoint_of_another_trainer_is_not_resumed(absent, training):
    cfg = training(iterations=1)
    Trainer(cfg).train()
    path = Path(cfg.OUTPUT_DIR) / "model_final.pth"
    checkpoint = torch.load(path, weights_only=True)
    node = checkpoint["trainer"]
    for name in absent[:-1]:
        node = node[name]
    del node[absent[-1]]
    torch.save(checkpoint, path)
    with pytest.raises(
        ResumeError, match="was not written by this version of the trainer and can't be resumed: to start from its we"
    ):
        resume(cfg)


def test_a_checkpoint_holds_the_config_as_text(training):
    cfg = training(iterations=1)
    Trainer(cfg).train()
    run = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)["trainer"]["run"]
    assert not config_differences(CfgNode.load_cfg(run["config"]), cfg)
    # It is as long as config.yaml.
    assert len(run["config"]) < 20_000


@pytest.mark.parametrize(
    ("processes", "expected"),
    [(8, (12, 5, 1, 8)), (2, (50, 20, 2, 30)), (1, (100, 40, 4, 60)), (64, (2, 1, 1, 1))],
)
def test_the_counts_of_gkd_are_scaled_with_the_processes(processes, expected, training):
    cfg = training(iterations=100)
    cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH = 2, 2
    cfg.SOLVER.WARMUP_ITERS, cfg.GKD.WARMUP_ITERS, cfg.GKD.WATCH_PERIOD, cfg.GKD.VIS_PERIOD = 50, 50, 20, 2
    cfg.GKD.BALANCE_ITERS = 30
    cfg.freeze()
    scaled = Trainer.auto_scale_workers(cfg, processes)
    keys = ("WARMUP_ITERS", "WATCH_PERIOD", "VIS_PERIOD", "BALANCE_ITERS")
    assert tuple(scaled.GKD[key] for key in keys) == expected
    assert scaled.SOLVER.WARMUP_ITERS == scaled.GKD.WARMUP_ITERS
    assert scaled.is_frozen() and cfg.GKD.WARMUP_ITERS == 50
    cfg.defrost()
    cfg.GKD.VIS_PERIOD = 0
    assert Trainer.auto_scale_workers(cfg, processes).GKD.VIS_PERIOD == 0


def test_the_trainer_uses_the_scaled_counts(training):
    cfg = training(iterations=100)
    cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH, cfg.GKD.WARMUP_ITERS = 2, 2, 50
    assert Trainer(cfg).model.warmup_iters == 100


def test_machines_must_share_the_output_folder(training, monkeypatch):
    """Another process that finds no checkpoint would start at 0."""
    cfg = training(iterations=1)
    Trainer(cfg).train()
    cfg.SOLVER.MAX_ITER = 2
    trainer = Trainer(cfg)
    monkeypatch.setattr(comm, "all_gather", lambda start: [start, 0])
    with pytest.raises(RuntimeError, match="would start at iterations 1, 0: OUTPUT_DIR .* must be one folder"):
        trainer.resume_or_load(resume=True)


@pytest.fixture
def other_evaluator():
    """The name of a dataset whose evaluator is Detectron2's of LVIS."""
    name = "trainer_lvis_val"
    DatasetCatalog.register(name, lambda: [{"file_name": "0.png", "image_id": 0}])
    MetadataCatalog.get(name).evaluator_type = "lvis"
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_an_unknown_evaluator_is_an_error(other_evaluator, training):
    """Detectron2 would print a hint and return no result."""
    cfg = training(iterations=1)
    cfg.DATASETS.TEST = (other_evaluator,)
    with pytest.raises(
        ValueError, match="trainer_lvis_val has the evaluator_type 'lvis', but there are evaluators for"
    ):
        Trainer.test(cfg, torch.nn.Identity(), None)


@pytest.mark.parametrize("distilled", [True, False])
def test_a_run_ends_with_test_time_augmentation(distilled, training):
    cfg = training("faster", iterations=2)
    if not distilled:
        cfg = detector_config(cfg)
        cfg.defrost()
    cfg.DATASETS.TEST = ("toy_kitti_val",)
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.TEST.AUG.ENABLED, cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = True, (64, 96), 240
    trainer = Trainer(cfg)
    trainer.train()
    rows = [json.loads(line) for line in (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()]
    names = {name for row in rows for name in row}
    for name in ("bbox", "bbox_TTA"):
        assert f"{name}/AP50" in names
    for name in ("kitti", "kitti_TTA"):
        assert f"{name}/AP_moderate" in names
    plain, augmented = (
        json.loads((Path(cfg.OUTPUT_DIR) / folder / "toy_kitti_val" / "coco_instances_results.json").read_text())
        for folder in ("inference", "inference_TTA")
    )
    assert plain and augmented and plain != augmented
    # The student trains on after an evaluation.
    assert trainer.model.training


@pytest.mark.parametrize(("start", "iterations", "lines"), [(0, 7, [0, 4, 6]), (0, 1, [0]), (7, 13, [7, 11, 12])])
def test_the_first_lines_come_early(start, iterations, lines, training, tmp_path, caplog, monkeypatch):
    """The first with an estimate of the time left is that of the fifth iteration; metrics.json gets the last alone."""
    cfg = training("retinanet", iterations=iterations)
    cfg.GKD.LOSS_WEIGHTS.ATTENTION = 0.0
    trainer = Trainer(cfg)
    trainer.start_iter = start
    # A tool that ran in this process may have turned it off.
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    caplog.set_level("INFO", "detectron2")
    trainer.train()
    printed = [record.getMessage() for record in caplog.records if record.name == "detectron2.utils.events"]
    assert [int(re.search(r"iter: (\d+)", line)[1]) for line in printed] == lines
    assert all("total_loss: " in line and "loss_bmfi_box: " in line for line in printed)
    assert not any("attention" in line for line in printed)
    assert ["eta: " in line for line in printed[:2]] == [False, True][: len(printed)]
    rows = [json.loads(line) for line in (tmp_path / "output" / "metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "total_loss" in row] == [iterations - 1]
    assert len({row["iteration"] for row in rows}) == len(rows)
    assert not any("attention" in name for row in rows for name in row)


class _Failing(HookBase):
    """Fails in the last iteration."""

    def after_step(self):
        if self.trainer.iter == self.trainer.max_iter - 1:
            raise RuntimeError("the last step has failed")


def test_a_failure_in_the_last_iteration_evaluates_nothing(training, tmp_path):
    """Of several processes one would evaluate alone, and wait for the others."""
    cfg = training(iterations=2)
    cfg.DATASETS.TEST = ("toy_kitti_val",)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([_Failing()])
    with pytest.raises(RuntimeError, match="the last step has failed"):
        trainer.train()
    assert not (tmp_path / "output" / "inference").exists()
