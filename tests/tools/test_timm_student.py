"""A small student on a backbone of timm, trained by the command line from the start to its evaluation."""

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from tiny import calm

from gkd_d2.config import read_config, teacher_config

timm = pytest.importorskip("timm")

STUDENT = """
_BASE_: {base}
MODEL:
  BACKBONE:
    NAME: build_retinanet_timm_fpn_backbone
  TIMM:
    NAME: mobilenetv2_050
    WEIGHTS: start.pth
  # Detectron2's default, in place of that of the toy configs.
  PIXEL_STD: [1.0, 1.0, 1.0]
INPUT:
  FORMAT: RGB
"""


def test_training_resume_and_evaluation(project, toy_scenes, run_here, tmp_path, monkeypatch):
    """The file that the backbone starts with is needed at the start alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student.yaml").write_text(STUDENT.format(base=project / "configs" / "toy" / "gkd_retinanet.yaml"))
    torch.manual_seed(0)
    start = timm.create_model("mobilenetv2_050").state_dict()
    cfg = read_config("student.yaml", ["GKD.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth"), "MODEL.DEVICE", "cpu"])
    torch.save({"model": calm(build_model(teacher_config(cfg))).state_dict()}, "teacher.pth")

    def run(*arguments, iterations=2):
        options = (
            "GKD.TEACHER.WEIGHTS teacher.pth MODEL.DEVICE cpu SOLVER.STEPS () SOLVER.IMS_PER_BATCH 2 OUTPUT_DIR out"
        )
        size = "INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 TEST.EVAL_PERIOD 100"
        return run_here(
            "train_net.py",
            *("--num-gpus", 0, "--config-file", "student.yaml"),
            *arguments,
            *(*options.split(), *size.split(), "SOLVER.MAX_ITER", iterations),
        )

    status, printed = run()
    assert status == 1
    assert printed.splitlines()[-2:] == [
        "This run can't start:",
        f"- MODEL.TIMM.WEIGHTS is start.pth: there is no such file in the working folder, {tmp_path}",
    ]
    assert not (tmp_path / "out").exists()

    torch.save(start, "start.pth")
    status, printed = run()
    assert status == 0, printed[-3000:]
    # Its frozen parts hold what the file holds, and are no random ones.
    assert "keep random weights" not in printed
    assert "which without weights does not normalize" not in printed
    state = torch.load("out/model_final.pth")["model"]
    prefix = "backbone.bottom_up.network."
    frozen = [name for name in start if name.startswith(("conv_stem", "bn1", "blocks.0.", "blocks.1."))]
    assert len(frozen) > 30
    assert all(torch.equal(start[name], state[prefix + name]) for name in frozen if "num_batches" not in name)
    assert not torch.equal(start["blocks.6.0.conv_pw.weight"], state[prefix + "blocks.6.0.conv_pw.weight"])
    # What was settled at the reading is written down.
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["MODEL"]
    assert written["PIXEL_MEAN"] == pytest.approx([123.675, 116.28, 103.53])
    assert written["TIMM"]["WEIGHTS"] == "start.pth"

    (tmp_path / "start.pth").unlink()
    status, printed = run("--resume", iterations=4)
    assert status == 0, printed[-3000:]
    checkpoint = torch.load("out/model_final.pth")
    assert checkpoint["iteration"] == 3
    assert all(
        torch.equal(start[name], checkpoint["model"][prefix + name]) for name in frozen if "num_batches" not in name
    )
    assert "the resumed run differs from the one before: SOLVER.MAX_ITER was 2 and is 4" in printed
    status, printed = run("--eval-only", "MODEL.WEIGHTS", "out/model_final.pth")
    assert status == 0, printed[-3000:]
    assert "copypaste: AP,AP50" in printed
    # Nor do tools that look at the trained student need it.
    settings = ("GKD.TEACHER.WEIGHTS", "teacher.pth", "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", 64)
    options = ("--config-file", "student.yaml", "--count", 1, "--output", "pictures")
    status, printed = run_here("visualize_gkd.py", *options, "MODEL.WEIGHTS", "out/model_final.pth", *settings)
    assert status == 0, printed[-3000:]
    assert "random" not in printed
