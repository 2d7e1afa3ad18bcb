"""What only CUDA has: streams, graphs, no waiting for the device. The values are compared in test_fused.py and
test_extreme_levels.py."""

from __future__ import annotations

import pytest
import torch
from devices import CUDA_MARKS

from gkd_d2.losses import LossWeights

pytestmark = CUDA_MARKS
WEIGHTS = LossWeights(gradient=0.5, box=0.1, attention=0.2, image=0.3)


@pytest.fixture(params=["contiguous", "channels_last"])
def batch(request, make_batch):
    sizes = [(256, 24, 78), (256, 12, 39), (37, 5, 7)]
    return make_batch(sizes, box_counts=(3, 50), layout=request.param).to(torch.float32, "cuda")


def forward_and_backward(batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    losses = torch.stack(list(batch.losses("fused", weights=WEIGHTS).values()))
    return losses, list(torch.autograd.grad(losses.sum(), batch.student))


def assert_equal(result, other) -> None:
    assert torch.equal(result[0], other[0])
    assert all(torch.equal(gradient, wanted) for gradient, wanted in zip(result[1], other[1]))


def test_repeated_calls_are_bit_equal(batch):
    wanted = forward_and_backward(batch)
    for _ in range(5):
        assert_equal(forward_and_backward(batch), wanted)


def test_never_waits_for_the_device(batch):
    forward_and_backward(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream(batch):
    wanted = forward_and_backward(batch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        for feature in batch.student:
            feature.data.mul_(1.0)
        result = forward_and_backward(batch)
    stream.synchronize()
    assert_equal(result, wanted)


def capture(batch):
    """A graph of one call, and the tensors that its replay writes to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_and_backward(batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward_and_backward(batch)
    return graph, result


def test_a_cuda_graph_captures_it(batch):
    wanted = forward_and_backward(batch)
    graph, result = capture(batch)
    for tensor in (result[0], *result[1]):
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(result, wanted)


def test_a_captured_graph_computes_new_values(batch):
    """Those that its input tensors hold when it is replayed; the number of boxes stays."""
    first, _ = forward_and_backward(batch)
    graph, result = capture(batch)
    for seed in (1, 2):
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad():
            for tensor in (*batch.student, *batch.teacher, *batch.student_grad, *batch.teacher_grad):
                tensor.normal_(generator=generator)
            for boxes in batch.boxes:
                boxes += 7.5
        graph.replay()
        wanted = forward_and_backward(batch)
        assert_equal(result, wanted)
        assert (result[0] != first).all()


def test_takes_boxes_from_the_cpu(batch):
    wanted = forward_and_backward(batch)
    batch.boxes = [boxes.cpu() for boxes in batch.boxes]
    assert_equal(forward_and_backward(batch), wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_runs_on_the_tensors_device(make_batch):
    batch = make_batch().to(torch.float32, "cuda:1")
    losses, gradients = forward_and_backward(batch)
    assert losses.device.index == 1
    assert all(gradient.device.index == 1 for gradient in gradients)


def test_leaves_memory_as_it_was(batch):
    forward_and_backward(batch)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    forward_and_backward(batch)
    assert torch.cuda.memory_allocated() == before


def test_extra_memory_is_small(make_batch):
    batch = make_batch([(256, 48, 156)], images=1).to(torch.float16, "cuda")
    features = batch.student[0].nbytes
    forward_and_backward(batch)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward_and_backward(batch)
    assert torch.cuda.max_memory_allocated() - before - features <= 0.05 * 2 * features
