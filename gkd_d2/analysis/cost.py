"""What detectors cost: operations and time for one image, measured side by side."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from detectron2.structures import Boxes
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from gkd_d2.analysis.runs import Run
from gkd_d2.utils.progress import track
from gkd_d2.utils.timing import milliseconds


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run's detector costs for one image.

    Attributes:
        parameters: their number.
        gflops: billions of operations; None where it was not measured.
        milliseconds: None where it was not measured.
    """

    parameters: int
    gflops: float | None = None
    milliseconds: float | None = None


def measure_costs(
    runs: Sequence[Run], size: tuple[int, int], *, device: str | None, repeats: int
) -> tuple[dict[str, Cost], str]:
    """The cost of every run's detector. Shows its progress.

    Args:
        runs: one without a checkpoint has no GFLOPs and no time.
        size: height and width of the random image that is detected on.
        device: to measure the time on, to which the networks of the runs are moved; None: the time is not measured.
        repeats: of that measurement.

    Returns:
        Run name -> cost, and a sentence or two of how it was measured.
    """
    # What the heads do depends on the weights, so that only trained ones tell a cost.
    trained = [run for run in runs if run.has_checkpoint]
    counted = track(trained, total=len(trained), title="runs whose operations are counted")
    operations = {run.name: gflops(run.network, random_image(size)) for run in counted}
    text = (
        "GFLOPs are billions of multiply-adds by fvcore's counter, for one image of random pixels, "
        f"{size[0]} x {size[1]}"
    )
    times: dict[str, float] = {}
    if device is not None:
        inputs = [{"image": random_image(size, device)}]
        calls = [functools.partial(run.network.to(device), inputs) for run in trained]
        with torch.no_grad():
            medians = milliseconds(calls, repeats=repeats, device=device)
        times = dict(zip((run.name for run in trained), medians))
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "the CPU"
        text += (
            f"; ms is the median of {repeats} times on {name} (threads: {torch.get_num_threads()}), that image "
            "by itself, the runs taking turns"
        )
    text += "."
    for run in runs:
        if run not in trained:
            text += f" {run.name} holds no last_checkpoint, so that its GFLOPs and time were not measured."
    return {run.name: Cost(run.parameters, operations.get(run.name), times.get(run.name)) for run in runs}, text


def random_image(size: tuple[int, int], device: str = "cpu") -> Tensor:
    """An image of random pixels, the same at every call.

    Args:
        size: height and width.
        device: where it lies.

    Returns:
        float32, 3,H,W, in [0, 255].
    """
    return (255 * torch.rand(3, *size, generator=torch.Generator().manual_seed(0))).to(device)


class _Flat(nn.Module):
    """A detector with tensors for arguments and results, as fvcore's counter asks for."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        fields = self.model([{"image": image}])[0]["instances"].get_fields().values()
        return tuple(value.tensor if isinstance(value, Boxes) else value for value in fields)


def gflops(model: nn.Module, image: Tensor) -> float:
    """Billions of operations for one image by fvcore's counter, which counts a multiplication with its addition as one.

    Args:
        model: a Detectron2 detector in eval mode. What its heads do depends on what they are given to look at.
        image: C,H,W, on the model's device.
    """
    with torch.no_grad():
        count = FlopCountAnalysis(_Flat(model), (image,))
        return count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total() / 1e9
