"""The demo, cut short: its report holds what the runs measured."""

import json
import subprocess
import sys

from PIL import Image


def test_report_holds_the_measured_ap(project, tmp_path):
    command = [sys.executable, str(project / "tools" / "demo.py"), "--output", str(tmp_path)]
    command += ["--train", "8", "--val", "4", "--iterations", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = (tmp_path / "report.md").read_text()
    measured = []
    for folder, name in (
        ("teacher", "teacher"),
        ("student_alone", "student alone"),
        ("student_distilled", "student distilled"),
    ):
        rows = [json.loads(line) for line in (tmp_path / folder / "metrics.json").read_text().splitlines()]
        (ap,) = [row["bbox/AP"] for row in rows if "bbox/AP" in row]
        measured.append(ap)
        (row,) = [line for line in report.splitlines() if line.startswith(f"| {name} |")]
        assert row in done.stdout
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] == f"{ap:.1f}"
        assert cells[-1] == "2"
    assert f"Distilled minus alone: {measured[2] - measured[1]:+.1f} AP" in done.stdout
    assert "== 3 of 3: the student distilled" in done.stdout
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 1000
