"""The trainings of a study, and the scale that tuning chooses."""

import math
from pathlib import Path

import pytest

from gkd_d2.config import config_differences, read_config
from gkd_d2.methods import build_method

# Of each method, what a scale multiplies.
LOSSES = [f"GKD.LOSS_WEIGHTS.{name}" for name in ("GRADIENT", "BOX", "ATTENTION", "IMAGE")]
WEIGHTS = {
    "gkd": LOSSES,
    "fitnet": ["GKD.FITNET.WEIGHT"],
    "fgfi": ["GKD.FGFI.WEIGHT"],
    "fgd": [f"GKD.FGD.{name}_WEIGHT" for name in ("FOREGROUND", "BACKGROUND", "ATTENTION", "RELATION")],
    "pkd": ["GKD.PKD.WEIGHT"],
    "gkd + fitnet": [*LOSSES, "GKD.FITNET.WEIGHT"],
}
PLACE = ("OUTPUT_DIR", "SEED", "GKD.TEACHER.WEIGHTS")


def value(cfg, key):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.parametrize("method", WEIGHTS)
def test_a_scale_multiplies_the_weights_of_the_method_and_changes_nothing_else(method, make_study, small_study):
    # A key that has a weight by default, and one that has none.
    options = {"GKD.METHODS": method.split(" + "), "GKD.LOSS_WEIGHTS.BOX": 0.003, "GKD.LOSS_WEIGHTS.ATTENTION": 0.004}
    study = make_study(beside={"other": {"options": options, "scale": 5}})
    job = study.student_jobs("retinanet", "other")[1]
    opts = [str(part) for pair in options.items() for part in pair]
    unscaled = read_config(small_study["detectors"]["retinanet"]["config"], opts)
    expected = {key: (5 * value(unscaled, key), value(unscaled, key)) for key in WEIGHTS[method]}
    assert config_differences(job.config, unscaled, PLACE) == expected
    assert all(there > 0 for _, there in expected.values())


@pytest.mark.parametrize("method", WEIGHTS)
def test_under_calibrate_a_scale_multiplies_the_ratios(method, make_study, small_study):
    options = {"GKD.METHODS": method.split(" + "), "GKD.BALANCE": "calibrate"}
    if "gkd" in method:
        options |= {"GKD.RATIOS.BOX": 0.5, "GKD.RATIOS.IMAGE": 0}
    study = make_study(beside={"other": {"options": options, "tune": True}})
    before = build_method(study.student_config("retinanet", "other")).terms
    jobs = {scale: jobs[0] for scale, jobs in study.tuning_jobs("retinanet", "other").items()}
    assert list(jobs) == [0.2, 1, 5]
    for scale, job in jobs.items():
        after = build_method(job.config).terms
        assert {key: term.ratio for key, term in after.items()} == {
            key: pytest.approx(scale * term.ratio) for key, term in before.items()
        }
        unscaled = study.student_config("retinanet", "other")
        changed = config_differences(job.config, unscaled, PLACE)
        # At 1 the config is the one that is written.
        assert set(changed) <= {term.ratio_key for term in before.values()} and bool(changed) == (scale != 1)
    if "gkd" in method:
        assert build_method(jobs[5].config).terms["loss_bmfi_box"].ratio == 2.5
        assert build_method(jobs[5].config).terms["loss_bmfi_image"].ratio == 0


def test_a_weight_of_0_stays_0(make_study):
    options = {key: 0.0 for key in LOSSES[1:]}
    study = make_study(beside={"gradient": {"options": options, "scale": 0.2}})
    cfg = study.student_jobs("retinanet", "gradient")[1].config
    assert [value(cfg, key) for key in LOSSES] == [pytest.approx(0.2 * 0.002), 0, 0, 0]


def test_a_training_has_its_folder_seed_and_teacher(make_study, tmp_path):
    study = make_study()
    jobs = study.student_jobs("retinanet", "alone")
    assert list(jobs) == [1, 2, 3]
    assert jobs[2].folder == tmp_path / "small" / "retinanet" / "alone" / "weights_x1" / "seed_2"
    assert jobs[2].config.OUTPUT_DIR == str(jobs[2].folder)
    assert jobs[2].config.SEED == 2
    teacher = study.teacher_job("retinanet")
    assert teacher.folder == tmp_path / "small" / "retinanet" / "teacher"
    assert jobs[2].config.GKD.TEACHER.WEIGHTS == str(teacher.folder / "model_final.pth")
    tuning = study.tuning_jobs("retinanet", "gkd")
    assert [job.folder.relative_to(tmp_path / "small" / "retinanet" / "gkd") for job in tuning[0.2]] == [
        Path("weights_x0.2/seed_101"),
        Path("weights_x0.2/seed_102"),
    ]


def test_options_of_a_setting_win_over_the_studys_and_those_over_the_detectors(make_study, small_study):
    detector = small_study["detectors"]["retinanet"] | {
        "options": {"GKD.STUDENT.INIT_FROM_TEACHER": False, "SOLVER.MAX_ITER": 7, "SOLVER.BASE_LR": 0.5}
    }
    heads = {"options": {"GKD.METHOD": "none", "GKD.STUDENT.INIT_FROM_TEACHER": True}}
    study = make_study(detectors={"retinanet": detector}, options={"SOLVER.MAX_ITER": 9}, beside={"heads": heads})
    found = {name: study.student_jobs("retinanet", name)[1].config for name in ("alone", "heads")}
    assert [found[name].GKD.STUDENT.INIT_FROM_TEACHER for name in found] == [False, True]
    assert [found[name].SOLVER.MAX_ITER for name in found] == [9, 9]
    assert [found[name].SOLVER.BASE_LR for name in found] == [0.5, 0.5]


def test_the_scale_of_the_highest_mean_is_chosen_and_no_detection_counts_as_0(make_study, finish):
    half = {"scale_of": "gkd", "scale": 0.5}
    study = make_study(beside={"gkd": {"tune": True}, "half": half})
    # Means 15, (0 + 29) / 2 = 14.5 and 14; 29 where the first were left out.
    for scale, values in {0.2: (10, 20), 1: (math.nan, 29), 5: (14, 14)}.items():
        assert study.scale("retinanet", "gkd") is None
        assert study.student_jobs("retinanet", "half") == {}
        for job, ap in zip(study.tuning_jobs("retinanet", "gkd")[scale], values):
            finish(job, ap)
    assert study.scale("retinanet", "gkd") == 0.2
    assert study.scale("retinanet", "half") == pytest.approx(0.1)
    assert study.scale("retinanet", "alone") == 1
    job = study.student_jobs("retinanet", "half")[3]
    assert job.folder.parts[-3:] == ("half", "weights_x0.1", "seed_3")
    # The config's own is 0.002.
    assert job.config.GKD.LOSS_WEIGHTS.GRADIENT == pytest.approx(0.0002)
