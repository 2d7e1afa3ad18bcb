"""The distillation losses timed: the reference, torch.compile of it, and the extension, side by side.

First every implementation is checked against the reference in float64. The floor is the time of the passes over the
features of docs/method.md at the copy bandwidth of the same run.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

import torch

from gkd_d2.analysis.benchmark.calls import (
    Loss,
    capturable,
    host_times,
    loss_and_gradients,
    result_of_replay,
    timed_calls,
)
from gkd_d2.analysis.benchmark.inputs import FeatureBatch, FeatureSpec, random_features
from gkd_d2.analysis.benchmark.timing import Rounds, Timer, device_name, peak_bytes, take_turns
from gkd_d2.losses import LossOptions, LossWeights, distillation_losses, reference


@dataclasses.dataclass(frozen=True)
class Setting:
    """What of the losses is timed.

    Attributes:
        weights: of the four losses.
        options: of the losses.
        passes: over whole features that it takes, as docs/method.md counts them.
    """

    weights: LossWeights
    options: LossOptions
    passes: int


# All four losses; those that a config has by default; and the authors' for one-stage detectors on KITTI. Only the
# attention loss needs statistics of S itself, and only that or a weighting by attention those of T.
SETTINGS = {
    "all": Setting(
        LossWeights(gradient=0.5, box=1e-3, attention=5e-4, image=1e-3), LossOptions(map_region="image"), passes=9
    ),
    "default": Setting(
        LossWeights(gradient=2e-3, box=1e-2, attention=0.0, image=1e-3), LossOptions(map_region="boxes"), passes=7
    ),
    "authors": Setting(
        LossWeights(gradient=0.05, box=1e-3, attention=5e-4, image=0.0),
        LossOptions(weighting="attention_gradient", map_region="boxes"),
        passes=9,
    ),
}
BOX_COUNTS = (0, 10, 100, 500)
AREAS = (0.25, 0.5, 1.0, 2.0)


def measure_losses(
    spec: FeatureSpec,
    *,
    boxes: int,
    weights: str,
    rounds: Rounds,
    inputs: int,
    compiled: bool,
    sweeps: bool,
) -> dict:
    """Time every implementation of the losses, and count its memory and errors.

    Args:
        spec: of the features.
        boxes: in each image, outside the sweep over them.
        weights: a key of :data:`SETTINGS`.
        rounds: of all measurements.
        inputs: number of batches that rotate, so that no cache helps.
        compiled: whether torch.compile of the reference is measured too.
        sweeps: whether the extension is timed over :data:`BOX_COUNTS` and :data:`AREAS` too.

    Returns:
        What :func:`gkd_d2.analysis.benchmark.tables.loss_tables` shows, in types of JSON.
    """
    timer = Timer(spec.device)
    results, floor, feature_bytes = _compare(spec, boxes, SETTINGS[weights], rounds, inputs, compiled, timer)
    result = {
        "device": device_name(spec.device),
        "torch": torch.__version__,
        "shapes": spec.shapes,
        "batch": spec.batch,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "layout": spec.layout,
        "boxes": boxes,
        "weights": weights,
        "passes": SETTINGS[weights].passes,
        "feature_megabytes": feature_bytes / 1e6,
        "floor_ms": floor,
        "implementations": results,
    }
    if sweeps:
        by_boxes, by_area = {str(n): (n, 1.0) for n in BOX_COUNTS}, {str(area): (boxes, area) for area in AREAS}
        result["ms_by_boxes"] = _sweep(spec, by_boxes, SETTINGS[weights], rounds, timer)
        result["ms_by_area"] = _sweep(spec, by_area, SETTINGS[weights], rounds, timer)
    return result


def total_loss(implementation: str, setting: Setting) -> Loss:
    """The sum of the losses as a function of a batch, by "reference" or "fused"."""
    options = {"weights": setting.weights, "implementation": implementation, **dataclasses.asdict(setting.options)}
    return lambda batch: sum(distillation_losses(**vars(batch), **options).values())


def _compiled_reference(setting: Setting) -> Loss:
    """torch.compile of the reference; the arguments' checks stay outside, to its advantage."""
    compute = torch.compile(reference.distillation_losses)
    options = {"weights": setting.weights, "options": setting.options}
    return lambda batch: sum(compute(**vars(batch), **options).values())


def _compare(
    spec: FeatureSpec, boxes: int, setting: Setting, rounds: Rounds, inputs: int, compiled: bool, timer: Timer
) -> tuple[dict[str, dict], float, int]:
    """Results per implementation, the floor in milliseconds, and the bytes of the student's features."""
    passes = setting.passes
    implementations = {"eager reference": total_loss("reference", setting)}
    if compiled:
        implementations["compiled reference"] = _compiled_reference(setting)
    implementations["fused"] = total_loss("fused", setting)
    batches = [random_features(spec, seed, boxes) for seed in range(inputs)]
    feature_bytes = batches[0].feature_bytes()
    replayed = {name: capturable(compute, batches[0]) for name, compute in implementations.items()}
    errors = _errors(implementations, batches[0], setting, replayed)

    def subject(name: str, compute: Loss) -> Callable[[int], tuple[float, ...]]:
        call = timed_calls(compute, batches, timer, replayed[name])
        if not timer.cuda:
            return call
        return lambda turn: (*call(turn), *host_times(compute, batches[turn % len(batches)]))

    subjects = {name: subject(name, compute) for name, compute in implementations.items()}
    subjects["copy"] = _copy(batches[0], timer)
    times = take_turns(subjects, rounds)
    floor = passes / 2 * statistics.median(times["copy"][0])
    results = {}
    for name, compute in implementations.items():
        forward, backward, *host = times[name]
        both = statistics.median(map(sum, zip(forward, backward)))
        results[name] = {
            "forward_ms": statistics.median(forward),
            "backward_ms": statistics.median(backward),
            "both_ms": both,
            "of_floor": both / floor,
            "gigabytes_per_second": passes * feature_bytes / both / 1e6,
            "extra_memory": _extra_bytes(compute, batches[0], spec.device) / feature_bytes,
            **errors[name],
            **dict(zip(("host_forward_ms", "host_backward_ms"), map(statistics.median, host))),
        }
        if timer.cuda:
            results[name]["timed_by"] = "graph replay" if replayed[name] else "events"
    for key, name in (("of_eager", "eager reference"), ("of_compiled", "compiled reference")):
        if name in results:
            for result in results.values():
                result[key] = result["both_ms"] / results[name]["both_ms"]
    return results, floor, feature_bytes


def _errors(
    implementations: dict[str, Loss], batch: FeatureBatch, setting: Setting, replayed: dict[str, bool]
) -> dict[str, dict[str, float]]:
    """Relative errors of the summed loss and, by each level's largest element, of the gradient, against float64."""
    exact_loss, exact_gradients = loss_and_gradients(total_loss("reference", setting), batch.to(torch.float64))
    errors = {}
    for name, compute in implementations.items():
        loss, gradients = (result_of_replay if replayed[name] else loss_and_gradients)(compute, batch)
        pairs = zip(gradients, exact_gradients)
        errors[name] = {
            "loss_error": abs(loss.item() - exact_loss.item()) / abs(exact_loss.item()),
            "gradient_error": max(((g.double() - e).abs().max() / e.abs().max()).item() for g, e in pairs),
        }
    return errors


def _extra_bytes(compute: Loss, batch: FeatureBatch, device: str) -> int:
    """The most memory that forward and backward hold at a time beside their inputs and the gradient."""
    return peak_bytes(lambda: loss_and_gradients(compute, batch), device) - batch.feature_bytes()


def _copy(batch: FeatureBatch, timer: Timer) -> Callable[[int], tuple[float]]:
    """Times the copy of as many bytes as the features have, which is two passes."""
    source = torch.empty(batch.feature_bytes() // 4, device=batch.student[0].device).fill_(1.0)
    target = torch.zeros_like(source)
    return lambda turn: (timer(lambda: target.copy_(source))[1],)


def _sweep(
    spec: FeatureSpec, kinds: dict[str, tuple[int, float]], setting: Setting, rounds: Rounds, timer: Timer
) -> dict[str, float]:
    """Milliseconds of the extension's forward and backward for each number of boxes and area."""
    compute = total_loss("fused", setting)
    subjects = {}
    for name, (num_boxes, area) in kinds.items():
        batches = [random_features(spec, seed, num_boxes, area) for seed in range(2)]
        subjects[name] = timed_calls(compute, batches, timer, capturable(compute, batches[0]))
    times = take_turns(subjects, rounds)
    return {name: statistics.median(map(sum, zip(*columns))) for name, columns in times.items()}
