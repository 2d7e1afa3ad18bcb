"""tools/check_gpu.sh: its refusal, and its stages with commands that only write down how they were called."""

import os
import re
import shutil
import subprocess
import sys

import pytest

STUB = """#!{bash}
printf '%s\\x1f' "$@" >> '{calls}'
printf '\\x1e' >> '{calls}'
case "$*" in {failing}) exit 3 ;; esac
"""
LOSSES = [
    "losses --dtype float32",
    "losses --dtype float16",
    "losses --dtype bfloat16",
    "losses --layout channels_last",
]
STEPS = ["step frcnn", "step retinanet"]
SANITIZERS = ["memcheck", "initcheck", "racecheck", "synccheck"]


def run(project, python, **environment):
    command = [shutil.which("bash"), str(project / "tools" / "check_gpu.sh"), str(python)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture
def rehearse(project, tmp_path):
    """Run the script with stubs; returns what it printed, its exit status and the arguments of each call."""

    def rehearsed(*, failing="nothing", commands=("python", "compute-sanitizer")):
        calls, bash = tmp_path / "calls", shutil.which("bash")
        for name in ("bash", "dirname", "env"):
            (tmp_path / name).symlink_to(shutil.which(name))
        for name in commands:
            (tmp_path / name).write_text(STUB.format(bash=bash, calls=calls, failing=failing))
            (tmp_path / name).chmod(0o755)
        done = run(project, tmp_path / "python", PATH=str(tmp_path), CUDA_HOME=str(tmp_path / "none"))
        recorded = [call.split("\x1f")[:-1] for call in calls.read_text().split("\x1e")[:-1]]
        return done, recorded

    return rehearsed


def summary(output: str) -> list[str]:
    """The lines below its heading, without their seconds."""
    return [re.sub(r", \d+ s$", "", line) for line in output.partition("=== summary\n")[2].splitlines()]


def test_without_a_gpu_one_sentence_is_all(project):
    done = run(project, sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "make check-gpu needs a GPU that torch can use, and there is none" in done.stderr


def test_nothing_runs_where_the_check_fails(rehearse):
    done, calls = rehearse(failing="*unavailable_reason*")
    assert done.returncode == 3
    assert done.stdout == "" and len(calls) == 1


def test_every_stage_runs_in_order(rehearse):
    done, calls = rehearse()
    assert done.returncode == 0, done.stderr
    names = ["tests", *(f"sanitizer {tool}" for tool in SANITIZERS), *LOSSES, *STEPS]
    assert summary(done.stdout) == [f"{name}: passed" for name in names]
    assert calls[1] == ["-m", "pytest", "-m", "cuda"]
    assert [call[1] for call in calls[2:6]] == SANITIZERS
    assert [call[0] for call in calls[6:]] == ["tools/benchmark_losses.py"] * 4 + ["tools/benchmark_step.py"] * 2
    assert calls[9][-2:] == ["--layout", "channels_last"]


def test_a_failed_stage_hides_nothing(rehearse):
    done, calls = rehearse(failing="*racecheck*|*bfloat16")
    assert done.returncode == 1
    failed = [line for line in summary(done.stdout) if not line.endswith(": passed")]
    names = ["sanitizer racecheck", "losses --dtype bfloat16", *STEPS]
    assert failed == [f"{name}: FAILED with status 3" for name in names]
    assert len(calls) == 12


def test_a_missing_sanitizer_fails_at_the_end(rehearse):
    done, calls = rehearse(commands=("python",))
    assert done.returncode == 1
    lines = summary(done.stdout)
    assert [line for line in lines if not line.endswith(": passed")] == lines[1:2]
    assert "compute-sanitizer is neither on PATH nor in bin/ of CUDA_HOME" in lines[1]
    assert len(calls) == 8


def test_the_sanitizers_see_every_type_and_layout(rehearse, project):
    _, calls = rehearse()
    selection = calls[2][calls[2].index("-m") :]
    done = subprocess.run(
        [sys.executable, *selection, "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=project,
        capture_output=True,
        text=True,
    )
    tests = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    for dtype in range(4):
        for layout in ("contiguous", "channels_last"):
            assert f"test_equals_reference[dtype{dtype}-attention_gradient-abs-{layout}-cuda]" in tests
            assert f"test_equals_reference[dtype{dtype}-attention-relu-{layout}-cuda]" in tests
    names = {test.partition("[")[0] for test in tests}
    assert names >= {"test_equals_reference_on_large_maps", "test_box_counts", "test_other_layouts"}
    assert len(tests) < 40
