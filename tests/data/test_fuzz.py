"""Hostile input to every reader: accepted by the documented rules, or refused with the file and the line.

A few hundred inputs here; ``make fuzz`` sets FUZZ_EXAMPLES to many more for each reader.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from kitti_folder import write_kitti

from gkd_d2.data.datasets.coco_traffic import TRAFFIC_IDS, load_coco_traffic
from gkd_d2.data.datasets.kitti import load_kitti
from gkd_d2.data.datasets.kitti_labels import CLASSES, IGNORED_TYPES, read_labels
from gkd_d2.data.prepare.coco_traffic import prepare_coco_traffic
from gkd_d2.data.prepare.kitti import unpack
from gkd_d2.evaluation.kitti_metric import average_precision
from gkd_d2.evaluation.kitti_overlaps import GroundTruth
from gkd_d2.evaluation.kitti_results import read_results

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "80")),
    deadline=None,
    database=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    logging.getLogger("gkd_d2").setLevel(logging.ERROR)
    yield tmp_path_factory.mktemp("fuzz")
    logging.getLogger("gkd_d2").setLevel(logging.NOTSET)


def damaged(content: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    """Content with bytes replaced, inserted, cut out, or cut off, at places given as shares of its length."""
    for kind, share, new in edits:
        place = int(share * len(content))
        if kind == "replace":
            content = content[:place] + new + content[place + len(new) :]
        elif kind == "insert":
            content = content[:place] + new + content[place:]
        elif kind == "remove":
            content = content[:place] + content[place + 3 * len(new) :]
        else:
            content = content[:place]
    return content


edits = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "remove", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(max_size=8),
    ),
    max_size=3,
)
hostile_numbers = st.sampled_from(
    ["nan", "NaN", "inf", "-inf", "1e999", "-1e999", "1e308", "-0", "0x10", "1_0", "١", "+", ".", "e5", "1e-400",
     "99999999999999999999", "-1", "0.5", "1,5", "--1", "1e5"]
)  # fmt: skip


def outcome(path, function):
    """What the reader returns, or None where it refuses as documented."""
    try:
        result = function()
        event("accepted")  # pytest --hypothesis-show-statistics prints the shares
        return result
    except (ValueError, OSError) as error:
        event("refused")
        assert str(path) in str(error), f"{type(error).__name__} without the file: {error}"
        return None


# KITTI's text files

ordinary_numbers = st.one_of(
    st.integers(-2, 220).map(str), st.floats(-5, 220).map(lambda v: f"{v:.2f}"), st.sampled_from(["0", "0.00", "3"])
)


def lines_of(num_fields):
    token = st.one_of(
        *[ordinary_numbers] * 8, hostile_numbers, st.text(max_size=3), st.sampled_from(["\x00", "\x1c", " ", "\u2003"])
    )
    kind = st.one_of(st.sampled_from([*CLASSES, *IGNORED_TYPES, "car", "DONTCARE"]), st.text(max_size=4))
    # Often right as a whole: sizes are then positive and within 200 x 100 pixels.
    box = st.tuples(st.floats(0, 90), st.floats(0, 40), st.floats(0.01, 110), st.floats(0.01, 60)).map(
        lambda v: [f"{x!r}" for x in (v[0], v[1], v[0] + v[2], v[1] + v[3])]
    )
    right = st.tuples(kind, st.sampled_from(["0", "0.5", "1"]), st.sampled_from(["0", "1", "2", "3"]), box).map(
        lambda v: [v[0], v[1], v[2], "0.1", *v[3], *["1.5"] * (num_fields - 8)]
    )
    count = st.one_of(st.just(num_fields - 1), st.integers(0, 18))
    wrong = st.tuples(kind, count.flatmap(lambda n: st.lists(token, min_size=n, max_size=n))).map(
        lambda v: [v[0], *v[1]]
    )
    one_hostile = st.tuples(right, st.integers(0, num_fields - 1), token).map(
        lambda v: [*v[0][: v[1]], v[2], *v[0][v[1] + 1 :]]
    )
    line = st.one_of(right, right, one_hostile, wrong).map(" ".join)
    end = st.sampled_from(["\n", "\n", "\r\n", "", "\n\n"])
    return st.lists(st.tuples(line, end), max_size=4).map(lambda v: "".join(a + b for a, b in v))


def content_of(text_strategy):
    return st.tuples(text_strategy, st.one_of(st.just([]), st.just([]), edits)).map(
        lambda v: damaged(v[0].encode("utf-8", "surrogatepass"), v[1])
    )


def text_lines(content: bytes) -> list[str]:
    """Lines by the rule that is documented: any line end, the last one optional."""
    text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    return text.split("\n")[: -1 if text.endswith("\n") or not text else None]


@fuzz
@given(content=content_of(lines_of(15)))
def test_labels(folder, content):
    path = folder / "000000.txt"
    path.write_bytes(content)
    objects = outcome(f"{path}:", lambda: read_labels(path, (200, 100)))
    if objects is None:
        return
    lines = text_lines(content)
    assert len(objects) == len(lines)
    for obj, line in zip(objects, lines):
        fields = line.split()
        assert obj["type"] == fields[0] and obj["type"] in CLASSES + IGNORED_TYPES
        assert obj["bbox"] == [float(text) for text in fields[4:8]]
        left, top, right, bottom = obj["bbox"]
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 100
        assert (obj["truncation"], obj["occlusion"]) == (float(fields[1]), float(fields[2]))


@fuzz
@given(content=content_of(lines_of(16)))
def test_results(folder, content):
    path = folder / "000001.txt"
    path.write_bytes(content)
    found = outcome(f"{path}:", lambda: read_results(path))
    if found is None:
        return
    lines = [line for line in text_lines(content) if line.split()]
    assert len(found.types) == len(found.boxes) == len(found.scores) == len(lines)
    assert [kind.lower() for kind in found.types] == [line.split()[0].lower() for line in lines]
    assert found.scores.tolist() == [float(line.split()[15]) for line in lines]
    assert all(map(math.isfinite, found.boxes.ravel()))
    truth = GroundTruth.from_objects([{"type": "Car", "bbox": [0, 0, 50, 50], "truncation": 0, "occlusion": 0}])
    result = average_precision([truth], [found])
    assert all(0 <= v <= 100 for kind in result.values() for level in kind.values() for v in level.values())


@pytest.fixture(scope="module")
def small_root(folder) -> Path:
    return write_kitti(folder / "kitti", dict.fromkeys("abcd", ""), {"val": "d\n"})


list_ids = st.one_of(*[st.sampled_from("abc")] * 3, st.sampled_from(["d", "", " ", "../a", "a/../a", "\x00", "A"]))
lists = st.one_of(
    st.permutations("abc").map("\n".join),
    st.lists(st.tuples(list_ids, st.sampled_from(["\n", "\n", "\r\n", " \n", ""])), max_size=4).map(
        lambda v: "".join(a + b for a, b in v)
    ),
)


@fuzz
@given(content=content_of(lists))
def test_lists(small_root, content):
    path = small_root / "ImageSets/train.txt"
    path.write_bytes(content)
    # A wrong id is named with its line here or there, where it is listed twice.
    records = outcome(f"{path.parent}/", lambda: load_kitti(small_root, "train"))
    if records is not None:
        assert [record["image_id"] for record in records] == [line.strip() for line in text_lines(content)]
        assert len({record["image_id"] for record in records}) == len(records) > 0


# COCO's JSON

NAMES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 6: "bus", 7: "train", 8: "truck", 10: "traffic light",
    11: "fire hydrant", 13: "stop sign", 14: "parking meter", 17: "cat", 18: "dog", 44: "bottle",
}  # fmt: skip
hostile_values = st.one_of(
    st.sampled_from([None, True, -1, 0, 2**70, 1e308, "3", "", [], {}, [[]], [[1, "x"]], {"size": [80, 100]}]),
    st.sampled_from(
        [float("nan"), float("inf"), [1, 2, 3, float("nan")], [0, 0, 1e308, 1e308], [1, 2, -3, 4], 10**400]
    ),
    st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda v: st.lists(v, max_size=3), max_leaves=5),
)
annotations = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.integers(1, 12),
            "image_id": st.sampled_from([1, 1, 2, 2, 3]),
            "category_id": st.sampled_from(list(NAMES)),
            "bbox": st.one_of(
                st.tuples(st.floats(0, 40), st.floats(0, 40), st.floats(0, 60), st.floats(0, 40)).map(list),
                st.tuples(st.floats(0, 40), st.floats(0, 40), st.floats(0, 60), st.floats(0, 40)).map(list),
                st.tuples(*[st.floats(-20, 120, width=16)] * 4).map(list),
            ),
            "area": st.sampled_from([1, 2.5, 0]),
            "iscrowd": st.sampled_from([0, 0, 1]),
        },
        optional={
            "segmentation": st.sampled_from([[], [[1, 1, 5, 1, 5, 5]], [[1, 2]], {"size": [80, 100], "counts": "x"}])
        },
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda annotation: annotation["id"],
)
places = st.tuples(
    st.sampled_from(["images", "annotations", "categories", "licenses"]), st.integers(0, 3),
    st.sampled_from(["id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "width", "file_name",
                     "name", "keypoints", ""]),
)  # fmt: skip


@st.composite
def coco_files(draw):
    data = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 80} for i in (1, 2, 3)],
        "annotations": draw(annotations),
        "categories": [{"id": i, "name": name} for i, name in NAMES.items()],
    }
    for (part, index, key), value in draw(st.lists(st.tuples(places, hostile_values), max_size=2)):
        items = data.get(part)
        if key == "" or not isinstance(items, list) or not items:
            data[part] = value
        elif isinstance(items[index % len(items)], dict):
            items[index % len(items)][key] = value
    return damaged(json.dumps(data).encode(), draw(st.one_of(st.just([]), st.just([]), edits)))


@fuzz
@given(content=coco_files())
def test_coco(folder, content):
    source, target = folder / "source.json", folder / "target.json"
    source.write_bytes(content)
    target.unlink(missing_ok=True)
    summary = outcome(f"{source}: ", lambda: prepare_coco_traffic(source, target))
    assert (summary is None) == (not target.exists())
    assert not list(folder.glob("*.tmp"))
    if summary is None:
        return
    data = json.loads(content)
    traffic = {a["image_id"] for a in data["annotations"] if a["category_id"] in TRAFFIC_IDS}
    kept = [a for a in data["annotations"] if a["image_id"] in traffic and a["category_id"] != 44]
    made = json.loads(target.read_text(encoding="utf-8"))["annotations"]
    assert [(a["id"], a["bbox"]) for a in made] == [(a["id"], a["bbox"]) for a in kept]
    assert summary.objects.total() == len(kept) and summary.num_images == len(traffic)
    # What is written is read by the same rules and by Detectron2.
    records = load_coco_traffic(target, folder, "fuzz_coco_traffic", "thirteen")
    boxes = [a["bbox"] for record in records for a in record["annotations"]]
    assert len(records) == len(traffic) and all(map(math.isfinite, sum(boxes, [])))


# Archives

right_names = st.sampled_from(
    [f"{part}/{i:06d}.txt" for i in range(9) for part in ("training/label_2", "testing/image_2")]
)
entry_names = st.one_of(
    *[right_names] * 4,
    st.sampled_from(
        ["../x.txt", "training/label_2/../../../x.txt", "/x.txt", "training/", "training/label_2/", "testing/x.txt",
         "..", "training/label_2/a.txt/b.txt", "training\\label_2\\a.txt", "training/image_2/a.png",
         "training/label_2/a.txt/"]
    ),
    # zipfile can't write the others; a change of bytes may make them.
    st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=5),
)  # fmt: skip
entry_lists = st.one_of(
    *(
        st.lists(
            st.tuples(names, st.binary(max_size=40), st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])),
            max_size=4,
        )
        for names in (right_names, entry_names)
    )
)


@fuzz
@given(entries=entry_lists, changes=st.one_of(st.just([]), edits))
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives(folder, entries, changes):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content, compression in entries:
            file.writestr(name, content, compression)
    ground = folder / "archives"
    shutil.rmtree(ground, ignore_errors=True)
    ground.mkdir()
    archive, root = ground / "a.zip", ground / "kitti"
    archive.write_bytes(damaged(buffer.getvalue(), changes))
    count = outcome(archive, lambda: unpack(archive, root))
    assert {path.name for path in ground.iterdir()} <= {"a.zip", "kitti"}
    files = [path for path in root.rglob("*") if not path.is_dir()]
    assert not any(path.name.endswith(".tmp") for path in files)
    assert {path.parent.relative_to(root).as_posix() for path in files} <= {
        f"{part}/{kind}" for part in ("training", "testing") for kind in ("image_2", "label_2")
    }
    if count is not None:
        assert count == len(files) > 0
        with zipfile.ZipFile(archive) as file:
            for path in files:
                assert path.read_bytes() == file.read(path.relative_to(root).as_posix())
