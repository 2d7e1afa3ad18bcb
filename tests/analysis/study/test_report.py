"""Tables and the parts of a results file."""

import json
import math

import pytest
from PIL import Image

from gkd_d2.analysis.study.job import COST_FILE
from gkd_d2.analysis.study.report import study_section, write_sections
from gkd_d2.analysis.study.rows import read_rows
from gkd_d2.config import detector_config
from gkd_d2.modeling.student import build_student


def cells(section: str, name: str) -> dict[str, str]:
    """Column -> cell, of the last row of a name in the first table that has one."""
    for table in section.split("\n\n"):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        for row in rows:
            if row[0] == name:
                return dict(zip(rows[0], row))
    raise AssertionError(f"no row {name} in {section}")


def test_the_section_holds_what_the_folders_hold(make_study, finish, tmp_path):
    beside = {"gkd": {"tune": True}, "heads": {"scale_of": "gkd", "baseline": "gkd"}}
    study = make_study(beside=beside)
    assert "Its teacher is not trained yet." in study_section(study, tmp_path / "images")
    finish(study.teacher_job("retinanet"), 61.25)
    for scale, ap in {0.2: 10.0, 1: 30.0, 5: 50.0}.items():
        for job in study.tuning_jobs("retinanet", "gkd")[scale]:
            finish(job, ap)
    alone, gkd = (study.student_jobs("retinanet", name) for name in ("alone", "gkd"))
    for seed, ap in {1: 20.0, 2: 23.0, 3: 26.0}.items():
        finish(alone[seed], ap, time=seed / 10)
    # The third seed is missing, and the second detects nothing.
    finish(gkd[1], 25.0)
    finish(gkd[2], math.nan)
    cost = {"device": "cpu", "at_once": 2}
    for seed, megabytes in {1: 1000.2, 2: 1500.0}.items():
        (alone[seed].folder / COST_FILE).write_text(json.dumps(cost | {"resident_megabytes": megabytes}))

    section = study_section(study, tmp_path / "images")
    row = cells(section, "alone")
    assert row["AP"] == "23.0 ± 3.0"
    assert row["AP50"] == "46.0 ± 6.0"
    assert row["AP of each seed"] == "20.0, 23.0, 26.0"
    assert row["gain over alone"] == row["gain over another"] == "–"
    assert row["s / iteration"] == "0.20"
    assert row["process, MB"] == "1500"
    row = cells(section, "gkd")
    assert row["weights x"] == "5"
    assert row["AP of each seed"] == "25.0, 0.0, –"
    # Differences 5 and -23: mean -9, standard deviation 28 / sqrt(2), of the mean 14.
    assert row["gain over alone"] == f"-9.0 ({-9 - 14 * 12.706:+.1f} to {-9 + 14 * 12.706:+.1f})"
    assert row["gain over another"] == "–"
    assert row["s / iteration"] == row["process, MB"] == "–"
    assert "Trainings at a time, which slow each other down: 2." in section
    assert "Not trained yet: heads." in section
    assert "\n| heads |" not in section
    assert "| gkd | 10.0 | 30.0 | 50.0 |" in section

    row = cells(section, "teacher")
    assert (row["AP"], row["ResNet"], row["iterations"]) == ("61.2", "34, res2 64", "400")
    row = cells(section, "student")
    network = build_student(detector_config(alone[1].config))
    assert row["parameters (M)"] == f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f}"
    assert (row["ResNet"], row["FPN channels"], row["iterations"]) == ("18, res2 64", "64", "200")
    assert "](images/small_retinanet.png)" in section
    with Image.open(tmp_path / "images" / "small_retinanet.png") as picture:
        assert picture.width > 500
    finish(study.student_jobs("retinanet", "heads")[1], 28.0)
    section = study_section(study, tmp_path / "images")
    row = cells(section, "heads")
    assert row["weights x"] == "5"
    assert (row["gain over alone"], row["gain over another"]) == ("+8.0", "gkd: +3.0")
    assert "Not trained yet" not in section
    # Nothing is read from what was seen before.
    assert study_section(make_study(beside=beside), tmp_path / "images") == section


def test_a_scale_that_is_not_chosen_yet_leaves_the_row_empty(make_study, finish, tmp_path):
    study = make_study()
    finish(study.teacher_job("retinanet"), 60.0)
    finish(study.tuning_jobs("retinanet", "gkd")[5][0], 40.0)
    rows = read_rows(study, "retinanet")
    assert rows["gkd"].scale is None and rows["gkd"].metrics == {}
    section = study_section(study, tmp_path / "images")
    assert "Not trained yet: alone, gkd." in section
    # One of two seeds is no mean of both.
    assert "| gkd | – | – | – |" in section
    assert not (tmp_path / "images").exists()


def test_parts_are_replaced_and_added_and_prose_stays(tmp_path):
    path = tmp_path / "docs" / "results.md"
    write_sections(path, {"one": "first\n", "two": "second\n"})
    begin = "<!-- study: {} -->\n\n"
    end = "\n<!-- end of study -->"
    assert path.read_text() == (
        f"# Results\n\n{begin.format('one')}first\n{end}\n\n{begin.format('two')}second\n{end}\n"
    )
    text = path.read_text().replace("# Results\n", "# Ours\n\nBefore.\n") + "\nAfter, with \\1 and \\g<0>.\n"
    path.write_text(text)
    write_sections(path, {"two": r"changed \1" + "\n", "three": "third\n"})
    expected = text.replace("second\n", r"changed \1" + "\n") + f"\n{begin.format('three')}third\n{end}\n"
    assert path.read_text() == expected
    write_sections(path, {"two": r"changed \1" + "\n", "three": "third\n"})
    assert path.read_text() == expected
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "broken",
    [
        "<!-- study: one -->\nfirst\n",
        "<!-- study: one -->\nfirst\n\n<!-- study: two -->\nsecond\n<!-- end of study -->\n",
        "<!-- study: one -->\n<!-- end of study -->\n\n<!-- study: one -->\n<!-- end of study -->\n",
    ],
)
def test_a_part_without_end_swallows_nothing(broken, tmp_path):
    path = tmp_path / "results.md"
    path.write_text(broken)
    with pytest.raises(ValueError, match="results.md: below one line <!-- study: one -->"):
        write_sections(path, {"one": "new\n"})
    assert path.read_text() == broken
