"""The ready LazyConfigs: each is one that the tool can train, as far as this Detectron2 has its parts."""

import re

import pytest
from detectron2.config import instantiate
from omegaconf import OmegaConf

from gkd_d2.config import read_config
from gkd_d2.lazy.read import keys_without_effect, read_lazy
from gkd_d2.lazy.run import LazyRun

NAMES = [
    *(f"gkd_{name}_kitti" for name in ("retinanet", "fcos", "frcnn_vitdet")),
    *(f"teachers/{name}_kitti" for name in ("retinanet", "fcos", "vitdet")),
]


@pytest.fixture
def read(project, monkeypatch):
    monkeypatch.chdir(project)

    def read(name):
        try:
            return read_lazy(f"configs/lazy/{name}.py", [], eval_only=False)
        except ValueError as error:
            if re.search("not available in Model Zoo|No module named .detectron2.modeling.backbone.vit", str(error)):
                pytest.skip("this Detectron2 lacks the detector")
            raise

    return read


def test_all_are_here(project):
    found = {
        str(path.relative_to(project / "configs" / "lazy"))[:-3] for path in (project / "configs/lazy").rglob("*.py")
    }
    assert {name for name in found if not name.startswith("common/")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_described(name, read):
    cfg = read(name)
    run = LazyRun(cfg)
    assert keys_without_effect(cfg) == [] and run.problems() == []
    assert (run.train_sets, run.test_sets) == (("kitti_train",), ("kitti_val",))
    assert run.student.classes[1] == 3
    assert run.distilled == name.startswith("gkd_")
    assert cfg.train.output_dir == f"output/lazy/{name}"
    # An epoch of 5,984 images: 12 for students, 24 for teachers.
    assert cfg.train.max_iter == (4488 if run.distilled else 8976) == cfg.lr_multiplier.scheduler.num_updates
    assert instantiate(cfg.lr_multiplier)(0.5) == pytest.approx(1.0)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("gkd_")])
def test_the_teacher_is_the_one_of_the_folder(name, read):
    cfg = read(name)
    teacher = LazyRun(cfg).teacher()
    assert teacher.spec.file.endswith(".py") and teacher.spec.train_sets == ("kitti_train",)
    assert teacher.spec.classes[1] == 3
    own = read(f"teachers/{teacher.spec.file.rpartition('/')[2][:-3]}")
    assert teacher.weights == f"{own.train.output_dir}/model_final.pth"
    ours, theirs = (OmegaConf.to_container(model, resolve=True) for model in (cfg.model.teacher, own.model))
    if name == "gkd_frcnn_vitdet_kitti":
        assert (ours["backbone"].pop("square_pad"), theirs["backbone"].pop("square_pad")) == (0, 1248)
        assert (teacher.spec.image_format, LazyRun(cfg).student.image_format) == ("RGB", "BGR")
    assert str(ours) == str(theirs)


def test_retinanet_is_trained_as_by_yaml(read):
    cfg, yacs = read("gkd_retinanet_kitti"), read_config("configs/gkd_retinanet_kitti.yaml", [])
    clipping = yacs.SOLVER.CLIP_GRADIENTS
    assert (cfg.optimizer.lr, cfg.train.max_iter, cfg.train.seed) == (
        yacs.SOLVER.BASE_LR,
        yacs.SOLVER.MAX_ITER,
        yacs.SEED,
    )
    assert dict(cfg.train.clip_gradients) == {key.lower(): value for key, value in clipping.items()}
    assert cfg.dataloader.train.total_batch_size == yacs.SOLVER.IMS_PER_BATCH
    assert tuple(cfg.lr_multiplier.scheduler.milestones) == yacs.SOLVER.STEPS
    assert cfg.model.init_from_teacher == yacs.GKD.STUDENT.INIT_FROM_TEACHER
    student = instantiate(cfg.model.student)
    assert (
        sum(p.numel() for p in student.parameters()) > 3e7 and student.num_classes == yacs.MODEL.RETINANET.NUM_CLASSES
    )
