"""The data that a study makes for its trainings."""

import pytest

from gkd_d2.analysis.study.processes import prepare_data, study_environment


def test_the_data_are_made_where_the_trainings_look_for_them(make_study, tmp_path):
    study = make_study(prepare=["make_toy_kitti.py", "--train", 2, "--val", 1])
    prepare_data(study)
    assert study_environment(study)["DETECTRON2_DATASETS"] == str(tmp_path / "small" / "datasets")
    assert len(list((tmp_path / "small" / "datasets" / "toy_kitti").rglob("*.png"))) == 3


def test_a_tool_that_can_not_make_the_data_is_quoted(make_study):
    study = make_study(prepare=["make_toy_kitti.py", "--train", 0])
    with pytest.raises(ValueError, match=r"make_toy_kitti.py --train 0 failed:\n(?s:.)*num_train is 0"):
        prepare_data(study)
