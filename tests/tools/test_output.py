"""Tools whose results can't be written say so before any work, and leave nothing behind."""

import pytest

STUDENT = ("--config-file", "student.yaml")
TRAIN = ("train_net.py", *STUDENT, "--num-gpus", 0)
TOOLS = {
    "train": (*TRAIN, "OUTPUT_DIR"),
    "evaluate": (*TRAIN, "--eval-only", "MODEL.WEIGHTS", "teacher.pth", "OUTPUT_DIR"),
    "compare": ("compare_runs.py", "run", "--output"),
    "export": ("export_student.py", "--weights", "teacher.pth", *STUDENT, "--output"),
    "visualize": ("visualize_gkd.py", *STUDENT, "--output"),
    "visualize, default": ("visualize_gkd.py", *STUDENT, "OUTPUT_DIR"),
    "study": ("run_study.py", "study.yaml", "--output"),
    "study, report": ("run_study.py", "study.yaml", "--report-only", "--report"),
    "toy": ("make_toy_kitti.py", "--train", 1, "--val", 1, "--output"),
    "traffic": ("prepare_coco_traffic.py", "--annotations", ".", "--output"),
    "kitti": ("prepare_kitti.py", "--root", ".", "--coco"),
    "kitti, benchmark": ("evaluate_kitti.py", "--labels", ".", "--results", ".", "--json"),
    "step": ("benchmark_step.py", *STUDENT, "--json"),
    "losses": ("benchmark_losses.py", "--device", "cpu", "--json"),
    "demo": ("demo.py", "--output"),
}


@pytest.mark.parametrize("place", ["file/below", "/proc/below"])
@pytest.mark.parametrize("tool", TOOLS)
def test_a_sentence_before_any_work(tool, place, distiller_config, run_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = distiller_config("retinanet")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy_kitti_train",), ("toy_kitti_val",)
    (tmp_path / "student.yaml").write_text(cfg.dump())
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    name, *arguments = TOOLS[tool]
    status, said = run_here(name, *arguments, place if tool != "study, report" else f"{place}/report.md")
    # argparse ends with 2 where an option is at fault.
    assert status == (2 if name.startswith("benchmark") else 1) and "Traceback" not in said
    assert "/proc" in said if place.startswith("/proc") else "file is a file" in said or "no folder file" in said
    assert sorted(tmp_path.rglob("*")) == before
