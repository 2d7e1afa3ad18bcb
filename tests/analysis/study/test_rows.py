"""What is there of a setting."""

import pytest

from gkd_d2.analysis.study.rows import read_rows


def test_damaged_costs_are_named(make_study, finish):
    study = make_study(beside={}, seeds=[1])
    job = study.student_jobs("retinanet", "alone")[1]
    finish(job, 1.0)
    for content in ('{"resident_mega', "3", "{}"):
        (job.folder / "study_cost.json").write_text(content)
        with pytest.raises(ValueError, match=r"study_cost.json is damaged .*: remove it"):
            read_rows(study, "retinanet")
