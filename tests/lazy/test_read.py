"""What is said of LazyConfigs that can't be used."""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from lazy_configs import model_text, write_plain

from gkd_d2 import add_gkd_config
from gkd_d2.lazy.read import read_lazy


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return str(write_plain(tmp_path_factory.mktemp("configs")))


def test_what_is_left_out_has_its_default(plain):
    cfg = read_lazy(plain, [], eval_only=False)
    assert (cfg.train.accumulate_steps, cfg.train.watch.period, cfg.train.watch.patience) == (1, 2, 20)
    assert cfg.train.ddp.broadcast_buffers is False and cfg.train.amp.dtype == "float16"
    # Those of yacs.
    yacs = get_cfg()
    add_gkd_config(yacs)
    assert dict(cfg.train.balance) == {"start": -1, "iters": yacs.GKD.BALANCE_ITERS, "max": yacs.GKD.BALANCE_MAX}
    assert dict(cfg.train.model_ema) == {key.lower(): value for key, value in yacs.MODEL_EMA.items()}


def test_auto_is_the_device_that_is_there(plain):
    device = read_lazy(plain, ["train.device=auto"], eval_only=False).train.device
    assert device == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.max_itr=5"], r"sets train.max_itr, which the config does not have: did you mean train.max_iter\?"),
        (["trian.max_iter=5"], "'trian.max_iter=5' sets trian.max_iter, which the config does not have"),
        (["model.num_clases=5"], r"model.num_clases, .* did you mean model.num_classes\?"),
        (["SOLVER.BASE_LR", "0.1"], "'SOLVER.BASE_LR' is no override of a LazyConfig: write key=value"),
        (["train.device=gpu"], "train.device is 'gpu', which torch does not know"),
        (["train.max_iter=0"], "train.max_iter is 0, but must be at least 1"),
        (["train.max_iter=abc"], "train.max_iter is 'abc', but must be of the type int, as 90000"),
        (["train.amp=True"], "train.amp.enabled is None, but must be of the type bool"),
        (["train.seed=null"], "train.seed is None, but must be of the type int"),
        (["train.eval_period=True"], "train.eval_period is True, but must be of the type int"),
        (["train.clip_gradients.clip_type=foo"], "clip_type is 'foo', but must be 'value' or 'norm'"),
        (["train.clip_gradients.clip_value=0"], "clip_value is 0, but must be > 0"),
        (["train.balance.start=-2"], "train.balance.start is -2, but must be at least -1"),
        (["train.balance.iters=0"], "train.balance.iters is 0, but must be at least 1"),
        (["train.balance.iters=64.0"], "train.balance.iters is 64.0, but must be of the type int"),
        (["train.balance.max=0"], "train.balance.max is 0, but must be > 0"),
        (["train.balance.max=nan"], "train.balance.max is nan, but must be > 0"),
        (["train.max_iter=[1"], r"the override 'train.max_iter=\[1' can't be applied"),
    ],
)
def test_overrides_that_mean_nothing(overrides, message, plain):
    with pytest.raises(ValueError, match=message):
        read_lazy(plain, overrides, eval_only=False)


def test_no_cap_is_infinite(plain):
    assert read_lazy(plain, ["train.balance.max=inf"], eval_only=False).train.balance.max == float("inf")


def test_arguments_that_a_config_leaves_out_can_be_set(plain):
    overrides = ["model.test_score_thresh=0.3", "dataloader.train.aspect_ratio_grouping=False"]
    overrides += ["train.ddp.static_graph=True", "+train.of_another_program=1", "model.head_in_features.0=p3"]
    cfg = read_lazy(plain, overrides, eval_only=False)
    assert cfg.train.ddp.static_graph is True and cfg.train.of_another_program == 1
    assert cfg.model.test_score_thresh == 0.3 and cfg.dataloader.train.aspect_ratio_grouping is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = 3", "is no LazyConfig of a detector: it has no `model`"),
        ("a = 1\n1 / 0", "can't be read as a LazyConfig: ZeroDivisionError: .*, line 2 of .*wrong.py"),
        ("import absent_module", "can't be read as a LazyConfig: .*absent_module"),
        (model_text("retinanet"), "has no dataloader.train, optimizer, lr_multiplier"),
    ],
)
def test_files_that_are_no_such_configs(text, message, tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_lazy(str(path), [], eval_only=False)


def test_an_evaluation_needs_an_evaluator(plain, tmp_path):
    path = tmp_path / "unevaluated.py"
    path.write_text(f"{Path(plain).read_text()}dataloader.pop('evaluator')\n")
    read_lazy(str(path), [], eval_only=False)
    with pytest.raises(ValueError, match="has no dataloader.evaluator"):
        read_lazy(str(path), [], eval_only=True)


def test_files_of_another_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no config file nothing.py"):
        read_lazy("nothing.py", [], eval_only=False)
    path = tmp_path / "config.yaml"
    path.write_text("SEED: 1")
    with pytest.raises(ValueError, match="configs of yacs, .yaml, are for tools/train_net.py"):
        read_lazy(str(path), [], eval_only=False)
