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


def test_it_ends_with_the_student_for_onnxruntime(demo):
    output, printed = demo
    path = output / "exported" / "model.onnx"
    assert printed.rstrip().splitlines()[-1] == f"Student for onnxruntime: {path}, see examples/detect_onnx.py"
    table = (output / "exported" / "export.md").read_text()
    assert table in (output / "report.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("|")}
    assert {"checkpoint", "ONNX", "ONNX int8"} <= rows.keys()
    assert f" {path.stat().st_size / 1e6:.1f} |" in rows["ONNX"]
    # Those of the averaged weights and of a TorchScript were not asked for.
    assert {file.name for file in path.parent.glob("model*")} == {"model.pth", "model.onnx", "model_int8.onnx"}
