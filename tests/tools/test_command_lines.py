"""A mistake in a command line ends in a sentence, before anything is built."""

import argparse

import pytest

from gkd_d2.utils.command_line import parse_options_first

OPTIONS = {
    "train_net.py": ("--config-file", "FILE"),
    "suggest_weights.py": ("--config-file", "FILE"),
    "visualize_gkd.py": ("--config-file", "FILE"),
    "benchmark_step.py": ("--config-file", "FILE"),
    "export_student.py": ("--weights", "FOLDER", "--output", "FOLDER"),
}


@pytest.fixture
def command(project, tmp_path, monkeypatch):
    """A function that returns a tool's options, of a run whose device is the CPU, and the pairs for it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    values = {"FILE": project / "configs" / "toy" / "gkd_retinanet.yaml", "FOLDER": tmp_path}
    return lambda tool: [values.get(option, option) for option in OPTIONS[tool]]


@pytest.mark.parametrize("tool", OPTIONS)
def test_options_after_pairs(tool, command, main_of_tool):
    """Also those that a tool requires, which argparse alone would report as missing."""
    options = command(tool)
    said = main_of_tool(tool, "MODEL.DEVICE", "cpu", *options)
    assert said.startswith(f"the option {options[0]} comes after KEY VALUE pairs (MODEL.DEVICE cpu ...)")
    assert said.endswith("put all options before the pairs")
    said = main_of_tool(tool, *options, "MODEL.DEVICE", "cpu", "--resume")
    assert said.startswith("the option --resume comes after KEY VALUE pairs")


@pytest.mark.parametrize("tool", OPTIONS)
def test_options_after_misspelt_pairs(tool, command, main_of_tool):
    options = command(tool)
    for first in ("solver.base_lr", "SOLVER.BASE_LR=1", "SED"):
        said = main_of_tool(tool, first, "1", *options)
        assert said.startswith(f"the option {options[0]} comes after KEY VALUE pairs ({first} 1 ...)")


def test_values_of_options_that_look_like_keys():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--image", action="append")
    parser.add_argument("--size", nargs=2)
    parser.add_argument("--output")
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    arguments = ["--image", "IMG_0001.JPG", "--image=SOLVER.BASE_LR", "--size", "A.B", "SEED"]
    arguments += ["--config", "CONFIG.YAML"]
    args = parse_options_first(parser, [*arguments, "--output", "OUTPUT_DIR", "SEED", "-1"])
    assert args.image == ["IMG_0001.JPG", "SOLVER.BASE_LR"] and args.size == ["A.B", "SEED"]
    assert (args.config_file, args.output, args.opts) == ("CONFIG.YAML", "OUTPUT_DIR", ["SEED", "-1"])
    assert parse_options_first(parser, arguments).opts == []
    with pytest.raises(SystemExit) as end:
        parse_options_first(parser, [*arguments, "SEED", "-1", "--output", "out"])
    assert str(end.value).startswith("the option --output comes after KEY VALUE pairs (SEED -1 ...)")


def test_files_in_capitals(main_of_tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--config-file", "CONFIG.YAML", "--num-gpus", "0", "SOLVER.BASELR", "1"]
    (tmp_path / "CONFIG.YAML").write_text("VERSION: 2")
    assert "\n- there is no config key 'SOLVER.BASELR'" in main_of_tool("train_net.py", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SOLVER.BASELR", "1"], "there is no config key 'SOLVER.BASELR', did you mean SOLVER.BASE_LR?"),
        (["MODEL.DEVICE"], "the config key MODEL.DEVICE has no value"),
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu', which torch does not know"),
        (["--num-gpus", "0", "--num-machines", "2", "MODEL.DEVICE", "cpu"], "--num-gpus is 0, with --num-machines 2"),
        (["--eval-only", "GKD.STUDENT.META_ARCHITECTURE", ""], "GKD.STUDENT.META_ARCHITECTURE is ''"),
    ],
)
def test_a_training(command, main_of_tool, arguments, message):
    said = main_of_tool("train_net.py", *command("train_net.py"), *arguments)
    assert said.startswith(f"This run can't start:\n- {message}")


def test_a_student_without_architecture(command, main_of_tool):
    said = main_of_tool("train_net.py", *command("train_net.py"), "GKD.STUDENT.META_ARCHITECTURE", "")
    assert said.startswith("This run can't start:\n- ") and "\n- GKD.STUDENT.META_ARCHITECTURE is ''" in said


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        (["--num-gpus", "3"], {}),
        (["--num-gpus", "1", "--num-machines", "3"], {}),
        ([], {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}),
        (
            [],
            {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
            | {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost"},
        ),
    ],
)
def test_a_batch_that_the_processes_can_not_share(command, main_of_tool, monkeypatch, options, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = [*command("train_net.py"), *options]
    pairs = ["MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "4"]
    line = "\n- SOLVER.IMS_PER_BATCH is 4, which can't be shared evenly by 3 processes: set it to 3 or 6\n"
    assert line in main_of_tool("train_net.py", *options, *pairs)
    # An evaluation has no such batch.
    assert "IMS_PER_BATCH" not in main_of_tool("train_net.py", *options, "--eval-only", *pairs)
