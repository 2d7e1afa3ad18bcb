"""Result files: written, read back, refused, and evaluated as folders from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from gkd_d2.data.datasets.kitti_labels import CLASSES
from gkd_d2.evaluation.kitti_overlaps import Detections
from gkd_d2.evaluation.kitti_results import evaluate_folders, read_results, write_results

LINE = "Car -1 -1 -10 10 20 60.5 50 -1 -1 -1 -1000 -1000 -1000 -10 0.75"
LABEL = "Car 0.00 0 -1.50 10.00 20.00 60.00 70.00 1.5 1.6 3.9 1.0 1.5 20.0 -1.57\n"


def test_what_is_written_reads_back_equal(tmp_path):
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.uniform(-1, 1242, (50, 2, 2)), axis=1).reshape(50, 4).astype(np.float32).astype(np.float64)
    scores = np.concatenate([rng.uniform(0, 1, 47), [1e-17, -3.0, 1.0]])
    written = Detections([CLASSES[i % 3] for i in range(50)], boxes, scores)
    write_results(tmp_path / "000001.txt", written)
    read = read_results(tmp_path / "000001.txt")
    assert read.types == written.types
    assert (read.boxes == boxes).all() and (read.scores == scores).all()
    first = (tmp_path / "000001.txt").read_text().splitlines()[0].split()
    assert first[:4] + first[8:15] == ["Car", "-1", "-1", "-10", "-1", "-1", "-1", "-1000", "-1000", "-1000", "-10"]
    write_results(tmp_path / "000001.txt", Detections([], np.zeros((0, 4)), np.zeros(0)))
    assert (tmp_path / "000001.txt").read_bytes() == b""
    assert len(read_results(tmp_path / "000001.txt").scores) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["000001.txt"]


def test_type_in_any_case_and_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"\n{LINE.replace('Car', 'pedesTRIAN')}\r\n\n{LINE.replace('Car', 'dontcare')}")
    assert read_results(path).types == ["Pedestrian", "DontCare"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (LINE.rsplit(" ", 1)[0], "15 fields are a label without a score"),
        (LINE + " 1", "17 fields"),
        (LINE.replace("Car", "Lorry"), "unknown type 'Lorry'"),
        (LINE.replace("0.75", "nan"), "score is 'nan', not a finite number"),
        (LINE.replace("60.5", "inf"), "right is 'inf'"),
        (LINE.replace("60.5", "9.5"), "the box ends before it begins"),
        (LINE.replace(" 50 ", " 19 "), "the box ends before it begins"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.txt"
    path.write_text(f"{LINE}\n{line}\n")
    with pytest.raises(ValueError, match=message) as error:
        read_results(path)
    assert str(error.value).startswith(f"{path}:2: ")


@pytest.fixture
def folders(tmp_path):
    """50 images, a car in each; results for the first 45, of which 2 are wrong."""
    labels, results = tmp_path / "label_2", tmp_path / "results"
    labels.mkdir()
    results.mkdir()
    for i in range(50):
        (labels / f"{i:06d}.txt").write_text(LABEL)
    for i in range(45):
        right = 500 if i in (3, 4) else 60
        (results / f"{i:06d}.txt").write_text(LINE.replace("60.5", str(right)).replace(" 50 ", " 70 ") + "\n")
    return labels, results


def run(project, *arguments):
    return subprocess.run(
        [sys.executable, str(project / "tools" / "evaluate_kitti.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )


def test_only_images_with_a_result_count(folders):
    result, num_images = evaluate_folders(*folders)
    assert num_images == 45
    # One threshold, 0.75, 43 times: 43 right of 45, at recall points 0 to 38 (thresholds nearest to 43/45 recall).
    expected = 100 * 43 / 45
    assert result["Car"]["easy"]["R40"] == pytest.approx(expected * 38 / 40)
    assert result["Car"]["easy"]["R11"] == pytest.approx(expected * 10 / 11)


def test_the_command(folders, project, tmp_path):
    labels, results = folders
    done = run(project, "--labels", labels, "--results", results, "--json", tmp_path / "ap.json")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "ap.json").read_text())
    assert written == evaluate_folders(*folders)[0]
    assert list(written) == ["Car", "Pedestrian", "Cyclist"]
    assert list(written["Car"]) == ["easy", "moderate", "hard", "AP50_voc"]
    assert {tuple(written["Car"][level]) for level in ("easy", "moderate", "hard")} == {("R40", "R11")}
    # 43 of 45 cars, with 2 false detections of equal score at places 4 and 5.
    assert written["Car"]["AP50_voc"] == pytest.approx(100 * (3 + 40 * 43 / 45) / 45)
    assert "45 images" in done.stdout and f"{written['Car']['hard']['R11']:.2f}" in done.stdout
    (results / "000002.txt").write_text(LINE + "\nCar\n")
    done = run(project, "--labels", labels, "--results", results)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {results}/000002.txt:2: 1 field, a")


def test_images_without_a_result_file(main_of_tool, capsys, tmp_path):
    """A detector that writes no file for an image where it found nothing: half of the cars are found."""
    labels, results, ids = tmp_path / "label_2", tmp_path / "results", tmp_path / "list.txt"
    labels.mkdir()
    results.mkdir()
    for i in range(200):
        (labels / f"{i:06d}.txt").write_text(LABEL)
    for i in range(100):
        (results / f"{i:06d}.txt").write_text(LINE.replace(" 50 ", " 70 ") + "\n")
    ids.write_text("".join(f"{i:06d}\n" for i in range(90, 110)))

    def evaluate(*options):
        path = tmp_path / "ap.json"
        assert not main_of_tool("evaluate_kitti.py", "--labels", labels, "--results", results, "--json", path, *options)
        return json.loads(path.read_text())["Car"]["easy"]["R40"], *capsys.readouterr()

    found, said, warned = evaluate()
    assert found == pytest.approx(100) and "100 images:" in said
    assert warned.startswith("warning: 100 images without a result file left out") and "--missing-as-empty" in warned
    found, said, warned = evaluate("--missing-as-empty")
    assert found == pytest.approx(50) and "200 images:" in said and warned == ""
    # Only the images of a list.
    _, said, warned = evaluate("--list", ids)
    assert "10 images:" in said and warned.startswith("warning: 10 images without a result file")
    _, said, warned = evaluate("--list", ids, "--missing-as-empty")
    assert "20 images:" in said and warned == ""
    ids.write_text("000150\n")
    assert main_of_tool("evaluate_kitti.py", "--labels", labels, "--results", results, "--list", ids) == 1
    assert "holds no result file" in capsys.readouterr().err


def test_missing_folders_and_labels(folders, tmp_path):
    labels, results = folders
    with pytest.raises(FileNotFoundError, match="no folder of result files at .*nowhere"):
        evaluate_folders(labels, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no folder of label files at .*nowhere"):
        evaluate_folders(tmp_path / "nowhere", results)
    (labels / "000007.txt").unlink()
    with pytest.raises(FileNotFoundError, match="results/000007.txt: its image has no labels"):
        evaluate_folders(labels, results)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no result file"):
        evaluate_folders(labels, tmp_path / "empty")
