"""A dataset, a meta-architecture and a method of the user's own module, in every tool that reads a config."""

import json

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from tiny import calm, detector_config

from gkd_d2.data.toy import make_toy_kitti

MODULE = """
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet

from gkd_d2 import METHOD_REGISTRY, LevelwiseMethod, Term
from gkd_d2.data.datasets.kitti import load_kitti
from gkd_d2.data.datasets.kitti_labels import CLASSES


@META_ARCH_REGISTRY.register()
class MyNet(RetinaNet):
    pass


class Squares(LevelwiseMethod):
    def level_losses(self, level):
        return {"loss_squares": (level.student - level.teacher).square().mean()}


@METHOD_REGISTRY.register()
def squares(cfg):
    weight = cfg.GKD.METHOD_OPTIONS.get("WEIGHT", 0.1)
    return Squares({"loss_squares": Term("squares", weight, "GKD.METHOD_OPTIONS.WEIGHT")})


for split in ("train", "val"):
    DatasetCatalog.register(f"my_{split}", partial(load_kitti, Path(__file__).parent / "scenes", split))
    MetadataCatalog.get(f"my_{split}").thing_classes = list(CLASSES)
"""


@pytest.fixture
def work(write_module, distiller_config, tmp_path):
    """The working folder: my_project.py, scenes, student.yaml, run/ with a finished training, and study.yaml."""
    write_module("my_project", MODULE)
    make_toy_kitti(tmp_path / "scenes", 4, 2, 0, image_size=(160, 64))
    cfg = distiller_config("retinanet", channels=8)
    cfg.GKD.STUDENT.META_ARCHITECTURE, cfg.GKD.METHOD = "MyNet", "squares"
    cfg.GKD.FEATURES = ["p3", "p4"]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("my_train",), ("my_val",)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, 2, ()
    cfg.OUTPUT_DIR = "trained"
    (tmp_path / "student.yaml").write_text(cfg.dump())
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(cfg.dump())
    (run / "metrics.json").write_text(json.dumps({"iteration": 1, "total_loss": 1.0, "bbox/AP": 10.0, "bbox/AP50": 20}))
    torch.save({"model": calm(build_model(detector_config("retinanet", channels=8))).state_dict()}, run / "model.pth")
    (run / "last_checkpoint").write_text("model.pth")
    study = {
        "title": "Mine",
        "dataset": "my_val",
        "seeds": [1],
        "detectors": {"mine": {"config": "student.yaml", "teacher": {"config": "teacher.yaml"}}},
        "settings": {"alone": {"options": {"GKD.METHOD": "none"}}, "squares": {"scale": 2.0}},
    }
    teacher = yaml.safe_load((tmp_path / "teacher.yaml").read_text())
    teacher["DATASETS"] = {"TRAIN": ["my_train"], "TEST": ["my_val"]}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(teacher))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return tmp_path


STUDENT = ("--config-file", "student.yaml")
TOOLS = {
    "train_net.py": (*STUDENT, "--num-gpus", 0, "--eval-only", "MODEL.WEIGHTS", "run/model.pth"),
    "suggest_weights.py": (*STUDENT, "--batches", 1),
    "visualize_gkd.py": (*STUDENT, "--count", 1, "MODEL.WEIGHTS", "run/model.pth"),
    "benchmark_step.py": (*STUDENT, "--batch", 1, "--size", 64, 96, "--rounds", 1, "--setting", "default"),
    "export_student.py": ("--weights", "run", "--output", "exported"),
    "compare_runs.py": ("run", "--device", "cpu", "--repeats", 1, "--output", "compared"),
    "run_study.py": ("study.yaml", "--report-only", "--device", "cpu", "--output", "studies", "--report", "report.md"),
}


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_imports_the_users_module(name, work, run_here):
    arguments = TOOLS[name]
    (work / "report.md").write_text("")
    status, said = run_here(name, *arguments)
    assert status == 1
    # Only then is it seen that the import below does it; in a sentence, at once.
    assert "is not registered" in said and "in GKD.IMPORTS or by --import" in said and "Traceback" not in said
    assert run_here(name, "--import", "my_project", *arguments)[0] == 0


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_says_what_module_is_not_found(name, work, run_here):
    status, said = run_here(name, "--import", "my_projects", *TOOLS[name])
    assert status == 1
    assert "--import" in said and "names the module my_projects, which is not found" in said
    assert f"the working folder, {work}" in said and "Traceback" not in said


def test_two_processes_train_and_evaluate_by_the_users_module(work, run_tool, run_here):
    """Each is a new interpreter; the key of the run's config serves the tools that look at it later."""
    keys = yaml.safe_load((work / "student.yaml").read_text())
    keys["GKD"]["IMPORTS"] = ["my_project"]
    (work / "student.yaml").write_text(yaml.safe_dump(keys))
    run_tool("train_net.py", *STUDENT, "--num-gpus", 2)
    rows = [json.loads(line) for line in (work / "trained" / "metrics.json").read_text().splitlines()]
    scalars = {name: value for row in rows for name, value in row.items()}
    assert 0 < scalars["loss_squares"] < float("inf") and "bbox/AP" in scalars
    assert run_here("export_student.py", "--weights", "trained", "--output", "exported")[0] == 0
