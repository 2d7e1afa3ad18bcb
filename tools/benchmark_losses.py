"""Times the distillation losses: the reference, torch.compile of it, and the extension, side by side in one run.

First every implementation is checked against the reference in float64. Then forward, backward and both are timed, the
implementations taking turns and the inputs rotating, so that neither a busy machine nor a cache favours one. The floor
is the time of the 9 passes over the features of docs/method.md at the copy bandwidth of the same run.

    python tools/benchmark_losses.py --device cpu --shapes kitti --batch 2 --dtype float32
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gkd_d2.losses import LossWeights, distillation_losses
from gkd_d2.ops import fused, reference

PASSES = 9
BOX_COUNTS = (0, 10, 100, 500)
AREAS = (0.25, 0.5, 1.0, 2.0)
OPTIONS = {"weights": LossWeights(), "temperature": 0.5, "weighting": "gradient", "rectifier": "abs"}
# Padded image size, and the channels and strides of the distilled levels.
SHAPES = {
    "kitti": ((384, 1248), 256, (4, 8, 16, 32)),
    "coco": ((800, 1344), 256, (4, 8, 16, 32)),
    "toy": ((128, 416), 64, (4, 8, 16, 32)),
}


@dataclasses.dataclass
class Batch:
    """The tensors of one call."""

    student: list[Tensor]
    teacher: list[Tensor]
    student_grad: list[Tensor]
    teacher_grad: list[Tensor]
    boxes: list[Tensor]
    image_size: tuple[int, int]

    def to(self, dtype: torch.dtype) -> Batch:
        lists = [[t.detach().to(dtype) for t in ts] for ts in (self.student, self.teacher)]
        lists += [[t.to(dtype) for t in ts] for ts in (self.student_grad, self.teacher_grad)]
        return Batch(*lists, self.boxes, self.image_size)

    def feature_bytes(self) -> int:
        """Of the student's features, which is what one pass reads or writes."""
        return sum(feature.nbytes for feature in self.student)


def make_batch(args: argparse.Namespace, seed: int, num_boxes: int, area: float = 1.0) -> Batch:
    """Random features and gradients; boxes with sides of 16 pixels to half the image."""
    (height, width), channels, strides = SHAPES[args.shapes]
    width = round(width * area / strides[-1]) * strides[-1]
    generator = torch.Generator().manual_seed(seed)
    memory_format = torch.channels_last if args.layout == "channels_last" else torch.contiguous_format

    def features() -> list[Tensor]:
        shapes = [(args.batch, channels, height // stride, width // stride) for stride in strides]
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        return [tensor.to(args.device, args.dtype).contiguous(memory_format=memory_format) for tensor in tensors]

    limits = torch.tensor([width, height])
    boxes = []
    for _ in range(args.batch):
        centres = torch.rand(num_boxes, 2, generator=generator) * limits
        sides = 16 * (limits / 32) ** torch.rand(num_boxes, 2, generator=generator)
        boxes.append(torch.cat([centres - sides / 2, centres + sides / 2], dim=1).to(args.device))
    return Batch(features(), features(), features(), features(), boxes, (height, width))


def total_loss(implementation: str) -> Callable[[Batch], Tensor]:
    def compute(batch: Batch) -> Tensor:
        return sum(distillation_losses(**vars(batch), implementation=implementation, **OPTIONS).values())

    return compute


def compiled_reference() -> Callable[[Batch], Tensor]:
    """torch.compile of the reference; the arguments' checks stay outside, to its advantage."""
    compute = torch.compile(reference.distillation_losses)
    return lambda batch: sum(compute(**vars(batch), **OPTIONS).values())


class Timer:
    """Times on the device's own clock; times are in milliseconds."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def __call__(self, run: Callable[[], object]) -> tuple[object, float]:
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = run()
            end.record()
            end.synchronize()
            return result, start.elapsed_time(end)
        begin = time.perf_counter()
        result = run()
        return result, 1e3 * (time.perf_counter() - begin)


def forward_and_backward(compute: Callable[[Batch], Tensor], batch: Batch, timer: Timer) -> tuple[float, float]:
    student = [feature.detach().requires_grad_() for feature in batch.student]
    loss, forward = timer(lambda: compute(dataclasses.replace(batch, student=student)))
    gradients, backward = timer(lambda: torch.autograd.grad(loss, student))
    return forward, backward


def take_turns(
    subjects: dict[str, Callable[[int], tuple[float, ...]]], rounds: int, warm_up: int
) -> dict[str, list[list[float]]]:
    """Per subject and quantity the times of all rounds; every subject runs once a round."""
    times = {name: [] for name in subjects}
    for turn in range(warm_up + rounds):
        for name, run in subjects.items():
            values = run(turn)
            if turn >= warm_up:
                times[name].append(values)
    return {name: [list(column) for column in zip(*rows)] for name, rows in times.items()}


def check_equality(implementations: dict[str, Callable[[Batch], Tensor]], batch: Batch) -> dict[str, dict[str, float]]:
    """Relative errors of the summed loss and, by each level's largest element, of the gradient, against float64."""

    def run(compute, inputs):
        student = [feature.detach().requires_grad_() for feature in inputs.student]
        loss = compute(dataclasses.replace(inputs, student=student))
        return loss.item(), torch.autograd.grad(loss, student)

    exact_loss, exact_gradients = run(total_loss("reference"), batch.to(torch.float64))
    errors = {}
    for name, compute in implementations.items():
        loss, gradients = run(compute, batch)
        pairs = zip(gradients, exact_gradients)
        errors[name] = {
            "loss": abs(loss - exact_loss) / abs(exact_loss),
            "gradient": max(((g.double() - e).abs().max() / e.abs().max()).item() for g, e in pairs),
        }
    return errors


def peak_extra_bytes(compute: Callable[[Batch], Tensor], batch: Batch, device: str) -> int:
    """The most memory that forward and backward hold at a time beside their inputs and the gradient."""
    timer = Timer(device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_and_backward(compute, batch, timer)
        return torch.cuda.max_memory_allocated() - before - batch.feature_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward_and_backward(compute, batch, timer)
    held = peak = 0
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak - batch.feature_bytes()


def copy_milliseconds(batch: Batch, timer: Timer) -> Callable[[int], tuple[float]]:
    """Copies as many bytes as the features have, which is two passes."""
    source = torch.empty(batch.feature_bytes() // 4, device=batch.student[0].device).fill_(1.0)
    target = torch.zeros_like(source)
    return lambda turn: (timer(lambda: target.copy_(source))[1],)


def sweep(args: argparse.Namespace, batches: dict[str, list[Batch]], timer: Timer) -> dict[str, float]:
    """Milliseconds of the extension's forward and backward for each kind of batch."""

    def subject(rotated: list[Batch]):
        compute = total_loss("fused")
        return lambda turn: (sum(forward_and_backward(compute, rotated[turn % len(rotated)], timer)),)

    times = take_turns({name: subject(rotated) for name, rotated in batches.items()}, args.rounds, args.warm_up)
    return {name: statistics.median(columns[0]) for name, columns in times.items()}


def compare(args: argparse.Namespace, timer: Timer) -> tuple[dict[str, dict[str, float]], float, int]:
    """Results per implementation, the floor in milliseconds, and the bytes of the student's features."""
    implementations = {
        "eager reference": total_loss("reference"),
        "compiled reference": compiled_reference(),
        "fused": total_loss("fused"),
    }
    batches = [make_batch(args, seed, args.boxes) for seed in range(args.inputs)]
    errors = check_equality(implementations, batches[0])
    feature_bytes = batches[0].feature_bytes()

    def subject(compute):
        return lambda turn: forward_and_backward(compute, batches[turn % len(batches)], timer)

    subjects = {name: subject(compute) for name, compute in implementations.items()}
    subjects["copy"] = copy_milliseconds(batches[0], timer)
    times = take_turns(subjects, args.rounds, args.warm_up)
    floor = PASSES / 2 * statistics.median(times["copy"][0])
    results = {}
    for name, compute in implementations.items():
        forward, backward = times[name]
        both = statistics.median(f + b for f, b in zip(forward, backward))
        results[name] = {
            "forward_ms": statistics.median(forward),
            "backward_ms": statistics.median(backward),
            "both_ms": both,
            "of_floor": both / floor,
            "gigabytes_per_second": PASSES * feature_bytes / both / 1e6,
            "extra_memory": peak_extra_bytes(compute, batches[0], args.device) / feature_bytes,
            "loss_error": errors[name]["loss"],
            "gradient_error": errors[name]["gradient"],
        }
    for result in results.values():
        result["of_eager"] = result["both_ms"] / results["eager reference"]["both_ms"]
        result["of_compiled"] = result["both_ms"] / results["compiled reference"]["both_ms"]
    return results, floor, feature_bytes


def sweep_boxes(args: argparse.Namespace, timer: Timer) -> dict[str, float]:
    batches = {str(count): [make_batch(args, seed, count) for seed in range(2)] for count in BOX_COUNTS}
    return sweep(args, batches, timer)


def sweep_areas(args: argparse.Namespace, timer: Timer) -> dict[str, float]:
    batches = {str(area): [make_batch(args, seed, args.boxes, area) for seed in range(2)] for area in AREAS}
    return sweep(args, batches, timer)


def measure(args: argparse.Namespace) -> dict:
    timer = Timer(args.device)
    results, floor, feature_bytes = compare(args, timer)
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "shapes": args.shapes,
        "batch": args.batch,
        "dtype": str(args.dtype).removeprefix("torch."),
        "layout": args.layout,
        "boxes": args.boxes,
        "feature_megabytes": feature_bytes / 1e6,
        "floor_ms": floor,
        "implementations": results,
        "ms_by_boxes": sweep_boxes(args, timer),
        "ms_by_area": sweep_areas(args, timer),
    }


def report(result: dict) -> str:
    """The tables as Markdown."""
    rows = []
    for name, r in result["implementations"].items():
        times = [f"{r[key]:.2f}" for key in ("forward_ms", "backward_ms", "both_ms")]
        ratios = [f"{r[key]:.3f}" for key in ("of_eager", "of_compiled", "of_floor")]
        others = [f"{r['gigabytes_per_second']:.1f}", f"{100 * r['extra_memory']:.1f} %"]
        rows.append([name, *times, *ratios, *others, f"{r['loss_error']:.0e}", f"{r['gradient_error']:.0e}"])
    floor = result["floor_ms"]
    copied = f"{PASSES * result['feature_megabytes'] / floor:.1f}"
    rows.append([f"floor: {PASSES} passes", "", "", f"{floor:.2f}", "", "", "1.000", copied, "", "", ""])
    headers = ["", "forward ms", "backward ms", "both ms", "/ eager", "/ compiled", "/ floor", "GB/s of 9 passes"]
    headers += ["extra memory / student", "loss error", "gradient error"]
    by_boxes, by_area = result["ms_by_boxes"], result["ms_by_area"]
    base = by_boxes["0"]
    box_rows = [[count, f"{ms:.2f}", f"{ms / base:.3f}"] for count, ms in by_boxes.items()]
    area_rows = [[area, f"{ms:.2f}", f"{ms / float(area) / by_area['1.0']:.3f}"] for area, ms in by_area.items()]
    title = (
        f"{result['shapes']}, batch {result['batch']}, {result['dtype']}, {result['layout']}, {result['boxes']} boxes "
        f"an image; {result['feature_megabytes']:.1f} MB of student features; {result['device']}; "
        f"torch {result['torch']}"
    )
    options = {"tablefmt": "pipe", "disable_numparse": True}
    return "\n\n".join(
        [
            title,
            tabulate(rows, headers, **options),
            tabulate(box_rows, ["boxes an image", "fused, both ms", "/ no boxes"], **options),
            tabulate(area_rows, ["area", "fused, both ms", "ms per area / at area 1"], **options),
        ]
    )


def plot(result: dict, path: Path) -> None:
    """Bars of forward and backward, and the floor as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    names = list(result["implementations"])
    forward = [result["implementations"][name]["forward_ms"] for name in names]
    backward = [result["implementations"][name]["backward_ms"] for name in names]
    axes.barh(names, forward, label="forward")
    axes.barh(names, backward, left=forward, label="backward")
    axes.axvline(result["floor_ms"], color="black", linestyle="--", label=f"{PASSES} passes at copy bandwidth")
    axes.set_xlabel("milliseconds")
    axes.set_xscale("log")
    axes.set_title(f"{result['shapes']}, batch {result['batch']}, {result['dtype']}, {result['device']}", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", choices=tuple(SHAPES), default="kitti")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--layout", choices=("contiguous", "channels_last"), default="contiguous")
    parser.add_argument("--boxes", type=int, default=10, help="boxes an image, outside the sweep over them")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; the median counts")
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before")
    parser.add_argument("--inputs", type=int, default=3, help="sets of inputs that rotate")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times there")
    args = parser.parse_args()
    for name in ("batch", "rounds", "inputs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, but must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and there is none")
    if reason := fused.unavailable_reason(torch.device(args.device)):
        parser.error(reason)
    args.dtype = getattr(torch, args.dtype)
    return args


def main() -> None:
    args = parse_arguments()
    result = measure(args)
    print(report(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
