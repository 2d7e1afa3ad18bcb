"""KITTI's label format: what is read, and what is refused with its file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from kitti_folder import CAR, DONT_CARE, SIZE

from gkd_d2.data.datasets.kitti_labels import parse_label_line, read_labels


def test_parse_a_line_of_the_benchmark() -> None:
    # a line of KITTI's training image 000008, 1242 x 375
    line = "Car 0.88 3 -0.69 0.00 192.37 402.31 374.00 1.60 1.57 3.23 -2.70 1.74 3.68 -1.29"
    assert parse_label_line(line, "000008.txt:1", (1242, 375)) == {
        "type": "Car",
        "truncation": 0.88,
        "occlusion": 3,
        "bbox": [0.0, 192.37, 402.31, 374.0],
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (" ".join(CAR.split()[:14]), "14 fields"),
        (CAR + " 0.93", "16 fields are a detection result"),
        ("", "0 fields"),
        (CAR.replace("Car", "car"), "unknown type 'car'"),
        (CAR.replace("10.00", "ten"), "left is 'ten', not a finite number"),
        (CAR.replace("10.00", "nan"), "left is 'nan', not a finite number"),
        (CAR.replace("10.00", "1_0"), "left is '1_0', not a finite number"),
        (CAR.replace("-1.57", "1e999"), "rotation_y is '1e999', not a finite number"),
        (CAR.replace("0.00 0 ", "1.01 0 ", 1), r"truncated is 1.01, not in \[0, 1\]"),
        (CAR.replace("0.00 0 ", "-1 0 ", 1), r"truncated is -1, not in \[0, 1\]"),
        (CAR.replace("0.00 0 ", "0.00 4 ", 1), "occluded is 4"),
        (CAR.replace("0.00 0 ", "0.00 0.5 ", 1), "occluded is 0.5"),
        (CAR.replace("0.00 0 ", "0.00 -1 ", 1), "occluded is -1"),
        (CAR.replace("60.00", "10.00"), "the box is empty"),
        (CAR.replace("50.00", "19.00"), "the box is empty"),
        (CAR.replace("10.00", "-0.01"), "outside its image of 200 x 100"),
        (CAR.replace("20.00 60", "-3.00 60"), "outside its image of 200 x 100"),
        (CAR.replace("60.00", "200.01"), "outside its image of 200 x 100"),
        (CAR.replace("50.00", "100.01"), "outside its image of 200 x 100"),
        (DONT_CARE.replace("195.00", "201.00"), "outside its image of 200 x 100"),
    ],
)
def test_a_wrong_label_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "000007.txt"
    path.write_text(f"{CAR}\n{line}\n{CAR}\n")
    with pytest.raises(ValueError, match=message) as error:
        read_labels(path, SIZE)
    assert str(error.value).startswith(f"{path}:2: ")


def test_a_box_may_end_at_the_image_border(tmp_path: Path) -> None:
    path = tmp_path / "000007.txt"
    path.write_text(CAR.replace("10.00 20.00 60.00 50.00", "0.00 0.00 200.00 100.00"))
    assert read_labels(path, SIZE)[0]["bbox"] == [0, 0, 200, 100]


def test_a_label_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "000007.txt"
    path.write_bytes(CAR.encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match="not a text file") as error:
        read_labels(path, SIZE)
    assert str(error.value).startswith(f"{path}:2: ")
