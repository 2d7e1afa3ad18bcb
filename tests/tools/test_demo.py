"""The demo, cut short: its report holds what the runs measured."""

import json
import re

import torch
from PIL import Image


def test_report_holds_the_measured_ap(demo):
    output, printed = demo
    report = (output / "report.md").read_text()
    for name in ("teacher", "student_alone", "student_distilled"):
        rows = [json.loads(line) for line in (output / name / "metrics.json").read_text().splitlines()]
        (ap,) = [row["bbox/AP"] for row in rows if "bbox/AP" in row]
        row = next(line for line in report.splitlines() if line.startswith(f"| {name} |"))
        assert row in printed
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[2] == f"{ap:.1f}"
        assert cells[-1] == "2"
    assert "- student_distilled: the method is gkd; alone is student_alone; teacher is teacher." in report
    assert "== 3 of 3: the student distilled" in printed
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("teacher", "student_alone", "student_distilled"):
        assert f"\n  DEVICE: {device}\n" in (output / name / "config.yaml").read_text()
    linked = re.findall(r"\]\(([^)]+)\)", report)
    assert [name for name in linked if name.startswith("pictures/0")] == [
        f"pictures/0{n}_50000{n - 1}.png" for n in (1, 2)
    ]
    assert {"curves.png", "detections.png", "pictures/index.html"} < set(linked)
    for name in linked:
        assert (output / name).is_file()
        if name.endswith(".png"):
            with Image.open(output / name) as picture:
                assert picture.width > 1000
