"""Short real trainings on toy scenes."""

import pytest
from detectron2.data import MetadataCatalog
from tiny import TOY_SCENES

from gkd_d2.data.toy import make_toy_kitti


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A datasets folder with a few toy scenes."""
    folder = tmp_path_factory.mktemp("datasets")
    make_toy_kitti(folder / "toy_kitti", TOY_SCENES, 1, 0, image_size=(160, 64))
    return folder


@pytest.fixture
def training(datasets, tmp_path, monkeypatch, distiller_config):
    """A function that makes the config of a short training."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))

    def make(kind="retinanet", *, iterations, **options):
        cfg = distiller_config(kind, **options)
        cfg.GKD.FEATURES = ["p3", "p4"]
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy_kitti_train",), ()
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (64,), 160
        cfg.SOLVER.IMS_PER_BATCH = 1
        cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = iterations, ()
        cfg.OUTPUT_DIR = str(tmp_path / "output")
        (tmp_path / "output").mkdir()
        return cfg

    yield make
    # An evaluation has left its ground truth there, which is the process's own.
    vars(MetadataCatalog.get("toy_kitti_val")).pop("json_file", None)
