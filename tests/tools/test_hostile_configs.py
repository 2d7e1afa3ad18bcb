"""Configs that would run code are refused by every tool, wherever they are read."""

import pytest

HOSTILE = 'SEED: -1\nOUTPUT_DIR: !!python/object/apply:os.mkdir ["hacked"]\n'
PLAIN = ("--config-file", "student.yaml", "--num-gpus", 0)
PLACES = {
    "config": ("train_net.py", "--config-file", "hostile/config.yaml"),
    "base": ("train_net.py", "--config-file", "above.yaml"),
    "teacher": ("train_net.py", *PLAIN, "GKD.TEACHER.CONFIG_FILE", "hostile/config.yaml"),
    "resumed run": ("train_net.py", *PLAIN, "--resume", "OUTPUT_DIR", "hostile"),
    "compared run": ("compare_runs.py", "hostile", "--output", "comparison"),
    "exported run": ("export_student.py", "--weights", "hostile", "--output", "exported"),
    "study": ("run_study.py", "hostile/config.yaml"),
    "config of a study": ("run_study.py", "study.yaml"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_config_runs_no_code(place, distiller_config, toy_scenes, run_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = distiller_config("retinanet")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy_kitti_train",), ("toy_kitti_val",)
    cfg.SEED, cfg.SOLVER.IMS_PER_BATCH = -1, 2
    (tmp_path / "student.yaml").write_text(cfg.dump())
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile" / "config.yaml").write_text(HOSTILE)
    (tmp_path / "above.yaml").write_text("_BASE_: hostile/config.yaml\n")
    (tmp_path / "study.yaml").write_text(
        "{title: A, dataset: toy_kitti_val, seeds: [1], settings: {alone: {}},"
        " detectors: {a: {config: student.yaml, teacher: {config: above.yaml}}}}"
    )
    status, said = run_here(*PLACES[place])
    assert status == 1 and "Traceback" not in said
    assert "config.yaml" in said and "line 2: the tag !!python/object/apply:os.mkdir is not read" in said
    assert not (tmp_path / "hacked").exists()
