"""How calls of a loss are timed: as they come, and as replays of CUDA graphs."""

from types import SimpleNamespace

import pytest
import torch
from devices import CUDA_MARKS

from gkd_d2.analysis.benchmark import calls
from gkd_d2.analysis.benchmark.calls import capturable, capture, loss_and_gradients, timed_calls
from gkd_d2.analysis.benchmark.inputs import FeatureSpec, random_features
from gkd_d2.analysis.benchmark.losses import SETTINGS, total_loss


def test_backward_is_what_a_replay_takes_beyond_forward(monkeypatch):
    """Graphs, which need a GPU, are replaced by functions that return their milliseconds."""

    def captured(compute, batch, pool):
        return [SimpleNamespace(replay=lambda: compute(batch)), SimpleNamespace(replay=lambda: 3 * batch)], None

    monkeypatch.setattr(calls, "capture", captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    call = timed_calls(lambda batch: batch, [1.0, 10.0], lambda run: (None, run()), replayed=True)
    assert [call(turn) for turn in range(3)] == [(1.0, 2.0), (10.0, 20.0), (1.0, 2.0)]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA_MARKS)])
def test_what_waits_for_the_device_is_not_captured(device):
    batch = random_features(FeatureSpec("toy", batch=1, device=device), seed=0, num_boxes=3)
    compute = total_loss("fused", SETTINGS["all"])
    assert capturable(compute, batch)
    assert not capturable(lambda batch: compute(batch) * batch.boxes[0].sum().item(), batch)
    pool = torch.cuda.graph_pool_handle()
    (_, graph), (loss, gradients) = capture(compute, batch, pool)
    # Other features, so that the values can only be the replay's.
    for feature in batch.student:
        feature.mul_(2.0)
    graph.replay()
    wanted_loss, wanted_gradients = loss_and_gradients(compute, batch)
    assert torch.equal(loss, wanted_loss)
    assert all(torch.equal(gradient, wanted) for gradient, wanted in zip(gradients, wanted_gradients))
