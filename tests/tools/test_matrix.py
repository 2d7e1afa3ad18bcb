"""The table that tools/matrix.sh makes of runs of the suite; git and make are stubs, for a real run takes hours."""

import os
import subprocess

MAKE = """#!/bin/bash
case $* in
  *TORCH=2.4.1*) echo "== 1 failed, 980 passed, 20 skipped, 1 error in 700.12s (0:11:40) =="; exit 2 ;;
  *TORCH=2.9.1*) echo "no such Python"; exit 2 ;;
  *) echo "12 passed in 3 files"; echo "$DETECTRON2 $DETECTRON2_TOOLS"
     echo "===== 990 passed, 21 skipped, 3 warnings in 600.00s (0:10:00) ====="
esac
"""


def run(project, tmp_path, *rows, **environment):
    for name, text in (("make", MAKE), ("git", "#!/bin/bash\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "MATRIX": str(tmp_path / "rows")}
    inherited = {key: value for key, value in os.environ.items() if key != "DETECTRON2"}
    command = ["bash", str(project / "tools" / "matrix.sh"), *rows]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True)


def test_every_row_runs_and_the_table_counts(project, tmp_path):
    done = run(project, tmp_path, "3.10,2.4.1,0.5", "3.12,2.9.1,0.5", "3.12,2.15.0,head", "3.13,2.15.0,0.5")
    assert done.returncode == 1
    lines = done.stdout.strip().splitlines()[-5:]
    table = [line.split() for line in lines]
    assert table[0] == ["row", "passed", "skipped", "failed", "minutes"]
    assert table[1] == ["3.10,2.4.1,0.5", "980", "20", "2", "0"]
    assert table[2] == ["3.12,2.9.1,0.5", "0", "0", "status", "2", "0"]
    assert table[3][0] == "3.12,2.15.0,head" and "left out: DETECTRON2 names no folder" in lines[3]
    assert table[4] == ["3.13,2.15.0,0.5", "990", "21", "0", "0"]


def test_head_is_what_detectron2_names(project, tmp_path):
    (tmp_path / "head" / "tools").mkdir(parents=True)
    done = run(project, tmp_path, "3.12,2.15.0,head", DETECTRON2=str(tmp_path / "head"))
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'head'} {tmp_path / 'head' / 'tools'}" in (tmp_path / "rows/3.12-2.15.0-head.log").read_text()
