"""Writers of metrics.json and TensorBoard on a disk that fills up, and what a resume makes of it."""

import json
import resource
from pathlib import Path

import pytest
from detectron2.utils.events import EventStorage

from gkd_d2.engine.output import OutputError
from gkd_d2.engine.trainer import Trainer
from gkd_d2.engine.writers import build_writers

FULL = Path("/dev/full")
pytestmark = [
    pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full"),
    # TensorBoard's thread tells of its error in its own way, too, and late.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


def write(writers, iteration):
    with EventStorage(iteration) as storage:
        storage.put_scalar("total_loss", 1.0)
        for writer in writers:
            writer.write()


@pytest.mark.parametrize("start", ["", '{"iteration": 1}\n', '{"iteration": 1}\n{"iterat', '{"iteration": 1}'])
def test_a_resume_ends_a_line_that_was_cut(start, tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(start)
    writers = build_writers(str(tmp_path), 5)
    write(writers, 2)
    for writer in writers:
        writer.close()
    *earlier, last = path.read_text().splitlines()
    assert json.loads(last) == {"iteration": 2, "total_loss": 1.0}
    assert earlier == start.splitlines()


def test_metrics_that_can_not_be_written_are_named_once(tmp_path):
    path = tmp_path / "metrics.json"
    path.symlink_to(FULL)
    (tmp_path / "model_0000001.pth").touch()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    writers = build_writers(str(tmp_path), 5)
    with pytest.raises(OutputError) as error:
        write(writers, 2)
    assert str(error.value) == (
        f"{path} can't be written (No space left on device). The last whole checkpoint is "
        f"{tmp_path}/model_0000001.pth: --resume goes on from it"
    )
    # As the trainer does at its end; the others still write what they have.
    write(writers, 3)
    for writer in writers:
        writer.close()


def test_tensorboards_file_that_can_not_be_written_is_named(tmp_path):
    writers = build_writers(str(tmp_path), 5)
    write(writers, 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Of both files; TensorBoard's thread tells of it when it is closed at the latest.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        with pytest.raises(OutputError) as error:
            write(writers[2:], 3)
            writers[2].close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(error.value) == (
        f"TensorBoard's file in {tmp_path} can't be written (File too large). {tmp_path} holds no checkpoint to go on "
        "from"
    )
    writers[1].close()


def test_a_training_ends_with_the_error_of_its_writer(training, tmp_path):
    """Detectron2's printer fails at the end of a training that failed in its first iterations."""
    cfg = training(iterations=1)
    (tmp_path / "output" / "metrics.json").symlink_to(FULL)
    with pytest.raises(OutputError, match=r"metrics.json can't be written .* checkpoint is .*/model_final.pth: "):
        Trainer(cfg).train()


def test_a_list_of_checkpoints_that_can_not_be_written_is_named(training, tmp_path):
    cfg = training(iterations=1)
    (tmp_path / "output" / "last_checkpoint.partial").mkdir()
    with pytest.raises(OutputError, match=r"output/last_checkpoint.partial can't be written \(Is a directory\)"):
        Trainer(cfg).train()


def test_a_folder_in_place_of_metrics_is_named(tmp_path):
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(OutputError, match=r"metrics.json can't be written \(Is a directory\)"):
        build_writers(str(tmp_path), 5)
