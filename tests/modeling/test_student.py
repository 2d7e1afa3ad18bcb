"""The plain detector of a checkpoint, by its raw weights or by their average."""

import pytest
import torch
from detectron2.modeling import build_model
from tiny import calm

from gkd_d2.modeling.student import has_ema, load_student
from gkd_d2.utils.checkpoint import CheckpointError


@pytest.mark.parametrize("channels", [16, 8])
def test_averaged_weights_of_a_distilled_student(channels, distiller_config, tmp_path):
    cfg = distiller_config("retinanet", channels=channels)
    raw = calm(build_model(cfg)).state_dict()
    average = {name: tensor + 1 for name, tensor in raw.items() if not name.startswith("align.")}
    assert (len(average) < len(raw)) == (channels == 8)
    torch.save({"model": raw, "ema_state": average}, tmp_path / "model_0000001.pth")
    torch.save({"model": raw}, tmp_path / "model_final.pth")
    for last, path in (("model_0000001.pth", tmp_path), ("model_final.pth", tmp_path / "model_0000001.pth")):
        (tmp_path / "last_checkpoint").write_text(last)
        assert has_ema(path)
        for ema, expected in ((False, raw), (True, average)):
            state = load_student(cfg, path, ema=ema).state_dict()
            assert state.keys() == average.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert not has_ema(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"^\S*model_final.pth holds no averaged weights: it was trained without MO"
    ):
        load_student(cfg, tmp_path, ema=True)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint .*none.pth"):
        has_ema(tmp_path / "none.pth")
