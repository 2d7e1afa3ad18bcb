"""What can't be exported is an error before anything is written."""

import logging
import resource

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import cat

from gkd_d2.export import Forms, export_student
from gkd_d2.export.checkpoint import stock_config, to_half
from gkd_d2.modeling.student import load_student


def keys(cfg, start=""):
    for key, value in cfg.items():
        yield start + key
        if hasattr(value, "items"):
            yield from keys(value, f"{start}{key}.")


def test_config_has_the_keys_of_a_stock_config_alone(distiller_config, tmp_path):
    cfg = distiller_config("faster")
    cfg.MODEL.DEVICE = "cuda"
    cfg.MODEL.MINE = 1
    cfg.SOLVER.MAX_ITER = 77
    cfg.OUTPUT_DIR = "output/gkd_frcnn"
    plain = stock_config(cfg, tmp_path / "model.pth")
    assert list(keys(plain)) == list(keys(get_cfg()))
    assert plain.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    assert plain.MODEL.WEIGHTS == str(tmp_path / "model.pth")
    assert plain.OUTPUT_DIR == get_cfg().OUTPUT_DIR
    # The rest is as it was, the device that the student was trained on too.
    assert plain.MODEL.DEVICE == "cuda"
    assert plain.MODEL.RPN == cfg.MODEL.RPN
    assert plain.INPUT == cfg.INPUT
    assert plain.SOLVER.MAX_ITER == 77


def test_an_export_stays_unless_forced(retinanet, tmp_path):
    cfg, path = retinanet
    output = tmp_path / "out"
    export_student(cfg, path, output)
    (output / "model.ts").write_text("of an earlier export")
    first = (output / "model.pth").read_bytes()
    with pytest.raises(FileExistsError, match=r"out holds model.pth, config.yaml, model.ts already: .* --force"):
        export_student(cfg, path, output, Forms(half=True))
    assert (output / "model.pth").read_bytes() == first
    export_student(cfg, path, output, Forms(half=True), force=True)
    assert len((output / "model.pth").read_bytes()) < 0.6 * len(first)
    # It would not be the script of the new weights.
    assert not (output / "model.ts").exists()


def test_an_export_that_can_not_be_written_changes_nothing(retinanet, tmp_path):
    cfg, path = retinanet
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    export_student(cfg, path, tmp_path / "out")
    kept = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        for folder in ("out", "new/below"):
            with pytest.raises(OSError, match=rf"{folder}/model.pth can't be written \(.*File too large\)"):
                export_student(cfg, path, tmp_path / folder, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == kept
    assert not (tmp_path / "new").exists()


def test_a_run_is_not_replaced_by_its_export(retinanet, tmp_path):
    cfg, path = retinanet
    (tmp_path / "config.yaml").write_text(cfg.dump())
    with pytest.raises(ValueError, match="is the folder of the checkpoint, whose config.yaml must stay"):
        export_student(cfg, path, tmp_path, force=True)
    assert (tmp_path / "config.yaml").read_text() == cfg.dump()
    assert not (tmp_path / "model.pth").exists()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda state: state.pop("head.cls_score.bias"), ValueError, "fit the student .* unset: head.cls_score.bias"),
        (
            lambda state: state["head.cls_score.weight"].fill_(7e4),
            ValueError,
            "up to 7e.04, beyond the 65504 .* --fp16",
        ),
    ],
)
def test_nothing_is_written_where_something_is_wrong(retinanet, tmp_path, spoil, error, message):
    cfg, path = retinanet
    state = torch.load(path)["model"]
    spoil(state)
    torch.save({"model": state}, path)
    with pytest.raises(error, match=message):
        export_student(cfg, path, tmp_path / "out", Forms(half=True))
    assert not (tmp_path / "out").exists()


def test_missing_and_broken_checkpoints_are_named(retinanet, tmp_path):
    cfg, path = retinanet
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no last_checkpoint: name a checkpoint"):
        load_student(cfg, tmp_path / "empty")
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint .*model_0000009.pth"):
        load_student(cfg, tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="the checkpoint .*model_final.pth is damaged: it ends too early"):
        load_student(cfg, path)


def test_a_folder_whose_last_checkpoint_is_unreadable_gives_its_newest(retinanet, tmp_path, caplog, monkeypatch):
    cfg, path = retinanet
    # A tool that ran in this process may have turned it off.
    monkeypatch.setattr(logging.getLogger("gkd_d2"), "propagate", True)
    (tmp_path / "last_checkpoint").write_bytes(b"\xff")
    state = load_student(cfg, tmp_path).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in torch.load(path)["model"].items() if name in state)
    assert f"{tmp_path}/last_checkpoint is no text: {path} is taken, the newest checkpoint there" in caplog.text


def test_half_precision_changes_the_outputs_a_little(retinanet, tmp_path):
    cfg, path = retinanet
    exact = load_student(cfg, path)
    rounded = load_student(cfg, export_student(cfg, path, tmp_path / "out", Forms(half=True))["checkpoint"])
    state = torch.load(tmp_path / "out" / "model.pth")["model"]
    assert {value.dtype for value in state.values()} == {torch.float16, torch.int64}
    image = 255 * torch.rand(1, 3, 96, 128)
    outputs = []
    for model in (exact, rounded):
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        features = model.backbone((image - model.pixel_mean) / model.pixel_std)
        outputs.append(cat([level.flatten() for part in model.head(list(features.values())) for level in part]))
    difference = (outputs[0] - outputs[1]).abs().max().item()
    assert 0 < difference < 2e-3 * outputs[0].abs().max().item()


def test_half_precision_keeps_the_modules_versions(retinanet):
    state = load_student(*retinanet).state_dict()
    assert to_half(state)._metadata == state._metadata


def test_another_run_is_not_replaced_either(retinanet, tmp_path):
    cfg, path = retinanet
    other = tmp_path / "other"
    (other / "inference").mkdir(parents=True)
    (other / "model_0000009.pth").write_bytes(path.read_bytes())
    (other / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(ValueError, match="other is the folder of a run, whose config.yaml must stay"):
        export_student(cfg, path, other, force=True)
    assert (other / "inference").is_dir()


def test_a_forced_export_leaves_nothing_of_the_one_before(retinanet, tmp_path):
    cfg, path = retinanet
    output = tmp_path / "out"
    (output / "inference" / "ONNX").mkdir(parents=True)
    for name in ("model_ema.pth", "model_int8.onnx", "export.md", "notes.txt"):
        (output / name).write_text("of an earlier export")
    with pytest.raises(FileExistsError, match="out holds model_ema.pth, model_int8.onnx, export.md, inference already"):
        export_student(cfg, path, output)
    export_student(cfg, path, output, force=True)
    assert {file.name for file in output.iterdir()} == {"model.pth", "config.yaml", "notes.txt"}


def test_a_folder_in_the_place_of_a_file_is_left_alone(retinanet, tmp_path):
    cfg, path = retinanet
    (tmp_path / "out" / "model.onnx").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="out/model.onnx is a folder, where a file would be written"):
        export_student(cfg, path, tmp_path / "out", force=True)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.onnx"]


def test_raw_weights_are_exported_where_the_averaged_ones_are_damaged(retinanet, tmp_path, caplog, monkeypatch):
    cfg, path = retinanet
    monkeypatch.setattr(logging.getLogger("gkd_d2"), "propagate", True)
    state = torch.load(path)["model"]
    averaged = {name: value / 0 if value.is_floating_point() else value for name, value in state.items()}
    torch.save({"model": state, "ema_state": averaged}, path)
    written = export_student(cfg, path, tmp_path / "out")
    assert {*written} == {"checkpoint", "config"}
    assert "model_ema.pth is not written" in caplog.text and "averaged weights" in caplog.text
    with pytest.raises(ValueError, match="averaged weights"):
        export_student(cfg, path, tmp_path / "averaged", Forms(ema=True))
