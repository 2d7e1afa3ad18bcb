"""The tool of LazyConfigs by its command line: killed, resumed, on two processes, evaluated, refused."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lazy_configs import write_distilled
from processes import PATIENCE, wait_until

from gkd_d2.data.toy import make_toy_kitti

SMALL = ("train.max_iter=16", "train.checkpointer.period=4", "train.seed=-1", "train.log_period=4")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, project):
    """A folder with data and a config; a function that starts the tool there."""
    folder = tmp_path_factory.mktemp("lazy_runs")
    make_toy_kitti(folder / "datasets" / "toy_kitti", 6, 2, image_size=(160, 64))
    config = write_distilled(folder, options="warmup_iters=6")
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    environment["DETECTRON2_DATASETS"] = str(folder / "datasets")

    def start(*arguments, tool=project / "tools" / "lazyconfig_train_net.py"):
        command = [sys.executable, str(tool), "--config-file", str(config)]
        return subprocess.Popen(
            [*command, *map(str, arguments)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    start.folder = folder
    return start


def finish(run, status=0):
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == status, output[-3000:]
    return output


def train(workplace, name, *arguments, resume=False):
    flags = ["--resume"] if resume else []
    return workplace(*flags, *arguments, *SMALL, f"train.output_dir={workplace.folder / name}")


@pytest.mark.skipif("DETECTRON2_TOOLS" not in os.environ, reason="DETECTRON2_TOOLS names no folder")
def test_detectron2s_own_tool_trains_it(workplace):
    folder = workplace.folder / "stock"
    options = ("train.max_iter=2", "train.seed=3", f"train.output_dir={folder}")
    output = finish(workplace(*options, tool=Path(os.environ["DETECTRON2_TOOLS"]) / "lazyconfig_train_net.py"))
    assert "Nothing watches this distillation" in output and "loss_bmfi_box" in output
    saved = state(folder)["model"]
    assert "head.cls_score.weight" in saved and not any("teacher" in name for name in saved)


def state(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


@pytest.fixture(scope="module")
def killed(workplace):
    """A run that is killed after its first checkpoint and resumed: its folder, and what it printed then."""
    folder = workplace.folder / "killed"
    run = train(workplace, "killed")
    wait_until(lambda: (folder / "model_0000003.pth").exists() or run.poll() is not None)
    run.kill()
    finish(run, -signal.SIGKILL)
    assert not (folder / "model_final.pth").exists()
    return folder, finish(train(workplace, "killed", resume=True))


@pytest.fixture(scope="module")
def uninterrupted(workplace, killed):
    """A run of the seed that the other has drawn."""
    seed = int(re.search(r"^  seed: (\d+)$", (killed[0] / "config.yaml").read_text(), re.M)[1])
    folder = workplace.folder / "whole"
    output = finish(workplace(*SMALL, f"train.seed={seed}", f"train.output_dir={folder}"))
    return folder, output


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_killed_run_resumes_bit_for_bit(killed, uninterrupted):
    folder, output = killed
    assert "Starting training from iteration 4" in output or "Starting training from iteration 8" in output
    assert "the resumed run differs" not in output
    one, other = state(uninterrupted[0]), state(folder)
    assert equal(one["model"], other["model"])
    momenta = [s["trainer"]["_trainer"]["optimizer"]["state"] for s in (one, other)]
    assert all(equal(momenta[0][key], momenta[1][key]) for key in momenta[0])


def test_what_a_run_says(uninterrupted):
    folder, output = uninterrupted
    assert "Training a student RetinaNet with a teacher RetinaNet:" in output
    assert f"teacher: {folder.parent}/teacher.pth, described by {folder.parent}/teacher.py" in output
    # In the words of its own config.
    assert re.search(r"than train.watch.max_ratio 10. model.method.weights.\w+ is ", output)
    assert not re.search(r"\b(GKD|SOLVER|MODEL)\.", output)
    assert "Task: kitti" in output
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert {"gkd_ratio/box", "bbox/AP", "kitti/AP_moderate"} <= {name for row in rows for name in row}


def test_two_processes_are_one_batch_and_an_evaluation_needs_no_teacher(workplace):
    """Of two processes each takes an image; a student of two is evaluated alone, without the teacher's file."""
    folder = workplace.folder / "pair"
    options = ("train.max_iter=2", "train.eval_period=0", f"train.output_dir={folder}", "train.model_ema.enabled=True")
    output = finish(workplace("--num-gpus", 2, *options))
    assert "World size: 2" in output and "bbox_EMA/AP" in (folder / "metrics.json").read_text()
    saved = state(folder)
    assert saved["ema_state"].keys() == saved["model"].keys() and not equal(saved["ema_state"], saved["model"])
    weights = f"train.init_checkpoint={folder / 'model_final.pth'}"
    output = finish(workplace("--eval-only", "model.teacher_weights=gone.pth", weights, *options))
    assert (
        output.count("Task: bbox") == 2
        and "teacher" not in output.rpartition("The whole config")[2].partition("Start inf")[2]
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["model.teacher_weights=no.pth"], "- model.teacher_weights is no.pth: there is no such file"),
        (["dataloader.train.total_batch_size=3"], "dataloader.train.total_batch_size is 3, which can't be shared"),
        (["train.max_itr=3"], "sets train.max_itr, which the config does not have: did you mean train.max_iter?"),
        (["SOLVER.BASE_LR", "0.1"], "'SOLVER.BASE_LR' is no override of a LazyConfig: write key=value"),
    ],
)
def test_refusals_are_sentences_in_the_words_of_the_config(arguments, text, workplace, main_of_tool, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(workplace.folder / "datasets"))
    config = workplace.folder / "distilled.py"
    output = main_of_tool("lazyconfig_train_net.py", "--config-file", config, "--num-gpus", 2, *arguments)
    assert text in output
    assert not re.search(r"\b(GKD|SOLVER)\.[A-Z]", output.replace("'SOLVER.BASE_LR'", ""))


def test_what_only_the_built_detectors_show_is_a_sentence_too(workplace):
    output = finish(workplace("model.features=[p9]", f"train.output_dir={workplace.folder / 'refused'}"), 1)
    assert output.splitlines()[-1] == "model.features names p9, but the heads use p3, p4, p5, p6, p7 only"
