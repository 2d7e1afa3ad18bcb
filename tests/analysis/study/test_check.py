"""Studies whose values do not fit together."""

import pytest

ALONE = {"options": {"GKD.METHOD": "none"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"detectors": {}}, "detectors is empty"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\], but must be different numbers >= 0"),
        ({"seeds": [-1]}, r"seeds is \[-1\], but must be different numbers >= 0"),
        ({"seeds": [101, 1]}, "tuning.seeds: 101 is one of the reported seeds, too"),
        ({"tuning": None}, "a setting is to be tuned, but tuning.seeds or tuning.scales is empty"),
        ({"tuning": {"seeds": [7], "scales": [0]}}, r"tuning.scales is \[0\], but must be different numbers > 0"),
        ({"dataset": "kitti_val"}, "dataset is kitti_val, but .* is evaluated on toy_kitti_val"),
        ({"settings": {"a/b": {}}}, "'a/b' is no name of a folder"),
        ({"settings": {"..": {}}}, r"'\.\.' is no name of a folder"),
        ({"settings": {"teacher": {}}}, "'teacher' is no name of a folder"),
        ({"settings": {"alone": {"detectors": ["retinanet"]}}}, "settings.alone.detectors: the first setting is the"),
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
        (
            {"options": {"GKD.METHODS": ["gkd", "fitnet"]}},
            r"settings.alone of retinanet: GKD.METHOD is 'none', but GKD.METHODS is \['gkd', 'fitnet'\], which takes",
        ),
        (
            {"settings": {"alone": ALONE, "x": {"options": {"GKD.METHODS": ["gkd", "none"]}}}},
            "settings.x of retinanet: GKD.METHODS has none, which has no loss, beside gkd",
        ),
        (
            {"settings": {"alone": ALONE, "x": {"options": {"GKD.METHODS": ["gkd", "pkdd"]}}}},
            "settings.x of retinanet: GKD.METHODS names 'pkdd', which is not registered: did you mean pkd",
        ),
        ({"options": {"SEED": 1}}, "options: SEED is given to each training by the study itself"),
    ],
)
def test_what_does_not_fit_is_said_with_its_place(changes, message, make_study):
    with pytest.raises(ValueError, match=rf"small.yaml: {message}"):
        make_study(**changes)


def test_a_setting_for_fewer_detectors_gives_others_no_scale_and_no_baseline(make_study, small_study):
    detectors = small_study["detectors"] | {"other": small_study["detectors"]["retinanet"]}
    gkd = {"tune": True, "detectors": ["other"]}
    for field in ("scale_of", "baseline"):
        message = f"settings.x.{field}: gkd is not for the detector retinanet, but x is"
        with pytest.raises(ValueError, match=message):
            make_study(detectors=detectors, beside={"gkd": gkd, "x": {field: "gkd"}})
    study = make_study(
        detectors=detectors,
        beside={"gkd": gkd, "x": {"scale_of": "gkd", "detectors": ["other"]}},
    )
    assert list(study.settings_of("retinanet")) == ["alone"]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"config": "absent.yaml"}, "detectors.retinanet: absent.yaml is no file: name configs relative to"),
        ({"options": {"OUTPUT_DIR": "x"}}, "detectors.retinanet.options: OUTPUT_DIR is given to each training"),
    ],
)
def test_what_is_wrong_with_a_detector_is_said(field, message, make_study, small_study):
    with pytest.raises(ValueError, match=message):
        make_study(detectors={"retinanet": small_study["detectors"]["retinanet"] | field})


def test_a_detector_needs_a_distiller(make_study, small_study):
    pair = small_study["detectors"]["retinanet"]
    with pytest.raises(ValueError, match="MODEL.META_ARCHITECTURE of .*retinanet.yaml must be GKDDistiller"):
        make_study(detectors={"retinanet": pair | {"config": pair["teacher"]["config"]}})
