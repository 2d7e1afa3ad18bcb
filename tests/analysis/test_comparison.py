"""Tables and notes of hand-written runs."""

from gkd_d2.analysis.comparison import gain_table, markdown_table, notes
from gkd_d2.analysis.cost import Cost
from gkd_d2.analysis.roles import find_roles


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_table_has_a_column_for_what_was_measured(runs):
    costs = {run.name: Cost(12_345_678) for run in runs} | {"alone": Cost(1_000_000, 1.234, 56.78)}
    header, _, *rows = cells(markdown_table(runs, "val", roles=find_roles(runs), costs=costs))
    columns = ["", "role", "AP", "AP50", "KITTI AP moderate", "AP Car"]
    assert header == [*columns, "parameters (M)", "GFLOPs", "ms an image", "iterations"]
    assert rows[1] == ["alone", "student alone", "29.0", "52.0", "–", "29.0", "1.00", "1.23", "56.8", "20"]
    assert rows[3] == ["distilled", "student distilled", "34.0", "50.5", "22.2", "–", "12.35", "–", "–", "20"]
    assert rows[4][2:5] == ["1.0", "nan", "–"]
    header, _, *rows = cells(markdown_table(runs[:2], "val"))
    assert header == ["", "AP", "AP50", "AP Car", "iterations"]


def test_gains_by_hand(runs):
    """AP: 34 over the mean of 29 and 31, 4 of the 10 that the teacher is better. AP50: 50.5 over 51."""
    header, _, *rows = cells(gain_table(runs, "val"))
    assert header == ["", "metric", "distilled", "alone", "gain", "teacher", "of the gap to the teacher"]
    assert rows == [
        ["distilled", "AP", "34.0", "30.0", "+4.0", "40.0", "40 %"],
        ["distilled", "AP50", "50.5", "51.0", "-0.5", "60.0", "-6 %"],
    ]
    # A teacher that is no better than the student alone leaves no gap.
    teacher, alone, _, distilled, _ = runs
    teacher.history[20]["bbox/AP"] = 29.0
    assert cells(gain_table([teacher, alone, distilled], "val"))[2][-2:] == ["29.0", "–"]
    assert cells(gain_table([alone, distilled], "val"))[2][-2:] == ["–", "–"]
    assert gain_table([teacher, distilled], "val") == ""


def test_notes_say_what_is_compared_and_what_else_differs(runs):
    assert notes(runs) == [
        "distilled: the method is gkd; alone is the mean of alone, again; teacher is teacher.",
        "distilled and again were configured differently beside distillation: SEED 7 here, 8 there.",
    ]
    runs[3].config.defrost()
    runs[3].config.GKD.METHODS = ["gkd", "fitnet"]
    assert notes(runs)[0].startswith("distilled: the method is gkd + fitnet; alone is")
    assert notes([runs[3]]) == ["distilled: no run here trained the same MODEL alone, so its gain is not known."]
