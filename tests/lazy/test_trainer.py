"""Real short trainings of LazyConfigs."""

import itertools
import json
import logging
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog, samplers
from detectron2.evaluation import COCOEvaluator
from lazy_configs import write_distilled, write_plain
from omegaconf import OmegaConf
from short_runs import checkpoints, metrics

from gkd_d2.config.lazy_spec import plain_model
from gkd_d2.engine.preflight import PreflightError, check_inputs
from gkd_d2.engine.resume import ResumeError
from gkd_d2.evaluation import build_evaluator
from gkd_d2.lazy.read import keys_without_effect, read_lazy
from gkd_d2.lazy.run import LazyRun
from gkd_d2.lazy.trainer import LazyTrainer, _move_to_ema, evaluate, settle_lazy_seed
from gkd_d2.utils.checkpoint import CompleteCheckpointer


def build(cfg, *, resume=False):
    settle_lazy_seed(cfg, resume=resume)
    Path(cfg.train.output_dir).mkdir(exist_ok=True)
    # As set_up_run does.
    torch.manual_seed(cfg.train.seed)
    return LazyTrainer(cfg)


def train(cfg, *, resume=False):
    trainer = build(cfg, resume=resume)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def state(folder):
    return torch.load(Path(folder) / "model_final.pth", weights_only=True)


def same(one, other):
    if torch.is_tensor(one):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lazy")


@pytest.fixture(scope="module")
def config(folder):
    return write_distilled(folder, options='method="gkd", warmup_iters=4')


# A resume is stopped by what a run that is cut short writes: its checkpoints, all but the last.
OPTIONS = (
    "train.checkpointer.period=3",
    "train.accumulate_steps=2",
    "train.vis_period=4",
    "train.model_ema.enabled=True",
    "train.model_ema.decay=0.5",
    "dataloader.train.num_workers=1",
)


@pytest.fixture(scope="module")
def whole(config, folder, toy_data):
    output = folder / "whole"
    trainer = train(read_lazy(str(config), [*OPTIONS, f"train.output_dir={output}"], eval_only=False))
    return output, trainer


def test_what_a_training_leaves(whole):
    output, _ = whole
    assert checkpoints(output) == {"model_0000002.pth", "model_final.pth"}
    rows = metrics(output)
    names = {name for row in rows.values() for name in row}
    assert {"loss_cls", "loss_gkd_gradient", "loss_bmfi_box", "gkd_ratio/box", "kitti/AP_moderate"} <= names
    losses = [value for row in rows.values() for name, value in row.items() if name.startswith("loss_")]
    assert losses and all(map(math.isfinite, losses))
    # The rates: a ramp over half of the training, and a step after iteration 4.
    rates = [json.loads(line)["lr"] for line in (output / "metrics.json").read_text().splitlines() if '"lr"' in line]
    assert rates[-1] == pytest.approx(1e-4)
    saved = state(output)["model"]
    assert {name.partition(".")[0] for name in saved} >= {"backbone", "head"} and not any("teacher" in n for n in saved)


def test_a_resume_is_equal_bit_for_bit(whole, config, folder, read, caplog):
    output = folder / "resumed"
    options = (*OPTIONS, f"train.output_dir={output}")
    stopped = build(read(config, *options))
    stopped.resume_or_load(resume=False)
    stop_after(stopped, 3)
    with caplog.at_level(logging.WARNING, logger="gkd_d2"):
        train(read(config, *options), resume=True)
    assert "the resumed run differs" not in caplog.text
    one, other = state(whole[0]), state(output)
    assert same(one["model"], other["model"]) and same(one["ema_state"], other["ema_state"])
    assert not same(one["model"], one["ema_state"])
    assert same(one["trainer"]["_trainer"]["optimizer"], other["trainer"]["_trainer"]["optimizer"])


def stop_after(trainer, iterations):
    """As a run that is killed after it has saved."""

    class Killed(Exception):
        pass

    step = trainer.run_step

    def run_step():
        if trainer.iter == iterations:
            raise Killed
        step()

    trainer.run_step = run_step
    with pytest.raises(Killed):
        trainer.train()


def test_sigterm_saves(read, folder):
    trainer = build(read(write_plain(folder, name="stopped")))
    step = trainer.run_step

    def run_step():
        step()
        if trainer.iter == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.run_step = run_step
    with pytest.raises(SystemExit) as end:
        trainer.train()
    assert end.value.code == 143 and checkpoints(folder / "stopped") == {"model_0000001.pth"}


def test_a_resume_names_what_differs(whole, config, read, caplog):
    output, _ = whole
    cfg = read(config, *OPTIONS, f"train.output_dir={output}", "model.method.weights.box=0.5", "train.watch.period=5")
    with caplog.at_level(logging.WARNING, logger="gkd_d2"):
        build(cfg, resume=True).resume_or_load(resume=True)
    (text,) = [record.getMessage() for record in caplog.records if "the resumed run differs" in record.getMessage()]
    assert text.endswith("differs from the one before: model.method.weights.box was 0.01 and is 0.5")
    other = read(config, *OPTIONS, f"train.output_dir={output}", "model.student.head.conv_dims=[8]")
    with pytest.raises(ResumeError, match=r"model.student.head.conv_dims was \[16\] and is \[8\]"):
        build(other, resume=True).resume_or_load(resume=True)


def test_a_student_alone_by_clipped_steps(read, folder):
    path = write_plain(folder)
    clipped = [f"train.clip_gradients.{key}" for key in ("enabled=True", "clip_type=norm", "clip_value=1.0e-9")]
    moved = {}
    for name, options in (("free", []), ("clipped", clipped)):
        cfg = read(path, f"train.output_dir={folder / name}", "train.max_iter=1", "optimizer.weight_decay=0", *options)
        trainer = build(cfg)
        before = trainer.model.head.cls_score.weight.clone()
        trainer.train()
        moved[name] = (trainer.model.head.cls_score.weight - before).abs().max()
    assert moved["free"] > 1e-8 > moved["clipped"]


def test_only_the_last_checkpoints_are_kept(read, folder):
    path = write_plain(folder, name="few")
    train(read(path, "train.checkpointer.period=1", "train.checkpointer.max_to_keep=2"))
    assert checkpoints(folder / "few") == {"model_0000003.pth", "model_0000004.pth", "model_final.pth"}


def test_an_evaluation_is_that_of_the_student_alone(whole, config, read):
    output, trainer = whole
    cfg = read(config, f"train.output_dir={output}")
    student = instantiate(plain_model(cfg.model))
    CompleteCheckpointer(student).load(str(output / "model_final.pth"))
    assert not hasattr(student, "teacher")
    results = evaluate(cfg, student)
    assert results.keys() == {"kitti", "bbox"}
    expected = trainer.model.student.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in student.state_dict().items())


def test_the_average_is_evaluated_too_and_takes_no_files_of_the_raw_weights(whole, folder):
    output, _ = whole
    names = {name for row in metrics(output).values() for name in row}
    evaluated = {name for name in names if name.startswith(("bbox/", "kitti/"))}
    averaged = {name for name in names if name.startswith(("bbox_EMA/", "kitti_EMA/"))}
    assert evaluated and averaged == {name.replace("/", "_EMA/", 1) for name in evaluated}
    files = [path.relative_to(output) for path in output.rglob("coco_instances_results.json")]
    assert len(files) == 2 and {path.parts[0] for path in files} == {"inference", "inference_EMA"}


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("run/inference/a/b", "run/inference_EMA/a/b"),
        ("run/inference", "run/inference_EMA"),
        ("run", "run_EMA"),
        ("other/place/", "other/place_EMA"),
    ],
)
def test_folders_of_the_average(place, expected):
    inner = LazyCall(COCOEvaluator)(dataset_name="x", output_dir="${...folder}")
    cfg = OmegaConf.create({"evaluator": {"folder": place, "parts": [inner, {"output_dir": None}], "other": place}})
    OmegaConf.resolve(cfg.evaluator)
    _move_to_ema(cfg.evaluator, "run")
    evaluator = cfg.evaluator
    assert evaluator.folder == evaluator.parts[0].output_dir == expected and evaluator.other == place
    assert evaluator.parts[1].output_dir is None


def test_factors_of_the_learning_rate_are_those_of_the_student(config, read):
    """As ViTs have them, by the names of the plain detector's parameters."""
    cfg = read(config)
    cfg.optimizer.params.base_lr = 0.001
    cfg.optimizer.params.lr_factor_func = lambda name: 0.5 if name.startswith("backbone") else 1.0
    try:
        trainer = build(cfg)
    except TypeError as error:
        pytest.skip(f"this Detectron2 has no such factors: {error}")
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    student = trainer.model.student
    of_heads = rates[id(student.head.cls_score.bias)]
    assert all(rates[id(p)] == pytest.approx(0.5 * of_heads) for p in student.backbone.parameters())


def problems(cfg, **options):
    with pytest.raises(PreflightError) as error:
        check_inputs(LazyRun(cfg), **{"eval_only": False, "resume": False, **options})
    return str(error.value)


def test_a_run_that_can_start(config, read):
    check_inputs(LazyRun(read(config)), eval_only=False, resume=False)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["train.device=cuda"], "MODEL.DEVICE is cuda, but torch"),
        (["dataloader.train.total_batch_size=0"], "SOLVER.IMS_PER_BATCH is 0"),
        (["dataloader.train.dataset.names=nothing"], "names nothing"),
        (["model.teacher_weights=nowhere.pth"], "model.teacher_weights is nowhere.pth: there is no such file"),
        (["model.student.num_classes=7"], "model.student.num_classes is 7, but dataset toy_kitti_train has 3"),
        (["model.teacher.num_classes=7"], "model.num_classes of .*teacher.py is 7"),
        (["model.teacher_weights="], "model.teacher_weights is empty: a teacher needs its checkpoint"),
        (["model.teacher_weights=null"], "model.teacher_weights is empty: a teacher needs its checkpoint"),
        (["dataloader.train.mapper=null"], "dataloader.train has no mapper"),
        (["model.method=fitnet"], r"model.method is 'fitnet', but only distil\(method=...\) takes"),
        (
            ["dataloader.test.dataset.names=[toy_kitti_val]"],
            r"dataset_name is \['toy_kitti_val'\], but an",
        ),
        (
            ["model.method.importance_cap=3", "model.method.weighting=uniform"],
            "cap 3, which changes no loss",
        ),
        (["+model.method.map_regoin=image"], r"GKD has no option 'map_regoin': did you mean map_region\?"),
        (["train.init_checkpoint=nowhere.pkl"], "MODEL.WEIGHTS is nowhere.pkl"),
        (["model.method.weights.box=-1"], "loss weight box is -1"),
        (["dataloader.train.mapper.image_format=RGB"], "image_format is RGB, but the detector takes images in BGR"),
        (
            ["train.model_ema.enabled=True", "train.model_ema.decay=1"],
            "MODEL_EMA.DECAY is 1, but must be at least 0 and",
        ),
        (["train.amp.enabled=True"], "SOLVER.AMP trains in float16 on GPUs only"),
    ],
)
def test_a_run_that_can_not_start(overrides, text, config, read):
    assert re.search(text, problems(read(config, *overrides)))


def test_a_map_of_names_to_a_teachers_classes(config, read):
    ours = ["model.classes=[Car,Pedestrian,Cyclist]", "model.teacher_classes=[cyclist,Bus,car]"]
    ours.append("model.teacher_train_sets=[]")
    check_inputs(LazyRun(read(config, *ours)), eval_only=False, resume=False)
    for change, text in (
        ("model.classes=[]", "model.teacher_classes is set, but model.classes is empty: name the student's classes"),
        ("model.classes=[Car,Cyclist,Van]", "model.classes has Cyclist as class 1, counted from 0, dataset toy_kitti_"),
        ("model.teacher_classes=[car,bus]", "GKD.TEACHER.CLASSES has 2 names, but model.num_classes of .* is 3: name"),
        ("model.teacher_classes=[a,b,c]", "names none of the student's classes, Car, Pedestrian, Cyclist"),
        ("model.teacher_train_sets=[toy_kitti_train]", "has cyclist as class 0, counted from 0, dataset toy_kitti_tr"),
    ):
        assert re.search(text, problems(read(config, *ours, change)))


def test_loaders_that_can_not_be_resumed_exactly_are_refused(config, read):
    cfg = read(config)
    cfg.dataloader.train = LazyCall(list)()
    text = problems(cfg)
    assert "a run that can be resumed exactly needs Detectron2's build_detection_train_loader" in text


def test_evaluators_that_would_fail_after_the_training(config, read):
    # Where another evaluation has left its ground truth.
    vars(MetadataCatalog.get("toy_kitti_val")).pop("json_file", None)
    cfg = read(config)
    cfg.dataloader.evaluator = LazyCall(COCOEvaluator)(dataset_name="toy_kitti_val")
    assert "COCOEvaluator without output_dir, but toy_kitti_val has no file in COCO's form" in problems(cfg)
    cfg.dataloader.evaluator.output_dir = "output"
    check_inputs(LazyRun(cfg), eval_only=False, resume=False)
    cfg.dataloader.evaluator = LazyCall(build_evaluator)(dataset_name="toy_kitti_val")
    assert "dataloader.evaluator lacks folder" in problems(cfg)


def test_keys_of_a_model_that_nothing_takes(folder, read):
    path = write_plain(folder, name="misspelt")
    path.write_text(f"{path.read_text()}model.num_clases = 3\nmodel.backbone.bottom_up.freez_at = 2\n")
    text = problems(read(path))
    assert "model has 'num_clases', which is no argument of what it calls: did you mean num_classes?" in text
    assert (
        "model.backbone.bottom_up has 'freez_at', which is no argument of what it calls: did you mean freeze_at?"
        in text
    )


def test_masks_that_are_not_loaded(folder, read):
    text = problems(read(write_plain(folder, "mask", name="masks")))
    assert "the detector has a mask head, but dataloader.train.mapper.use_instance_mask is False" in text


class Mine(torch.utils.data.Sampler):
    """A sampler of the user's own, without a seed to set."""

    def __init__(self, size):
        self._size = size

    def __iter__(self):
        while True:
            yield from reversed(range(self._size))


def my_records():
    """Records of the user's own, that no name stands for."""
    return DatasetCatalog.get("toy_kitti_train")


def tagged(samples):
    return [{**sample, "tag": len(samples)} for sample in samples]


def test_data_samplers_and_batches_of_ones_own(config, read):
    cfg = read(config)
    cfg.dataloader.train.dataset = LazyCall(my_records)()
    cfg.dataloader.train.sampler = LazyCall(Mine)(size=6)
    cfg.dataloader.train.collate_fn = tagged
    cfg.dataloader.train.aspect_ratio_grouping = False
    check_inputs(LazyRun(cfg), eval_only=False, resume=False)
    loader = build(cfg).data_loader
    assert loader.batch_sampler._groups is None
    batch = next(iter(loader))
    names = [Path(record["file_name"]).name for record in my_records()]
    assert [Path(x["file_name"]).name for x in batch] == [names[5], names[4]]
    assert [x["tag"] for x in batch] == [2, 2]
    cfg.dataloader.train.aspect_ratio_grouping = True
    assert build(cfg).data_loader.batch_sampler._groups == [True] * 6


def test_a_sampler_draws_from_the_runs_seed(config, read):
    cfg = read(config)
    orders = []
    for seed in (3, 3, 4):
        cfg.train.seed = seed
        cfg.dataloader.train.sampler = LazyCall(samplers.TrainingSampler)(size=6)
        orders.append(list(itertools.islice(build(cfg).data_loader.batch_sampler, 9)))
    assert orders[0] == orders[1] != orders[2]


def test_options_of_ddp_reach_it(config, read, monkeypatch):
    monkeypatch.setattr("gkd_d2.engine.exact_trainer.comm.get_world_size", lambda: 2)
    given = {}

    def wrap(model, **options):
        given.update(options)
        raise InterruptedError

    monkeypatch.setattr("gkd_d2.engine.exact_trainer.DistributedDataParallel", wrap)
    cfg = read(config, "train.ddp.find_unused_parameters=True", "train.ddp.static_graph=True")
    with pytest.raises(InterruptedError):
        build(cfg)
    assert given["find_unused_parameters"] and given["static_graph"] and given["broadcast_buffers"] is False


def test_keys_of_train_without_effect_are_named(config, read):
    cfg = read(config)
    assert keys_without_effect(cfg) == []
    cfg.train.max_itr, cfg.train.amp.dtyp, cfg.dataloader.train.prefetch_factor = 5, "float16", 3
    assert keys_without_effect(cfg) == [
        "train.amp.dtyp has no effect here: did you mean train.amp.dtype?",
        "train.max_itr has no effect here: did you mean train.max_iter?",
        "dataloader.train.prefetch_factor has no effect here",
    ]


def test_an_image_that_can_not_be_read_is_named(config, read, toy_data, tmp_path):
    cfg = read(config)
    loader = build(cfg).data_loader
    record = dict(loader.dataset._dicts[0])
    record["file_name"] = str(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="absent.png: Detectron2 can't use this image"):
        loader.dataset._mapper(record)
