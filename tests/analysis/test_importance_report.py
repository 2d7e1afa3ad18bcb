"""The table of where importances lie."""

import json

import pytest
import torch

from gkd_d2.analysis.importance_report import ImportanceReport, importance_table, report_text, write_report
from gkd_d2.visualize.picture import LevelImportances, Place, PlacedMap


def level(name, area, **places):
    """A level of one image; None: the map is 0 everywhere."""
    maps = {importance: PlacedMap(torch.ones(1, 1), place) for importance, place in places.items()}
    return LevelImportances(name, 4, area, maps)


def report():
    """Two images with objects and one without; p3 has no score, and one map there is 0 everywhere."""
    report = ImportanceReport()
    report.add(
        [
            level("p2", 0.1, channel=Place(0.2, True), norm=Place(0.9, True), score=Place(0.5, False)),
            level("p3", 0.25, channel=Place(0.25, False), norm=Place(0.75, True)),
        ]
    )
    report.add(
        [
            level("p2", 0.0, channel=Place(0.0, False), norm=Place(0.0, False), score=Place(0.0, False)),
            level("p3", 0.0, channel=Place(0.0, False), norm=Place(0.0, False)),
        ]
    )
    report.add(
        [
            level("p2", 0.3, channel=Place(0.4, False), norm=Place(0.8, True), score=Place(0.7, True)),
            level("p3", 0.5, channel=Place(1.0, True), norm=None),
        ]
    )
    return report.result()


def test_means_over_the_images_with_objects():
    result = report()
    assert result["images"] == 2
    p2, p3 = result["levels"]["p2"], result["levels"]["p3"]
    assert p2["images"] == 2 and p2["area"] == 0.2
    assert p2["importances"]["norm"] == {"share": pytest.approx(0.85), "peak": 1}
    # Chance, too, of the one image that counts.
    assert p3 == {
        "images": 1,
        "area": 0.25,
        "importances": {"channel": {"share": 0.25, "peak": 0}, "norm": {"share": 0.75, "peak": 1}},
    }


def test_table():
    lines = importance_table(report()).splitlines()
    rows = [[text.strip() for text in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    assert rows == [
        ["", "p2", "p3 (1 image)"],
        ["area of the boxes (chance)", "0.20", "0.25"],
        ["channel", "0.30, peak 0.50", "0.25, peak 0.00"],
        ["element", "–", "–"],
        ["norm", "0.85, peak 1.00", "0.75, peak 1.00"],
        ["student", "–", "–"],
        ["score", "0.60, peak 0.50", "–"],
    ]


def test_text_says_what_counts_and_what_is_missing():
    text = report_text(report())
    assert "means over 2 images with objects" in text
    assert "in the others some map is 0 everywhere" in text
    assert "No score at p3: the teacher's heads score no cells there" in text


def test_without_an_object_there_is_nothing_to_average():
    empty = ImportanceReport()
    empty.add([level("p2", 0.0, channel=Place(0.0, False))])
    assert "means over 0 images" in report_text(empty.result())
    assert empty.result()["levels"]["p2"]["area"] is None


def test_files(tmp_path):
    result = report()
    write_report(tmp_path, result, {"config": "a<b.yaml"}, {"01_x.png": "x.png"})
    assert {path.name for path in tmp_path.iterdir()} == {"importance.md", "importance.json", "index.html"}
    assert json.loads((tmp_path / "importance.json").read_text()) == {"config": "a<b.yaml"} | result
    text = (tmp_path / "importance.md").read_text()
    assert "- config: a<b.yaml" in text and importance_table(result) in text
    page = (tmp_path / "index.html").read_text()
    assert "a&lt;b.yaml" in page and "01_x.png" in page and "0.85, peak 1.00" in page
