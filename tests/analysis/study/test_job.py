"""What a training left in its folder, and whose training it is."""

import json

import pytest


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


def test_a_weight_that_differs_by_rounding_is_the_same_training(make_study, finish):
    def job(weight, scale):
        other = {"options": {"GKD.METHOD": "fitnet", "GKD.FITNET.WEIGHT": weight}, "scale": scale}
        return make_study(beside={"other": other}).student_jobs("retinanet", "other")[1]

    scaled, written = job(0.1, 0.2), job(0.02, 1)
    assert scaled.config.GKD.FITNET.WEIGHT != written.config.GKD.FITNET.WEIGHT
    finish(scaled, 20.0)
    scaled.folder.parent.rename(written.folder.parent)
    assert written.finished()


def test_a_folder_is_that_of_its_methods(make_study, finish):
    def job(*methods):
        other = {"options": {"GKD.METHODS": list(methods)}}
        return make_study(beside={"other": other}).student_jobs("retinanet", "other")[1]

    both = job("gkd", "fitnet")
    assert both.config.GKD.METHODS == ["gkd", "fitnet"]
    finish(both, 20.0)
    assert job("gkd", "fitnet").finished()
    with pytest.raises(ValueError, match=r"GKD.METHODS \['gkd', 'fitnet'\] there, \['gkd', 'pkd'\] here"):
        job("gkd", "pkd").finished()


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


def test_a_folder_of_another_training_is_refused(make_study, finish):
    finish(make_study().student_jobs("retinanet", "alone")[2], 20.0)
    changed = make_study(options={"SOLVER.BASE_LR": 0.01})
    with pytest.raises(ValueError, match=r"seed_2 holds a training .* SOLVER.BASE_LR 0.02 there, 0.01 here") as error:
        changed.check_folders()
    assert "--output" in str(error.value)
    # What stops and resumes a training does not make it another.
    make_study(options={"SOLVER.CHECKPOINT_PERIOD": 10, "DATALOADER.NUM_WORKERS": 3}).check_folders()
