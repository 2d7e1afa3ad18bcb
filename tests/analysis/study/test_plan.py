"""Studies read from their files, their trainings, and the scale that tuning chooses."""

import json
import math
from pathlib import Path

import pytest
import yaml

from gkd_d2.analysis.study.plan import read_study
from gkd_d2.config import config_differences, read_config

# Of each method, what a scale multiplies.
LOSSES = [f"GKD.LOSS_WEIGHTS.{name}" for name in ("GRADIENT", "BOX", "ATTENTION", "IMAGE")]
WEIGHTS = {
    "gkd": LOSSES,
    "fitnet": ["GKD.FITNET.WEIGHT"],
    "fgfi": ["GKD.FGFI.WEIGHT"],
    "fgd": ["GKD.FGD.FOREGROUND_WEIGHT", "GKD.FGD.BACKGROUND_WEIGHT", "GKD.FGD.ATTENTION_WEIGHT"],
    "pkd": ["GKD.PKD.WEIGHT"],
}
PLACE = ("OUTPUT_DIR", "SEED", "GKD.TEACHER.WEIGHTS")
ALONE = {"options": {"GKD.METHOD": "none"}}


def value(cfg, key):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.parametrize("method", WEIGHTS)
def test_a_scale_multiplies_the_weights_of_the_method_and_changes_nothing_else(method, make_study, small_study):
    # A key that has a weight by default, and one that has none.
    options = {"GKD.METHOD": method, "GKD.LOSS_WEIGHTS.BOX": 0.003, "GKD.LOSS_WEIGHTS.ATTENTION": 0.004}
    study = make_study(settings={"alone": ALONE, "other": {"options": options, "scale": 5}})
    job = study.student_jobs("retinanet", "other")[1]
    opts = [str(part) for pair in options.items() for part in pair]
    unscaled = read_config(small_study["detectors"]["retinanet"]["config"], opts)
    expected = {key: (5 * value(unscaled, key), value(unscaled, key)) for key in WEIGHTS[method]}
    assert config_differences(job.config, unscaled, PLACE) == expected
    assert all(there > 0 for _, there in expected.values())


def test_a_weight_of_0_stays_0(make_study):
    options = {key: 0.0 for key in LOSSES[1:]}
    study = make_study(settings={"alone": ALONE, "gradient": {"options": options, "scale": 0.2}})
    cfg = study.student_jobs("retinanet", "gradient")[1].config
    assert [value(cfg, key) for key in LOSSES] == [pytest.approx(0.2 * 0.02), 0, 0, 0]


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
    study = make_study(
        detectors={"retinanet": detector}, options={"SOLVER.MAX_ITER": 9}, settings={"alone": ALONE, "heads": heads}
    )
    found = {name: study.student_jobs("retinanet", name)[1].config for name in ("alone", "heads")}
    assert [found[name].GKD.STUDENT.INIT_FROM_TEACHER for name in found] == [False, True]
    assert [found[name].SOLVER.MAX_ITER for name in found] == [9, 9]
    assert [found[name].SOLVER.BASE_LR for name in found] == [0.5, 0.5]


def test_the_scale_of_the_highest_mean_is_chosen_and_no_detection_counts_as_0(make_study, finish):
    half = {"scale_of": "gkd", "scale": 0.5}
    study = make_study(settings={"alone": ALONE, "gkd": {"tune": True}, "half": half})
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
    # The config's own is 0.02.
    assert job.config.GKD.LOSS_WEIGHTS.GRADIENT == pytest.approx(0.002)


def test_a_training_is_finished_with_its_last_iteration_and_its_evaluation(make_study, finish):
    job = make_study().student_jobs("retinanet", "alone")[1]
    assert job.finished() is None
    finish(job, 20.0)
    metrics, final = job.folder / "metrics.json", job.folder / "model_final.pth"
    whole = metrics.read_text()
    row = json.loads(whole)
    for missing in ({"bbox/AP": None}, {"iteration": 198}):
        kept = {key: number for key, number in (row | missing).items() if number is not None}
        metrics.write_text(json.dumps(kept) + "\n")
        assert job.finished() is None
    metrics.write_text(whole)
    final.unlink()
    assert job.finished() is None
    final.touch()
    assert job.finished().folder == job.folder
    assert job.metrics() == {"bbox/AP": 20.0, "bbox/AP50": 40.0}


def test_a_folder_of_another_training_is_refused(make_study, finish):
    finish(make_study().student_jobs("retinanet", "alone")[2], 20.0)
    changed = make_study(options={"SOLVER.BASE_LR": 0.01})
    with pytest.raises(ValueError, match=r"seed_2 holds a training .* SOLVER.BASE_LR 0.02 there, 0.01 here") as error:
        changed.check_folders()
    assert "--output" in str(error.value)
    # What stops and resumes a training does not make it another.
    make_study(options={"SOLVER.CHECKPOINT_PERIOD": 10, "DATALOADER.NUM_WORKERS": 3}).check_folders()


def test_a_weight_that_differs_by_rounding_is_the_same_training(make_study, finish):
    def job(weight, scale):
        other = {"options": {"GKD.METHOD": "fitnet", "GKD.FITNET.WEIGHT": weight}, "scale": scale}
        return make_study(settings={"alone": ALONE, "other": other}).student_jobs("retinanet", "other")[1]

    scaled, written = job(0.1, 0.2), job(0.02, 1)
    assert scaled.config.GKD.FITNET.WEIGHT != written.config.GKD.FITNET.WEIGHT
    finish(scaled, 20.0)
    scaled.folder.parent.rename(written.folder.parent)
    assert written.finished()


def test_a_teacher_stays_when_the_defaults_of_distillation_change(make_study, finish):
    job = make_study().teacher_job("retinanet")
    finish(job, 60.0)
    path = job.folder / "config.yaml"
    path.write_text(path.read_text().replace("TEMPERATURE: 0.5", "TEMPERATURE: 0.75"))
    assert "TEMPERATURE: 0.75" in path.read_text()
    assert make_study().teacher_job("retinanet").finished()


def test_an_attempt_that_left_no_checkpoint_is_no_training(make_study, finish):
    job = make_study().student_jobs("retinanet", "alone")[2]
    finish(job, 20.0)
    for name in ("last_checkpoint", "model_final.pth"):
        (job.folder / name).unlink()
    changed = make_study(options={"SOLVER.BASE_LR": 0.01})
    changed.check_folders()
    assert changed.student_jobs("retinanet", "alone")[2].finished() is None


def test_a_damaged_line_of_metrics_is_left_out(make_study, finish, caplog):
    study = make_study()
    job = study.student_jobs("retinanet", "alone")[1]
    finish(job, 20.0)
    with (job.folder / "metrics.json").open("a") as file:
        file.write('{"iteration": 1')
    study.check_folders()
    assert job.finished() and caplog.messages == [f"{job.folder}/metrics.json: left out 1 damaged line, number 2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"detectors": {}}, "detectors is empty"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": 3}, "seeds is 3, but must be a list"),
        ({"seeds": [1, 1.5]}, r"seeds\[1\] is 1.5, but must be a whole number"),
        ({"seeds": [1, True]}, r"seeds\[1\] is True, but must be a whole number"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\], but must be different numbers >= 0"),
        ({"seeds": [-1]}, r"seeds is \[-1\], but must be different numbers >= 0"),
        ({"seeds": [101, 1]}, "tuning.seeds: 101 is one of the reported seeds, too"),
        ({"title": None}, "title is None, but must be text"),
        ({"tuning": None}, "a setting is to be tuned, but tuning.seeds or tuning.scales is empty"),
        ({"tuning": {"seeds": [7], "scales": ["1e-3"]}}, r"tuning.scales\[0\] is '1e-3', but .* such as 1.0e-3"),
        ({"tuning": {"seeds": [7], "scales": [0]}}, r"tuning.scales is \[0\], but must be different numbers > 0"),
        ({"tuning": {"seed": [7]}}, "tuning: unknown key seed; there are seeds, scales"),
        ({"setings": {}}, "unknown key setings; there are title, dataset, detectors, settings, seeds"),
        ({"dataset": "kitti_val"}, "dataset is kitti_val, but .* is evaluated on toy_kitti_val"),
        ({"settings": {"alone": "none"}}, "settings.alone: there must be keys and values, but there is 'none'"),
        ({"settings": {"a/b": {}}}, "'a/b' is no name of a folder"),
        ({"settings": {"..": {}}}, r"'\.\.' is no name of a folder"),
        ({"settings": {"teacher": {}}}, "'teacher' is no name of a folder"),
        ({"settings": {False: {}}}, "settings: the key False is no text for YAML: put it in quotes"),
        ({"settings": {"alone": {"detectors": ["retinanet"]}}}, "settings.alone.detectors: the first setting is the"),
        ({"settings": {"alone": {}, "x": {"tune": "on"}}}, "settings.x.tune is 'on', but must be true or false"),
        ({"settings": {"alone": {}, "x": {"weight": 1}}}, "settings.x: unknown key weight; there are options, tune"),
        ({"settings": {"alone": {}, "x": {"scale_of": "y"}}}, "settings.x.scale_of: there is no setting y"),
        ({"settings": {"alone": {}, "x": {"scale_of": "alone"}}}, "settings.x.scale_of: alone is not tuned"),
        ({"settings": {"alone": {}, "x": {"baseline": "y"}}}, "settings.x.baseline: there is no setting y"),
        ({"settings": {"alone": {}, "x": {"detectors": ["y"]}}}, "settings.x.detectors: there is no detector y"),
        ({"settings": {"alone": {}, "x": {"scale": -1}}}, "settings.x.scale is -1, but must be > 0"),
        ({"settings": {"alone": ALONE | {"scale": 2}}}, "settings.alone of retinanet: the method none has no weights"),
        (
            {"settings": {"alone": ALONE | {"tune": True}}},
            "settings.alone of retinanet: the method none has no weights",
        ),
        ({"options": {"SOLVER.EPOCHS": 1}}, "settings.alone of retinanet: there is no config key 'SOLVER.EPOCHS'"),
        ({"options": {"SOLVER.MAX_ITER": "many"}}, "settings.alone of retinanet: .*SOLVER.MAX_ITER"),
        ({"options": {"GKD.METHOD": "gdk"}}, "settings.gkd of retinanet: GKD.METHOD is 'gdk', which is not registered"),
        ({"options": {"SEED": 1}}, "options: SEED is given to each training by the study itself"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(changes, message, make_study):
    with pytest.raises(ValueError, match=rf"small.yaml: {message}"):
        make_study(**changes)


def test_a_setting_for_fewer_detectors_gives_others_no_scale_and_no_baseline(make_study, small_study):
    detectors = small_study["detectors"] | {"other": small_study["detectors"]["retinanet"]}
    gkd = {"tune": True, "detectors": ["other"]}
    for field in ("scale_of", "baseline"):
        message = f"settings.x.{field}: gkd is not for the detector retinanet, but x is"
        with pytest.raises(ValueError, match=message):
            make_study(detectors=detectors, settings={"alone": ALONE, "gkd": gkd, "x": {field: "gkd"}})
    study = make_study(
        detectors=detectors,
        settings={"alone": ALONE, "gkd": gkd, "x": {"scale_of": "gkd", "detectors": ["other"]}},
    )
    assert list(study.settings_of("retinanet")) == ["alone"]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"teacher": None}, "detectors.retinanet.teacher: the key config is missing"),
        ({"config": "absent.yaml"}, "detectors.retinanet: absent.yaml is no file: name configs relative to"),
        ({"options": {"OUTPUT_DIR": "x"}}, "detectors.retinanet.options: OUTPUT_DIR is given to each training"),
    ],
)
def test_what_is_wrong_with_a_detector_is_said(field, message, make_study, small_study):
    with pytest.raises(ValueError, match=message):
        make_study(detectors={"retinanet": small_study["detectors"]["retinanet"] | field})


def test_a_detector_needs_a_teacher_and_a_distiller(make_study, small_study):
    pair = small_study["detectors"]["retinanet"]
    with pytest.raises(ValueError, match="small.yaml: detectors.retinanet: the key teacher is missing"):
        make_study(detectors={"retinanet": {"config": pair["config"]}})
    with pytest.raises(ValueError, match="MODEL.META_ARCHITECTURE of .*retinanet.yaml must be GKDDistiller"):
        make_study(detectors={"retinanet": pair | {"config": pair["teacher"]["config"]}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the key title is missing"),
        ("- a\n", r"there must be keys and values, but there is \['a'\]"),
        ("title: [\n", "line 2, column 1"),
        (b"title: \xff\n", "invalid start byte"),
    ],
)
def test_a_file_that_is_no_study_is_named(text, message, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_study(path, tmp_path)
    assert str(error.value).startswith(f"{path}: ")


def test_the_projects_studies_can_be_read(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    files = sorted(Path("configs/studies").glob("*.yaml"))
    assert files
    for file in files:
        study = read_study(file, tmp_path)
        for name in yaml.safe_load(file.read_text())["settings"]:
            assert name in study.settings
        study.check_folders()


def test_a_study_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text("title: Mine\ndataset: !!python/object/apply:os.mkdir [hacked]\n")
    with pytest.raises(ValueError, match=r"mine.yaml: line 2: the tag !!python/object/apply:os.mkdir is not read"):
        read_study(path, tmp_path / "out")
    path.write_text("title: [")
    with pytest.raises(ValueError, match=r"mine.yaml: while parsing a flow"):
        read_study(path, tmp_path / "out")
    assert not (tmp_path / "hacked").exists()
