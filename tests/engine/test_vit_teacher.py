"""Students with a ResNet under a teacher with a ViT, where Detectron2 has it: trained, drawn and resumed."""

import copy
import logging

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny import train, training_batch

from gkd_d2.analysis.importance_maps import take_importance_picture
from gkd_d2.engine.hooks.pictures import take_picture
from gkd_d2.engine.trainer import Trainer
from gkd_d2.modeling.split import split_detector

pytest.importorskip("detectron2.modeling.backbone.vit", reason="this Detectron2 has no ViT")
pytest.importorskip("timm", reason="Detectron2's ViT needs timm, which is not installed")


def teacher(backbone="build_tiny_vit_backbone"):
    """Options of a teacher that was trained on RGB, where the student's images are BGR."""
    import tiny_vit

    return ("GKD.IMPORTS", [tiny_vit.__name__], "MODEL.BACKBONE.NAME", backbone, "INPUT.FORMAT", "RGB")


def of_18_layers(cfg):
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64


@pytest.mark.parametrize(
    ("kind", "change", "backbone", "size"),
    [
        ("mask", None, "build_tiny_vit_backbone", (96, 128)),
        ("mask", of_18_layers, "build_tiny_square_vit_backbone", (160, 160)),
        ("faster", of_18_layers, "build_tiny_vit_backbone", (96, 128)),
    ],
)
def test_a_student_learns_and_is_drawn(kind, change, backbone, size, distiller_config, caplog):
    cfg = distiller_config(kind, teacher_options=teacher(backbone), change=change, channels=8)
    distiller = build_model(cfg).train()
    # p6 is a pooled copy of p5 in both pyramids.
    assert distiller.student_features == distiller.teacher_features == ["p2", "p3", "p4", "p5"]
    assert split_detector(distiller.teacher).pooled_features() == {"p6"}
    batch = training_batch(masks=kind == "mask")
    before = copy.deepcopy(distiller.teacher.state_dict())
    with caplog.at_level(logging.INFO, "gkd_d2"):
        history = train(distiller, cfg, batch, 2)
    assert ("the teacher's backbone pads to a square of 160" in caplog.text) == (size == (160, 160))
    names = set(distiller.method.active())
    assert len(names) == 4 and all(0 < losses[name] < float("inf") for losses in history for name in names)
    assert all(torch.equal(value, before[name]) for name, value in distiller.teacher.state_dict().items())
    with EventStorage():
        seen = distiller.observe(batch, student_grad=True, teacher_grad=True).detached()
        taken, importances = take_picture(distiller, seen), take_importance_picture(distiller, seen)
    assert taken.padded_size == importances.padded_size == size
    assert all(level.teacher.any() and level.student.any() for level in taken.levels)
    assert all(level.maps["score"].values.any() for level in importances.levels)


def test_a_run_is_resumed_bit_for_bit_and_drawn(training, tmp_path, run_here, monkeypatch):
    cfg = training("faster", iterations=2, teacher_options=teacher(), change=of_18_layers)
    # Images of 60 x 150: the student pads them to 64 x 160, the teacher by itself leaves them.
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (60,), 60
    cfg.SOLVER.CHECKPOINT_PERIOD = cfg.GKD.VIS_PERIOD = 1
    output = tmp_path / "output"
    Trainer(cfg).train()
    whole = torch.load(output / "model_final.pth")["model"]
    (output / "model_final.pth").unlink()
    (output / "last_checkpoint").write_text("model_0000000.pth")
    again = Trainer(cfg)
    again.resume_or_load(resume=True)
    assert again.start_iter == 1
    again.train()
    resumed = torch.load(output / "model_final.pth")["model"]
    assert resumed.keys() == whole.keys() and all(torch.equal(value, whole[name]) for name, value in resumed.items())

    monkeypatch.chdir(tmp_path)
    cfg.DATASETS.TEST = ("toy_kitti_val",)
    (tmp_path / "distiller.yaml").write_text(cfg.dump())
    arguments = [
        "--config-file",
        tmp_path / "distiller.yaml",
        "--count",
        1,
        "MODEL.WEIGHTS",
        output / "model_final.pth",
    ]
    status, said = run_here("visualize_gkd.py", "--importance-report", *arguments)
    assert status == 0 and "1 of 1:" in said, said
