"""Studies read from their files, and from those that these are based on."""

from pathlib import Path

import pytest
import yaml

from gkd_d2.analysis.study.plan import Setting, Tuning
from gkd_d2.analysis.study.read import read_study


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 3}, "seeds is 3, but must be a list"),
        ({"seeds": [1, 1.5]}, r"seeds\[1\] is 1.5, but must be a whole number"),
        ({"seeds": [1, True]}, r"seeds\[1\] is True, but must be a whole number"),
        ({"title": None}, "title is None, but must be text"),
        ({"tuning": {"seeds": [7], "scales": ["1e-3"]}}, r"tuning.scales\[0\] is '1e-3', but .* such as 1.0e-3"),
        ({"tuning": {"seed": [7]}}, "tuning: unknown key seed; there are seeds, scales"),
        ({"setings": {}}, "unknown key setings; there are title, dataset, detectors, settings, seeds"),
        ({"settings": {"alone": "none"}}, "settings.alone: there must be keys and values, but there is 'none'"),
        ({"settings": {False: {}}}, "settings: the key False is no text for YAML: put it in quotes"),
        ({"settings": {"alone": {}, "x": {"tune": "on"}}}, "settings.x.tune is 'on', but must be true or false"),
        ({"settings": {"alone": {}, "x": {"weight": 1}}}, "settings.x: unknown key weight; there are options, tune"),
        ({"detectors": {"a": {"config": "a", "teacher": None}}}, "detectors.a.teacher: the key config is missing"),
        ({"detectors": {"a": {"config": "a"}}}, "detectors.a: the key teacher is missing"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(changes, message, make_study):
    with pytest.raises(ValueError, match=rf"small.yaml: {message}"):
        make_study(**changes)


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
    files = sorted(path for path in Path("configs/studies").glob("*.yaml") if not path.name.startswith("Base-"))
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


@pytest.fixture
def read_based(small_study, tmp_path):
    """A function that writes a base, that holds the small study, and a file that names it, and reads the latter."""

    def read(file: dict, base: dict):
        (tmp_path / "Base-Small.yaml").write_text(yaml.safe_dump(small_study | base, sort_keys=False))
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({"base": "Base-Small.yaml"} | file, sort_keys=False))
        return read_study(path, tmp_path / "mine")

    return read


def test_what_a_file_sets_wins_over_its_base(read_based, small_study):
    """Groups of keys are merged at every depth, lists are not."""
    study = read_based(
        {
            "seeds": [4],
            "tuning": {"scales": [2]},
            "options": {"SOLVER.MAX_ITER": 7, "SOLVER.CHECKPOINT_PERIOD": 3},
            "detectors": {"retinanet": {"teacher": {"options": {"SOLVER.MAX_ITER": 5}}}},
        },
        base={"options": {"SOLVER.MAX_ITER": 9, "SOLVER.BASE_LR": 0.5}, "prepare": ["make_toy_kitti.py", "--train", 4]},
    )
    assert (study.title, study.seeds) == ("Small", (4,))
    assert study.prepare == ("make_toy_kitti.py", "--train", 4)
    assert study.tuning == Tuning(seeds=(101, 102), scales=(2,))
    assert study.options == {"SOLVER.MAX_ITER": 7, "SOLVER.BASE_LR": 0.5, "SOLVER.CHECKPOINT_PERIOD": 3}
    pair = small_study["detectors"]["retinanet"]
    assert study.detectors["retinanet"].config == pair["config"]
    assert study.detectors["retinanet"].teacher.config == pair["teacher"]["config"]
    assert study.detectors["retinanet"].teacher.options == {"SOLVER.MAX_ITER": 5}
    assert study.settings == {"alone": Setting({"GKD.METHOD": "none"}), "gkd": Setting(tune=True)}


def test_detectors_of_a_file_follow_those_of_its_base(read_based, small_study):
    pair = small_study["detectors"]["retinanet"]
    assert list(read_based({"detectors": {"another": pair}}, base={}).detectors) == ["retinanet", "another"]


def test_settings_of_a_file_take_the_place_of_all_of_its_base(read_based):
    """In their order, and none of their keys comes from the base."""
    settings = {"heads": {"options": {"GKD.METHOD": "none"}}, "alone": {"scale_of": "gkd"}, "gkd": {"tune": True}}
    base = {
        "alone": {"options": {"GKD.METHOD": "none"}},
        "gkd": {"baseline": "alone", "options": {"GKD.WARMUP_ITERS": 5}},
        "pkd": {"options": {"GKD.METHOD": "pkd"}},
    }
    study = read_based({"settings": settings}, base={"settings": base})
    assert list(study.settings.items()) == [
        ("heads", Setting({"GKD.METHOD": "none"})),
        ("alone", Setting(scale_of="gkd")),
        ("gkd", Setting(tune=True)),
    ]


def test_an_empty_group_changes_nothing_of_its_base(read_based):
    study = read_based({"options": None, "tuning": {}}, base={"options": {"SOLVER.MAX_ITER": 9}})
    assert study.options == {"SOLVER.MAX_ITER": 9}
    assert study.tuning.seeds == (101, 102)


def test_a_base_has_a_base_relative_to_itself(small_study, make_study, tmp_path):
    """And need not be a study: what one of the three holds is there."""
    for name, content in {
        "mine/mine.yaml": {"base": "../shared/Base-Mine.yaml", "title": "Mine", "options": {"SOLVER.MAX_ITER": 3}},
        "shared/Base-Mine.yaml": {
            "base": "deep/Base-Deep.yaml",
            "options": {"SOLVER.MAX_ITER": 2, "SOLVER.GAMMA": 0.2},
        },
        "shared/deep/Base-Deep.yaml": {key: small_study[key] for key in small_study if key != "title"}
        | {"options": {"SOLVER.MAX_ITER": 1, "SOLVER.GAMMA": 0.1, "SOLVER.BASE_LR": 0.1}},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(yaml.safe_dump(content, sort_keys=False))
    options = {"SOLVER.MAX_ITER": 3, "SOLVER.GAMMA": 0.2, "SOLVER.BASE_LR": 0.1}
    study = read_study(tmp_path / "mine" / "mine.yaml", tmp_path / "small")
    assert study == make_study(title="Mine", options=options)


@pytest.mark.parametrize(
    ("file", "base", "message"),
    [
        ({}, {"setings": {}}, "Base-Small.yaml: unknown key setings; there are title, .*, tuning, base$"),
        ({"tuning": {"seeds": [7]}}, {"tuning": {"scales": ["x"]}}, r"Base-Small.yaml: tuning.scales\[0\] is 'x'"),
        ({"tuning": {"scales": ["x"]}}, {}, r"mine.yaml: tuning.scales\[0\] is 'x'"),
        ({"seeds": [1, 1]}, {}, r"mine.yaml: seeds is \[1, 1\]"),
        ({}, {"seeds": [1, 1]}, r"Base-Small.yaml: seeds is \[1, 1\]"),
        ({"options": {"SOLVER.MAX_ITER": 1}}, {"options": {"SEED": 1}}, "Base-Small.yaml: options: SEED is given"),
        ({"options": {"SEED": 1}}, {"options": {"SOLVER.MAX_ITER": 1}}, "mine.yaml: options: SEED is given"),
        ({"options": "x"}, {"options": {"SEED": 1}}, "mine.yaml: options: there must be keys and values"),
        ({"settings": None}, {}, "mine.yaml: settings is empty"),
        (
            {"settings": {"a": {}, "b": {"scale_of": "alone"}}},
            {},
            "mine.yaml: settings.b.scale_of: there is no setting",
        ),
        (
            {"detectors": {"retinanet": {"teacher": {"options": {}}}}},
            {"detectors": {"retinanet": {"config": "absent.yaml", "teacher": {"config": "a"}}}},
            "Base-Small.yaml: detectors.retinanet: absent.yaml is no file",
        ),
        # What both contribute to, and what neither holds.
        ({"seeds": [101]}, {}, "mine.yaml, based on .*Base-Small.yaml: tuning.seeds: 101 is one of the reported"),
        ({}, {"options": {"SOLVER.EPOCHS": 1}}, "mine.yaml, based on .*Base-Small.yaml: settings.alone of retinanet:"),
        ({"tunes": {}}, {}, "mine.yaml: unknown key tunes"),
        ({"base": 3}, {}, "mine.yaml: base is 3, but must be text"),
        ({"base": None}, {}, "mine.yaml: base is None, but must be text"),
        ({"base": "mine.yaml"}, {}, "mine.yaml: its base .*mine.yaml is based on it in turn"),
        ({}, {"base": "./mine.yaml"}, "Base-Small.yaml: its base .*mine.yaml is based on it in turn"),
        (
            {"base": "absent.yaml"},
            {},
            r"mine.yaml: its base \S+absent.yaml can't be read \(No such file or directory\)",
        ),
        ({}, {"base": ""}, r"Base-Small.yaml: its base \S+ can't be read \(Is a directory\)"),
    ],
)
def test_the_file_at_fault_is_named(file, base, message, read_based, tmp_path):
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{message}"):
        read_based(file, base)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", r"there must be keys and values, but there is \['a'\]"),
        ("title: [\n", "while parsing"),
        (b"title: \xff\n", "'utf-8' codec can't decode"),
        (
            "title: !!python/object/apply:os.mkdir [hacked]\n",
            "line 1: the tag !!python/object/apply:os.mkdir is not read",
        ),
    ],
)
def test_a_base_that_is_no_study_is_named(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: Base-Small.yaml\ntitle: Mine\n")
    (tmp_path / "Base-Small.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"^{tmp_path}/Base-Small.yaml: {message}"):
        read_study(path, tmp_path)


def test_keys_without_a_title_miss_it_in_both(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: Base-Small.yaml\nseeds: [1]\n")
    (tmp_path / "Base-Small.yaml").write_text("dataset: toy_kitti_val\n")
    with pytest.raises(ValueError, match=r"mine.yaml, based on .*Base-Small.yaml: the key title is missing"):
        read_study(tmp_path / "mine.yaml", tmp_path)


def test_values_within_themselves_end(tmp_path):
    for name in ("mine.yaml", "Base-Small.yaml"):
        (tmp_path / name).write_text("options: &all {all: *all}\n")
    with (tmp_path / "mine.yaml").open("a") as file:
        file.write("base: Base-Small.yaml\n")
    with pytest.raises(ValueError, match=r"mine.yaml, based on .*: there are values within values without end"):
        read_study(tmp_path / "mine.yaml", tmp_path)
