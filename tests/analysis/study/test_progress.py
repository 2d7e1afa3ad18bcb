"""What is told of a study's trainings while they run."""

from types import SimpleNamespace

from gkd_d2.analysis.study import progress
from gkd_d2.analysis.study.progress import Progress


def test_the_time_left_follows_the_iterations(tuned_study, finish, monkeypatch):
    """A teacher of 400 iterations is finished, eight students of 200 are not; two are trained in 10 minutes."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    teacher, alone = tuned_study.teacher_job("retinanet"), tuned_study.student_jobs("retinanet", "alone")
    tuning = [jobs[0] for jobs in tuned_study.tuning_jobs("retinanet", "gkd").values()]
    # The weights of the others are not chosen yet.
    assert tuned_study.jobs() == [teacher, *alone.values(), *tuning]
    assert tuned_study.lengths() == [400, *[200] * 8]

    finish(teacher, 20.0)
    done = Progress(tuned_study)
    for job, ap in zip(tuning, (12.0, 34.56)):
        finish(job, ap)
    now[0] += 600
    # It had been interrupted after the first 100 of its iterations.
    assert done.ended(tuning[0], 100) == "2 of 9, AP 12.0, 2 h 20 min left"
    assert done.ended(tuning[1], 200) == "3 of 9, AP 34.6, 40 min left"
