"""The average of the weights: by hand, in real short trainings, over a resume, and in evaluations."""

import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.engine.hooks import HookBase
from detectron2.modeling import build_model
from distributed_steps import average_of_steps
from short_runs import metrics
from tiny import calm
from torch import multiprocessing, nn

from gkd_d2.config import detector_config
from gkd_d2.engine.model_ema import EMAOptions, ModelEMA, loaded_ema
from gkd_d2.engine.trainer import Trainer
from gkd_d2.modeling.student import load_student
from gkd_d2.utils.checkpoint import CheckpointError, CompleteCheckpointer


class Network(nn.Module):
    """A weight, a frozen one, a statistic, a counter, and a buffer that no checkpoint holds."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))
        self.frozen = nn.Parameter(torch.tensor([0.1, 1e-9, 3e7]), requires_grad=False)
        self.register_buffer("statistic", torch.tensor([8.0]))
        self.register_buffer("counter", torch.tensor(5))
        self.register_buffer("mask", torch.tensor([torch.inf]), persistent=False)

    def set(self, weight, statistic, counter):
        with torch.no_grad():
            self.weight.fill_(weight)
            self.statistic.fill_(statistic)
            self.counter.fill_(counter)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


# --- the average itself


@pytest.mark.parametrize("device", ["", "cpu"])
def test_three_steps_by_hand(device):
    network = Network()
    average = ModelEMA(network, 0.75, device)
    average.start()
    expected = [(1.25, 6.0, 6), (1.9375, 5.5, 7), (1.453125, 4.125, 8)]
    for values, (weight, statistic, counter) in zip([(2.0, 0.0, 6), (4.0, 4.0, 7), (0.0, 0.0, 8)], expected):
        network.set(*values)
        average.update()
        state = average.state_dict()
        # These numbers have no rounding.
        assert (state["weight"].item(), state["statistic"].item()) == (weight, statistic)
        assert state["counter"].item() == counter
    assert state.keys() == network.state_dict().keys() and "mask" not in state


def test_what_does_not_change_does_not_drift():
    network = Network()
    average = ModelEMA(network, 0.999)
    average.start()
    for _ in range(1000):
        average.update()
    assert equal(average.state_dict(), network.state_dict())


def test_without_decay_it_is_the_weights():
    network = Network()
    average = ModelEMA(network, 0.0)
    average.start()
    network.set(0.1, 0.7, 3)
    average.update()
    assert equal(average.state_dict(), network.state_dict())


@pytest.mark.parametrize("fails", [False, True])
def test_the_weights_come_back_bit_for_bit(fails):
    network = Network()
    average = ModelEMA(network, 0.9)
    average.start()
    network.set(0.1, 0.7, 3)
    average.update()
    raw, averaged = copied(network.state_dict()), copied(average.state_dict())
    parameter = network.weight
    try:
        with average.applied():
            assert equal(network.state_dict(), averaged) and not equal(averaged, raw)
            if fails:
                raise KeyError("an evaluation")
    except KeyError:
        assert fails
    assert equal(network.state_dict(), raw) and equal(average.state_dict(), averaged)
    # The one that the optimizer knows.
    assert network.weight is parameter


def test_it_goes_on_from_a_checkpoint_and_refuses_what_is_no_average_of_the_detector():
    network = Network()
    average = ModelEMA(network, 0.5)
    average.start()
    network.set(3.0, 0.0, 9)
    average.update()
    other = ModelEMA(network, 0.5)
    saved = copied(average.state_dict())
    # d2go saves such buffers, too.
    other.load_state_dict({**saved, "mask": torch.tensor([torch.inf])})
    for each in (average, other):
        each.update()
    assert other.state_dict()["weight"].item() == 2.5 and equal(other.state_dict(), average.state_dict())
    assert saved["weight"].item() == 2.0

    lacking = {name: tensor for name, tensor in saved.items() if name != "statistic"}
    with pytest.raises(CheckpointError, match=r"\(ema_state\) are of another detector, by statistic: .* MODEL_EMA.ENA"):
        other.load_state_dict(lacking)
    with pytest.raises(CheckpointError, match="of another detector, by weight"):
        other.load_state_dict({**saved, "weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="are infinite or NaN in weight"):
        other.load_state_dict({**saved, "weight": torch.tensor([torch.nan])})
    for value in (2.0, [2.0], None, torch.tensor([2.0]).to_sparse(), torch.empty(1, device="meta")):
        with pytest.raises(CheckpointError, match="are no dense tensors of numbers, in weight: to go on without"):
            other.load_state_dict({**saved, "weight": value})
    with pytest.raises(CheckpointError, match="are no tensors by their names, but a list"):
        other.load_state_dict([saved])


@pytest.mark.parametrize(
    ("options", "eval_only", "text"),
    [
        (EMAOptions(), False, ""),
        (EMAOptions(decay=2.0, device="nowhere"), False, ""),
        (EMAOptions(True, 0.0), False, ""),
        (EMAOptions(True, 1.0), False, "MODEL_EMA.DECAY is 1.0, but must be at least 0 and below 1"),
        (EMAOptions(True, -0.1), True, "MODEL_EMA.DECAY is -0.1, but must"),
        (EMAOptions(True, float("nan")), False, "MODEL_EMA.DECAY is nan, but must"),
        (EMAOptions(True, device="gpu"), False, "MODEL_EMA.DEVICE is 'gpu', which torch does not know"),
        (
            EMAOptions(True, device="meta"),
            False,
            "MODEL_EMA.DEVICE is 'meta', which is neither a CPU",
        ),
        (EMAOptions(True, device="mps"), True, "MODEL_EMA.DEVICE is 'mps', which is neither a CPU"),
        (EMAOptions(alone=True), False, ""),
        (EMAOptions(alone=True), True, "USE_EMA_WEIGHTS_FOR_EVAL_ONLY is True, but MODEL_EMA.ENABLED is False"),
    ],
)
def test_options_that_can_not_be_met(options, eval_only, text):
    problems = options.problems(eval_only=eval_only)
    assert len(problems) == bool(text) and text in "".join(problems)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (problem,) = EMAOptions(True, device="cuda:1").problems(eval_only=False)
    assert "MODEL_EMA.DEVICE is 'cuda:1', but torch" in problem
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (problem,) = EMAOptions(True, device="cuda:1").problems(eval_only=False)
    assert "finds 1 GPU, numbered from 0: set it to ''" in problem
    assert not EMAOptions(True, device="cuda:0").problems(eval_only=False)


# --- in a training


class Recorder(HookBase):
    """Keeps the student's state before the training and after each step."""

    def before_train(self):
        self.states = [copied(self.trainer._student().state_dict())]

    def after_step(self):
        self.states.append(copied(self.trainer._student().state_dict()))


def averaged_by_sums(states, decay):
    """In float64, by the sum of all states with their weights."""
    last = len(states) - 1
    factors = [decay**last, *((1 - decay) * decay ** (last - number) for number in range(1, last + 1))]
    return {
        name: sum(factor * state[name].double() for factor, state in zip(factors, states))
        for name, value in states[0].items()
        if value.is_floating_point()
    }


def config(training, *, distilled, iterations=4, ema=True, **options):
    # A distilled student of other channels has align convolutions.
    cfg = training("retinanet", iterations=iterations, **({"channels": 8} if distilled else {}))
    if not distilled:
        cfg = detector_config(cfg)
        cfg.defrost()
    cfg.merge_from_list([text for pair in options.items() for text in pair])
    cfg.MODEL_EMA.ENABLED, cfg.MODEL_EMA.DECAY = ema, 0.75
    return cfg


def last(folder):
    return torch.load(Path(folder) / "model_final.pth", weights_only=True)


@pytest.mark.parametrize("distilled", [True, False])
def test_a_run_with_an_average_trains_the_same_weights(distilled, training, tmp_path):
    """In parts of a batch, with evaluations in between."""
    cfg = config(training, distilled=distilled)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE_STEPS = 2, 2
    cfg.DATASETS.TEST, cfg.TEST.EVAL_PERIOD, cfg.INPUT.MIN_SIZE_TEST = ("toy_kitti_val",), 2, 64
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    torch.manual_seed(0)
    trainer, recorder = Trainer(cfg), Recorder()
    trainer.register_hooks([recorder])
    trainer._hooks = [recorder, *trainer._hooks[:-1]]
    trainer.train()
    saved = last(cfg.OUTPUT_DIR)

    other = cfg.clone()
    other.MODEL_EMA.ENABLED, other.OUTPUT_DIR = False, str(tmp_path / "without")
    Path(other.OUTPUT_DIR).mkdir()
    torch.manual_seed(0)
    Trainer(other).train()
    alone = last(other.OUTPUT_DIR)
    assert equal(saved["model"], alone["model"]) and "ema_state" not in alone

    # The student's names, and nothing of what trains beside it.
    average = saved["ema_state"]
    beside = {name for name in saved["model"] if name.startswith("align.")}
    assert bool(beside) == distilled and average.keys() == saved["model"].keys() - beside
    expected = averaged_by_sums(recorder.states, 0.75)
    assert len(recorder.states) == 5 and len(expected) > 50
    for name, value in expected.items():
        torch.testing.assert_close(average[name].double(), value, rtol=1e-5, atol=1e-7)
    counters = average.keys() - expected.keys()
    assert counters and all(torch.equal(average[name], saved["model"][name]) for name in counters)
    statistics = "backbone.bottom_up.stem.conv1.norm.running_var"
    assert not torch.equal(average[statistics], saved["model"][statistics])

    # Both are evaluated, in the middle and at the end, and neither takes the other's files.
    rows, plain = metrics(cfg.OUTPUT_DIR), metrics(other.OUTPUT_DIR)
    for iteration in (1, 4):
        names = {name for name in rows[iteration] if "AP" in name}
        own = {name for name in names if "_EMA/" in name}
        assert {"bbox_EMA/AP", "kitti_EMA/AP_moderate"} <= own
        assert {name.replace("_EMA/", "/") for name in own} == names - own
        assert names - own == {name for name in plain[iteration] if "AP" in name}
    raw, averaged = (detections(cfg, folder) for folder in ("inference", "inference_EMA"))
    assert raw == detections(other, "inference") and raw != averaged
    # As the plain detector with the averaged weights finds them.
    cfg.OUTPUT_DIR, folder = str(tmp_path / "again"), Path(cfg.OUTPUT_DIR)
    Trainer.test(cfg, load_student(cfg, folder, ema=True))
    assert detections(cfg, "inference") == averaged


def detections(cfg, folder):
    return json.loads(Path(cfg.OUTPUT_DIR, folder, "toy_kitti_val", "coco_instances_results.json").read_text())


def resume(cfg):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    return trainer


@pytest.mark.parametrize("distilled", [True, False])
def test_a_resume_goes_on_bit_for_bit(distilled, training, tmp_path, caplog):
    cfg = config(training, distilled=distilled)
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    Trainer(cfg).train()
    whole = last(cfg.OUTPUT_DIR)
    final = tmp_path / "output" / "model_final.pth"
    final.unlink()
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000001.pth")
    # Where the average is, and which weights an evaluation takes, changes nothing.
    cfg.MODEL_EMA.DEVICE, cfg.MODEL_EMA.USE_EMA_WEIGHTS_FOR_EVAL_ONLY = "cpu", True
    trainer = resume(cfg)
    middle = copied(trainer.ema.state_dict())
    trainer.train()
    resumed = last(cfg.OUTPUT_DIR)
    assert equal(resumed["model"], whole["model"]) and equal(resumed["ema_state"], whole["ema_state"])
    assert not equal(resumed["ema_state"], middle) and not equal(resumed["ema_state"], resumed["model"])
    assert "resumed run differs" not in caplog.text and "average" not in caplog.text


def test_a_resume_with_and_without_says_what_becomes_of_the_average(training, caplog, tmp_path):
    cfg = config(training, distilled=False, iterations=2, ema=False)
    Trainer(cfg).train()
    cfg.MODEL_EMA.ENABLED, cfg.SOLVER.MAX_ITER = True, 3
    with caplog.at_level(logging.WARNING):
        trainer = resume(cfg)
    final = tmp_path / "output" / "model_final.pth"
    assert f"{final} holds no averaged weights: the average starts from its raw weights at iteration 2" in caplog.text
    assert "MODEL_EMA.ENABLED was False and is True" in caplog.text
    raw = last(cfg.OUTPUT_DIR)["model"]
    assert equal(trainer.ema.state_dict(), raw)
    trainer.train()
    trained = last(cfg.OUTPUT_DIR)
    assert not equal(trained["ema_state"], raw) and not equal(trained["ema_state"], trained["model"])

    caplog.clear()
    cfg.MODEL_EMA.ENABLED, cfg.SOLVER.MAX_ITER = False, 4
    with caplog.at_level(logging.WARNING):
        resume(cfg).train()
    assert f"MODEL_EMA.ENABLED is False: the averaged weights that {final} holds are dropped" in caplog.text
    assert "ema_state" not in last(cfg.OUTPUT_DIR)


@pytest.mark.parametrize("distilled", [True, False])
def test_weights_with_an_average_start_a_run_with_their_raw_ones(distilled, training, caplog, tmp_path):
    cfg = config(training, distilled=distilled, iterations=1)
    raw = copied(build_model(cfg).state_dict())
    average = {name: tensor + 1 for name, tensor in raw.items() if not name.startswith("align")}
    torch.save({"model": raw, "ema_state": average}, tmp_path / "weights.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    trainer = Trainer(cfg)
    with caplog.at_level(logging.WARNING, logger="gkd_d2"):
        trainer.resume_or_load(resume=False)
    assert equal(trainer.model.state_dict(), raw) and "averag" not in caplog.text
    assert equal(trainer.ema.state_dict(), {name: raw[name] for name in average})


def test_a_step_that_is_left_out_in_float16_counts_for_nothing(training):
    cfg = config(training, distilled=False, iterations=2)
    cfg.SOLVER.AMP.ENABLED = True

    class Overflow(HookBase):
        def before_step(self):
            scaler = torch.amp.GradScaler("cpu", init_scale=(2.0**4, 2.0**60)[self.trainer.iter])
            self.trainer._trainer._scaler = scaler

        def after_step(self):
            averages.append(copied(self.trainer.ema.state_dict()))

    averages = []
    trainer = Trainer(cfg)
    start = copied(trainer.model.state_dict())
    trainer.register_hooks([Overflow()])
    trainer.train()
    assert equal(averages[0], averages[1])
    assert not equal(averages[0], start) and not equal(averages[0], trainer.model.state_dict())


def test_an_average_that_is_not_finite_is_not_saved(training, tmp_path):
    trainer = Trainer(config(training, distilled=False, iterations=2))

    class Spoil(HookBase):
        def after_step(self):
            self.trainer.ema._average["head.cls_score.bias"][0] = torch.nan

    trainer._hooks.insert(0, Spoil())
    trainer._hooks[0].trainer = trainer
    with pytest.raises(
        FloatingPointError, match=r"After iteration 1 the averaged weights \(MODEL_EMA\) are not finite \(head.cls_scor"
    ):
        trainer.train()
    assert not list((tmp_path / "output").glob("*.pth"))


def test_processes_agree_on_the_average(tmp_path):
    """As one process that takes the whole batch."""
    multiprocessing.spawn(average_of_steps, (2, tmp_path), nprocs=2)
    average_of_steps(0, 1, tmp_path)
    states = [torch.load(tmp_path / f"{rank}_of_{processes}.pth") for rank, processes in ((0, 2), (1, 2), (0, 1))]
    assert equal(states[0], states[1])
    for name, tensor in states[2].items():
        torch.testing.assert_close(states[0][name], tensor)


# --- in an evaluation alone


@pytest.fixture
def checkpoint(tmp_path, make_distiller_config):
    """A detector's config, and a checkpoint of it with an average of other weights."""
    cfg = detector_config(make_distiller_config(tmp_path, "retinanet"))
    cfg.defrost()
    raw = calm(build_model(cfg)).state_dict()
    average = {name: tensor + 1 for name, tensor in raw.items()}
    torch.save({"model": raw, "ema_state": average}, tmp_path / "both.pth")
    torch.save({"model": raw}, tmp_path / "raw.pth")
    return cfg, raw, average


def loaded(cfg, path):
    model = build_model(cfg)
    return model, CompleteCheckpointer(model).resume_or_load(str(path), resume=False)


def test_both_are_evaluated_or_the_average_alone(checkpoint, tmp_path):
    cfg, raw, average = checkpoint
    model, rest = loaded(cfg, tmp_path / "both.pth")
    assert loaded_ema(EMAOptions(), model, rest) is None and equal(model.state_dict(), raw)
    ema = loaded_ema(EMAOptions(enabled=True), model, rest)
    assert equal(ema.state_dict(), average) and equal(model.state_dict(), raw)
    with ema.applied():
        assert equal(model.state_dict(), average)
    assert loaded_ema(EMAOptions(enabled=True, alone=True), model, rest) is None
    assert equal(model.state_dict(), average)


def test_an_evaluation_of_an_average_that_is_not_there(checkpoint, tmp_path, caplog):
    cfg, raw, _ = checkpoint
    model, rest = loaded(cfg, tmp_path / "raw.pth")
    assert loaded_ema(EMAOptions(), model, rest) is None and "averaged" not in caplog.text
    assert loaded_ema(EMAOptions(enabled=True), model, rest) is None and equal(model.state_dict(), raw)
    assert "Only the raw weights are evaluated, for the checkpoint holds no averaged weights" in caplog.text
    with pytest.raises(
        CheckpointError, match="FOR_EVAL_ONLY is True, but the checkpoint holds no averaged weights: it"
    ):
        loaded_ema(EMAOptions(enabled=True, alone=True), model, rest)
