import pytest

from gkd_d2.data.toy import make_toy_kitti
from gkd_d2.lazy.read import read_lazy


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory):
    """Six small scenes for training and two for evaluation."""
    folder = tmp_path_factory.mktemp("lazy_data")
    make_toy_kitti(folder / "toy_kitti", 6, 2, image_size=(160, 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(folder))
        yield folder


@pytest.fixture
def read(toy_data):
    """A function that reads the LazyConfig of a training."""
    return lambda path, *overrides: read_lazy(str(path), overrides, eval_only=False)
