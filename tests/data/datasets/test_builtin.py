"""Names of datasets: what is registered, where it is looked for, and the check before training."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from gkd_d2.data.datasets import builtin
from gkd_d2.data.datasets.builtin import check_datasets, register_kitti, resolve_root
from gkd_d2.data.toy import make_toy_kitti

BUILTIN = ["kitti_train", "kitti_val", "toy_kitti_train", "toy_kitti_val"]


@pytest.fixture
def forget():
    """Take names out of the catalogs after the test."""
    names: list[str] = []
    yield names
    for name in names:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


@pytest.fixture(scope="module")
def toy_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("datasets") / "toy_kitti"
    make_toy_kitti(root, num_train=2, num_val=1, image_size=(160, 64))
    return root


def test_builtin_names_and_metadata() -> None:
    for name in BUILTIN:
        assert name in DatasetCatalog
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == ["Car", "Pedestrian", "Cyclist"]
        assert metadata.evaluator_type == "kitti"


def test_importing_again_registers_nothing_twice() -> None:
    importlib.reload(builtin)


def test_the_environment_is_read_when_the_data_is(toy_root: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(toy_root.parent))
    assert [record["image_id"] for record in DatasetCatalog.get("toy_kitti_train")] == ["000000", "000001"]
    assert [record["image_id"] for record in DatasetCatalog.get("toy_kitti_val")] == ["500000"]
    check_datasets(["toy_kitti_train", "toy_kitti_val"])
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"no KITTI dataset at {tmp_path}/toy_kitti"):
        check_datasets(["toy_kitti_train"])
    with pytest.raises(FileNotFoundError, match=f"no KITTI dataset at {tmp_path}/toy_kitti"):
        DatasetCatalog.get("toy_kitti_val")


def test_resolve_root(monkeypatch) -> None:
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert resolve_root("$DETECTRON2_DATASETS/kitti") == Path("datasets/kitti")
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/data")
    assert resolve_root("$DETECTRON2_DATASETS/kitti") == Path.home() / "data/kitti"
    assert resolve_root("/a/$DETECTRON2_DATASETS") == Path("/a/$DETECTRON2_DATASETS")


def test_a_folder_of_ones_own(toy_root: Path, forget: list[str]) -> None:
    forget += ["mine_train", "mine_val"]
    register_kitti("mine", toy_root)
    register_kitti("mine", toy_root)  # a notebook cell run twice
    assert len(DatasetCatalog.get("mine_train")) == 2
    check_datasets(["mine_train", "mine_val"])
    with pytest.raises(ValueError, match=f"'mine_train' is registered already, for {toy_root}.*choose another prefix"):
        register_kitti("mine", "/elsewhere")


def test_a_name_that_someone_else_registered(forget: list[str]) -> None:
    forget += ["taken_train", "taken_val"]
    DatasetCatalog.register("taken_train", list)
    with pytest.raises(ValueError, match="'taken_train' is registered already, for a dataset of another form"):
        register_kitti("taken", "/data")


def test_check_datasets_names_what_is_not_registered() -> None:
    with pytest.raises(KeyError, match="'kitty_train' is not registered.*kitti_train"):
        check_datasets(["kitty_train"])
