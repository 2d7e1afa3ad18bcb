"""Mistakes in config files and in arguments, and what no file may do."""

import re
from pathlib import Path

import detectron2
import pytest
import yaml
from config_files import read, write
from detectron2 import model_zoo
from detectron2.config import get_cfg

from gkd_d2.config import config_differences, teacher_config


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.BASE_LR"], "the config key SOLVER.BASE_LR has no value"),
        (["MODEL.WEIGHTS", "SOLVER.MAX_ITER", "3"], "the config key MODEL.WEIGHTS has no value"),
        (["SOLVER.BASELR", "1"], "there is no config key 'SOLVER.BASELR', did you mean SOLVER.BASE_LR?"),
        (["solver.base_lr", "1"], "there is no config key 'solver.base_lr', did you mean SOLVER.BASE_LR?"),
        (["BASE_LR", "1"], "there is no config key 'BASE_LR', did you mean SOLVER.BASE_LR?"),
        (["SOLVER.BASE_LR=1"], "there is no config key 'SOLVER.BASE_LR=1', did you mean SOLVER.BASE_LR?"),
        (["QQQQ", "1"], "there is no config key 'QQQQ'"),
        (["SOLVER.BASE_LR", "low"], "SOLVER.BASE_LR is 'low', but must be of the type float, such as 0.04"),
        (["SOLVER.STEPS", "30"], "SOLVER.STEPS is '30', but must be of the type tuple, such as (160,)"),
        (["SOLVER", "30"], "SOLVER is '30', but must be a group of keys"),
        (["SEED", "1", "--resume"], "the option --resume comes after KEY VALUE pairs"),
        (["SEED", "1", "--num-gpus", "2"], "the option --num-gpus comes after KEY VALUE pairs"),
    ],
)
def test_mistakes_in_pairs(project, opts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(project / "configs" / "toy" / "gkd_frcnn.yaml", *opts)


def test_pairs(project):
    cfg = read(project / "configs/toy/gkd_frcnn.yaml", "MODEL.WEIGHTS", "", "SEED", "-1", "SOLVER.STEPS", "(3, 4)")
    assert (cfg.MODEL.WEIGHTS, cfg.SEED, cfg.SOLVER.STEPS) == ("", -1, (3, 4))


# GKD.RATIOS and GKD.METHOD_OPTIONS may hold any key.
@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (["GKD.RATIOS.BOX", "0.3"], {"BOX": 0.3}),
        (["GKD.RATIOS.box", "1", "GKD.RATIOS.IMAGE", "1e-2"], {"box": 1, "IMAGE": 0.01}),
        # No default has a type: what was an integer may become another number.
        (["GKD.RATIOS.BOX", "1", "GKD.RATIOS.BOX", "0.3"], {"BOX": 0.3}),
        (["GKD.RATIOS.BOX", "0.3", "GKD.RATIOS.BOX", "1"], {"BOX": 1}),
        (["GKD.RATIOS.BOX", "{'A': [1, 'x']}", "GKD.RATIOS.BOX.A", "[2]"], {"BOX": {"A": [2]}}),
        # No YAML or Python, and so text.
        (["GKD.RATIOS.BOX", "[1"], {"BOX": "[1"}),
    ],
)
def test_keys_of_open_groups(opts, expected, project, tmp_path):
    for group in ("RATIOS", "METHOD_OPTIONS"):
        cfg = read(project / "configs/toy/gkd_frcnn.yaml", *(text.replace("RATIOS", group) for text in opts))
        assert cfg.GKD[group] == expected
        # As a run writes it.
        assert read(write(tmp_path / "dumped.yaml", cfg.dump())).GKD[group] == expected


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["GKD.RATIOS.BOX"], "the config key GKD.RATIOS.BOX has no value"),
        (["GKD.RATIOS.BOX", "GKD.RATIOS.IMAGE", "1"], "the config key GKD.RATIOS.BOX has no value"),
        (["GKD.RATIOS.BOX", "SEED", "1"], "the config key GKD.RATIOS.BOX has no value"),
        (["GKD.RATIOS.BOX=1", "SEED", "1"], "the config key GKD.RATIOS.BOX=1 has no value"),
        (["SEED", "GKD.RATIOS.BOX", "1"], "the config key SEED has no value"),
        (
            ["GKD.RATIOS", "{BOX: 1}"],
            "GKD.RATIOS is '{BOX: 1}', but must be a group of keys: set each by itself, as in GKD.RATIOS.NAME",
        ),
        (["GKD.RATIOS.BOX.X", "1"], "there is no config key 'GKD.RATIOS.BOX.X'"),
        (["GKD.RATIOS.", "1"], "there is no config key 'GKD.RATIOS.', did you mean GKD.RATIOS?"),
        (["GKD.RATIO.BOX", "1"], "there is no config key 'GKD.RATIO.BOX'"),
        (["GKD.RATIOS.BOX", "1j"], "GKD.RATIOS.BOX is '1j', but must be a number, a text, True"),
        (["GKD.RATIOS.BOX", "{1, 2}"], "GKD.RATIOS.BOX is '{1, 2}', but must be a number, a text, True"),
        (["GKD.RATIOS.BOX", "{'A': b'x'}"], "GKD.RATIOS.BOX is \"{'A': b'x'}\", but must be"),
        (["GKD.RATIOS.BOX", "..."], "GKD.RATIOS.BOX is '...', but must be"),
    ],
)
def test_mistakes_in_open_groups(opts, message, project):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(project / "configs" / "toy" / "gkd_frcnn.yaml", *opts)


def test_open_groups_in_files(tmp_path):
    write(tmp_path / "base.yaml", "GKD: {RATIOS: {BOX: 1, IMAGE: 0.5}}")
    above = write(tmp_path / "above.yaml", "_BASE_: base.yaml\nGKD: {RATIOS: {BOX: 0.3, gradient: 2}}")
    assert read(above, "GKD.RATIOS.IMAGE", "0").GKD.RATIOS == {"BOX": 0.3, "gradient": 2, "IMAGE": 0}
    with pytest.raises(ValueError, match="mine.yaml: GKD.RATIOS is 3, but must be a group of keys"):
        read(write(tmp_path / "mine.yaml", "GKD: {RATIOS: 3}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "SOLVER.BASE_LR: 1\n",
            "mine.yaml: 'SOLVER.BASE_LR' is written as on a command line: in a file, SOLVER: is followed by the rest, "
            "in the next line and indented",
        ),
        ("SOLVER:\n  BASELR: 1\n", "mine.yaml: there is no config key 'SOLVER.BASELR', did you mean SOLVER.BASE_LR?"),
        (
            "SOLVER:\n  BASE_LR: low\n",
            "mine.yaml: SOLVER.BASE_LR is 'low', but must be of the type float, such as 0.001",
        ),
        # YAML ends the value at the comma.
        ("SOLVER: {STEPS: (8,)}\n", "mine.yaml: SOLVER.STEPS is '(8', but must be of the type tuple, such as (30000,)"),
        ("SOLVER: 3\n", "mine.yaml: SOLVER is 3, but must be a group of keys"),
        ("SOLVER: [\n", "mine.yaml: while parsing a flow node"),
        ("a: b: c\n", "mine.yaml: mapping values are not allowed here"),
        ("", "mine.yaml: it must hold config keys and their values in YAML"),
        ("SOLVER\n", "mine.yaml: it must hold config keys and their values in YAML"),
    ],
)
def test_mistakes_in_files(distiller_config, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path / "mine.yaml")
    # A teacher's file is read in the same way.
    cfg = distiller_config("retinanet")
    cfg.GKD.TEACHER.CONFIG_FILE = str(tmp_path / "mine.yaml")
    with pytest.raises(ValueError, match=re.escape(message)):
        teacher_config(cfg)


def test_all_mistakes_are_named_with_the_file_that_holds_them(tmp_path):
    base = write(tmp_path / "base.yaml", "SOLVER: {BASELR: 1, MAX_ITER: many}\nMINE: {A: 1, B: 2}")
    above = write(tmp_path / "above.yaml", "_BASE_: base.yaml\nSEEED: 3\nSOLVER: {BASELR: 2}")
    with pytest.raises(ValueError) as error:
        read(above)
    assert sorted(str(error.value).split("\n  ")) == [
        f"{above}: there is no config key 'SEEED', did you mean SEED?",
        f"{base}: SOLVER.MAX_ITER is 'many', but must be of the type int, such as 40000",
        f"{base}: there is no config key 'MINE'",
        f"{base}: there is no config key 'SOLVER.BASELR', did you mean SOLVER.BASE_LR?",
    ]


KEYS_OF_MAIN_BRANCH = """
DATALOADER: {REPEAT_SQRT: False}
FLOAT32_PRECISION: highest
MODEL:
  ROI_BOX_HEAD:
    {FED_LOSS_FREQ_WEIGHT_POWER: 0.5, FED_LOSS_NUM_CLASSES: 50, USE_FED_LOSS: False, USE_SIGMOID_CE: False}
SOLVER: {BASE_LR_END: 0.0, NUM_DECAYS: 3, RESCALE_INTERVAL: False}
"""


def test_keys_of_a_later_detectron2(tmp_path):
    """They are read where they are known; elsewhere it is said which Detectron2 has them."""
    path = write(tmp_path / "mine.yaml", KEYS_OF_MAIN_BRANCH)
    if "BASE_LR_END" in get_cfg().SOLVER:
        assert read(path).SOLVER.NUM_DECAYS == 3
        return
    with pytest.raises(ValueError) as error:
        read(path)
    lines = str(error.value).split("\n  ")
    assert len(lines) == 9
    assert all(f"in Detectron2 {detectron2.__version__}, which is imported here" in line for line in lines)
    end = "remove it, or install Detectron2's main branch, which has it since 2021-12"
    assert [line for line in lines if "'SOLVER.BASE_LR_END'" in line and line.endswith(end)]
    with pytest.raises(ValueError, match=f"there is no config key 'FLOAT32_PRECISION' in .*{end[:40]}"):
        read(write(tmp_path / "plain.yaml", "SEED: 1"), "FLOAT32_PRECISION", "high")


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"a": "_BASE_: none.yaml"}, FileNotFoundError, "a.yaml: its _BASE_ none.yaml does not exist"),
        (
            {"a": "_BASE_: sub/b.yaml", "sub/b": "_BASE_: none.yaml"},
            FileNotFoundError,
            "sub/b.yaml: its _BASE_ sub/none.yaml does not exist",
        ),
        ({"a": "_BASE_: ."}, OSError, "a.yaml: its _BASE_ . can't be read"),
        ({"a": "_BASE_: a.yaml"}, ValueError, "a.yaml: its _BASE_ a.yaml is based on it in turn"),
        (
            {"a": "_BASE_: sub/b.yaml", "sub/b": "_BASE_: ../a.yaml"},
            ValueError,
            "sub/b.yaml, the _BASE_ of a.yaml: its _BASE_ sub/../a.yaml is based on it in turn",
        ),
        (
            {"a": "_BASE_: b.yaml", "b": ""},
            ValueError,
            "b.yaml, the _BASE_ of a.yaml: it must hold config keys and their values in YAML",
        ),
        (
            {"a": "_BASE_: b.yaml", "b": "SOLVER"},
            ValueError,
            "b.yaml, the _BASE_ of a.yaml: it must hold config keys and their values in YAML",
        ),
        (
            {"a": "_BASE_: b.yaml", "b": "SOLVER: ["},
            ValueError,
            "b.yaml, the _BASE_ of a.yaml: while parsing a flow node",
        ),
        (
            {"a": "_BASE_: b.yaml\nSOLVER: {SEED: 1}", "b": "SOLVER: 1"},
            ValueError,
            "a.yaml: Cannot inherit key 'SOLVER' from base!",
        ),
        ({"a": "_BASE_: 3"}, ValueError, "a.yaml: it must hold config keys and their values in YAML"),
        ({"a": "VERSION: 3"}, ValueError, "a.yaml: VERSION is 3, but Detectron2's configs have versions up to 2"),
    ],
)
def test_mistakes_in_chains_of_files(files, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        write(tmp_path / f"{name}.yaml", text)
    with pytest.raises(error) as raised:
        read("a.yaml")
    assert str(raised.value).startswith(message)


def test_two_files_can_have_one_base(tmp_path):
    write(tmp_path / "base.yaml", "SEED: 3")
    for name in "ab":
        write(tmp_path / f"{name}.yaml", "_BASE_: base.yaml")
    assert read(write(tmp_path / "both.yaml", "_BASE_: [a.yaml, b.yaml]\nVERSION: 2")).SEED == 3


def test_each_file_is_read_once(tmp_path):
    from detectron2.config import CfgNode

    opened = []
    write(tmp_path / "base.yaml", "SEED: 3")
    path = write(tmp_path / "mine.yaml", "_BASE_: base.yaml")
    open_cfg = CfgNode._open_cfg
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CfgNode, "_open_cfg", lambda name: opened.append(name) or open_cfg(name))
        read(path)
    assert opened == [str(path), str(tmp_path / "base.yaml")]


def test_a_config_of_an_earlier_version_is_upgraded(tmp_path):
    cfg = read(write(tmp_path / "old.yaml", "MODEL: {WEIGHT: old.pkl}\nGKD: {METHOD: pkd}"))
    assert (cfg.VERSION, cfg.MODEL.WEIGHTS, cfg.GKD.METHOD) == (2, "old.pkl", "pkd")


HOSTILE = '!!python/object/apply:os.mkdir ["hacked"]'


@pytest.mark.parametrize("value", [HOSTILE, "!!python/object/new:os.mkdir [hacked]", "!!python/tuple [1]", "!mine 3"])
def test_a_config_runs_no_code(value, distiller_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.yaml", f"SOLVER:\n  STEPS: {value}\n")
    write(tmp_path / "above.yaml", "_BASE_: mine.yaml\n")
    cfg = distiller_config("retinanet")
    cfg.GKD.TEACHER.CONFIG_FILE = "mine.yaml"
    end = f"mine.yaml{{}}: line 2: the tag {value.split()[0]} is not read, as such tags may run code: write the value "
    readers = {
        end.format(""): lambda: read("mine.yaml"),
        end.format(", the _BASE_ of above.yaml"): lambda: read("above.yaml"),
        "mine.yaml: line 2": lambda: teacher_config(cfg),
    }
    for message, reader in readers.items():
        with pytest.raises(ValueError) as error:
            reader()
        assert str(error.value).startswith(message)
    assert not (tmp_path / "hacked").exists()


def test_pairs_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"SOLVER.STEPS is '{re.escape(HOSTILE)}', but must be of the type tuple"):
        read(write(tmp_path / "mine.yaml", "SEED: 1"), "SOLVER.STEPS", HOSTILE)
    assert not (tmp_path / "hacked").exists()


def test_python_code_is_no_config(tmp_path):
    write(tmp_path / "lazy.py", "model = 3")
    with pytest.raises(ValueError, match="lazy.py: it is Python code, as of Detectron2's LazyConfig: name a config in"):
        read(tmp_path / "lazy.py")


@pytest.mark.parametrize("sizes", ["32, 64, 128, 256, 512 ", "8,16.5,32"])
def test_the_scales_of_detectron2s_retinanet_are_read(sizes, tmp_path):
    """Its Base-RetinaNet.yaml, and configs of many projects, have Python compute them."""
    text = Path(model_zoo.get_config_file("Base-RetinaNet.yaml")).read_text()
    assert "!!python/object/apply:eval" in text
    path = tmp_path / "base.yaml"
    path.write_text(text.replace("32, 64, 128, 256, 512 ", sizes))
    (tmp_path / "mine.yaml").write_text("_BASE_: base.yaml\n")
    expected = get_cfg()
    expected.merge_from_file(str(path), allow_unsafe=True)
    cfg = read(tmp_path / "mine.yaml")
    assert cfg.MODEL.ANCHOR_GENERATOR.dump() == expected.MODEL.ANCHOR_GENERATOR.dump()
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0][0] == yaml.safe_load(f"[{sizes}]")[0]


def test_no_other_expression_is_computed(tmp_path):
    text = Path(model_zoo.get_config_file("Base-RetinaNet.yaml")).read_text()
    for expression in ("for x in [32, __import__('os').mkdir('hacked')", "for x in open('hacked', 'w'"):
        path = tmp_path / "mine.yaml"
        path.write_text(re.sub(r"for x in \[32[^\]]*", expression, text))
        assert "hacked" in path.read_text()
        with pytest.raises(ValueError, match="line 8: the tag !!python/object/apply:eval is not read"):
            read(path)


def test_a_dumped_config_has_no_tags(project, tmp_path):
    """Its tuples and texts are read again as they were."""
    cfg = read(project / "configs" / "toy" / "gkd_frcnn.yaml", "MODEL.WEIGHTS", "!!python/none")
    path = write(tmp_path / "dumped.yaml", cfg.dump())
    assert "!!python/tuple" not in path.read_text()
    assert config_differences(read(path), cfg) == {}


@pytest.mark.parametrize(
    "text",
    ["SEED: " + "[" * 3000 + "]" * 3000, "MODEL: &model {BACKBONE: *model}", "_BASE_: mine.yaml\nMODEL: &a {A: *a}"],
    ids=["deep", "itself", "its base"],
)
def test_values_without_end_are_refused(text, tmp_path):
    path = write(tmp_path / "above.yaml", text)
    write(tmp_path / "mine.yaml", "MODEL: &model {BACKBONE: *model}")
    with pytest.raises(ValueError, match="yaml: it holds values within values without end, or too deep"):
        read(path)


def test_scales_beyond_all_numbers_are_refused(tmp_path):
    text = Path(model_zoo.get_config_file("Base-RetinaNet.yaml")).read_text()
    path = write(tmp_path / "mine.yaml", text.replace("32, 64, 128, 256, 512 ", "9" * 400))
    with pytest.raises(ValueError, match="mine.yaml: int too large to convert to float"):
        read(path)
