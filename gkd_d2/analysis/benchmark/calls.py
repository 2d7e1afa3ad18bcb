"""Calls of a loss, forward and backward: timed as they come, or as replays of CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gkd_d2.analysis.benchmark.inputs import FeatureBatch
from gkd_d2.analysis.benchmark.timing import Timer

Loss = Callable[[FeatureBatch], Tensor]


def loss_and_gradients(compute: Loss, batch: FeatureBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A loss, and its gradient at each of the student's features."""
    batch = batch.with_leaves()
    loss = compute(batch)
    return loss, torch.autograd.grad(loss, batch.student)


def forward_and_backward(compute: Loss, batch: FeatureBatch, timer: Timer) -> tuple[float, float]:
    """The milliseconds of both."""
    batch = batch.with_leaves()
    loss, forward = timer(lambda: compute(batch))
    _, backward = timer(lambda: torch.autograd.grad(loss, batch.student))
    return forward, backward


def host_times(compute: Loss, batch: FeatureBatch) -> tuple[float, float]:
    """How long forward and backward keep the host, which waits for the device before them only."""
    torch.cuda.synchronize()
    return forward_and_backward(compute, batch, Timer("cpu"))


def capturable(compute: Loss, batch: FeatureBatch) -> bool:
    """Whether a CUDA graph can hold a call: it runs on a GPU and does not wait for it.

    That is asked of a call, for a capture that fails leaves torch's allocator in disorder.
    """
    if not batch.student[0].is_cuda:
        return False
    loss_and_gradients(compute, batch)  # torch.compile compiles forward and backward, and may wait while it does
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradients(compute, batch)
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def capture(
    compute: Loss, batch: FeatureBatch, pool: object
) -> tuple[list[torch.cuda.CUDAGraph], tuple[Tensor, tuple[Tensor, ...]]]:
    """CUDA graphs of forward and of forward with backward, and what every replay of the latter makes anew.

    Args:
        compute: a :func:`capturable` loss.
        batch: on a GPU.
        pool: graphs of one pool share memory: a result that the caller drops is overwritten by others' replays.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss_and_gradients(compute, batch)  # what a first call on a side stream sets up can't be captured
    torch.cuda.current_stream().wait_stream(stream)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    with torch.cuda.graph(graphs[0], pool=pool):
        compute(batch.with_leaves())
    with torch.cuda.graph(graphs[1], pool=pool):
        result = loss_and_gradients(compute, batch)
    return graphs, result


def result_of_replay(compute: Loss, batch: FeatureBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What :func:`loss_and_gradients` returns, computed by the replay of a graph."""
    (_, graph), result = capture(compute, batch, torch.cuda.graph_pool_handle())
    graph.replay()
    # Copies, for the graph's own memory goes with the graph.
    loss, gradients = result
    return loss.clone(), tuple(gradient.clone() for gradient in gradients)


def timed_calls(
    compute: Loss, batches: list[FeatureBatch], timer: Timer, replayed: bool
) -> Callable[[int], tuple[float, float]]:
    """A function that times forward and backward, in milliseconds, on the next batch each turn.

    Args:
        compute: the loss.
        batches: that rotate.
        timer: of the batches' device.
        replayed: whether replays of CUDA graphs are timed; backward is then what forward with backward takes beyond
            forward.

    Returns:
        Number of the turn -> forward, backward.
    """
    if not replayed:
        return lambda turn: forward_and_backward(compute, batches[turn % len(batches)], timer)
    pool = torch.cuda.graph_pool_handle()
    graphs = [capture(compute, batch, pool)[0] for batch in batches]

    def replay(turn: int) -> tuple[float, float]:
        forward, both = (timer(graph.replay)[1] for graph in graphs[turn % len(batches)])
        return forward, both - forward

    return replay
