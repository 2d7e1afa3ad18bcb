"""The demo, cut short: its report holds what the runs measured."""

import json

from PIL import Image


def test_report_holds_the_measured_ap(demo):
    output, printed = demo
    report = (output / "report.md").read_text()
    measured = []
    for folder, name in (
        ("teacher", "teacher"),
        ("student_alone", "student alone"),
        ("student_distilled", "student distilled"),
    ):
        rows = [json.loads(line) for line in (output / folder / "metrics.json").read_text().splitlines()]
        (ap,) = [row["bbox/AP"] for row in rows if "bbox/AP" in row]
        measured.append(ap)
        (row,) = [line for line in report.splitlines() if line.startswith(f"| {name} |")]
        assert row in printed
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] == f"{ap:.1f}"
        assert cells[-1] == "2"
    assert f"Distilled minus alone: {measured[2] - measured[1]:+.1f} AP" in printed
    assert "== 3 of 3: the student distilled" in printed
    with Image.open(output / "report.png") as picture:
        assert picture.width > 1000
