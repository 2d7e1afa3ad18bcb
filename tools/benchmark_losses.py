"""Times the distillation losses: the reference, torch.compile of it, and the extension, side by side in one run.

First every implementation is checked against the reference in float64. Then forward, backward and both are timed, the
implementations taking turns and the inputs rotating, so that neither a busy machine nor a cache favours one. The floor
is the time of the passes over the features of docs/method.md at the copy bandwidth of the same run.

On a GPU the times are the device's own. A call is captured in two CUDA graphs, of forward and of forward with backward,
whose replays are timed behind other work, so that no launch is waited for; backward is their difference, and what is
checked is the result of a replay. The host's time for a call without a graph stands beside them. An implementation that
waits for the device can't be captured: events around its calls time it, waits included, which the table says.

    python tools/benchmark_losses.py --device cpu --shapes kitti --batch 2 --dtype float32
    python tools/benchmark_losses.py --device cuda --shapes coco --batch 4 --dtype float16 --no-sweeps --no-compile
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from gkd_d2.losses import LossWeights, distillation_losses, fused, reference
from gkd_d2.utils.command_line import check_written_files
from gkd_d2.utils.text import counted

import torch
from tabulate import tabulate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# Of the four losses, and of those that a config has by default, which leave out the attention loss.
WEIGHTS = {"all": LossWeights(), "default": LossWeights(gradient=0.02, box=1e-2, attention=0.0, image=1e-3)}
# Only the attention loss needs statistics of S and T themselves.
PASSES = {"all": 9, "default": 7}
BOX_COUNTS = (0, 10, 100, 500)
AREAS = (0.25, 0.5, 1.0, 2.0)
OPTIONS = {"temperature": 0.5, "weighting": "gradient", "rectifier": "abs"}
# Padded image size, and the channels and strides of the distilled levels.
SHAPES = {
    "kitti": ((384, 1248), 256, (4, 8, 16, 32)),
    "coco": ((800, 1344), 256, (4, 8, 16, 32)),
    "toy": ((128, 416), 64, (4, 8, 16, 32)),
}
# Header -> key of an implementation's results, and format; what was not measured has no column.
COLUMNS = {
    "forward ms": ("forward_ms", ".3f"),
    "backward ms": ("backward_ms", ".3f"),
    "both ms": ("both_ms", ".3f"),
    "timed by": ("timed_by", ""),
    "host, forward ms": ("host_forward_ms", ".3f"),
    "host, backward ms": ("host_backward_ms", ".3f"),
    "/ eager": ("of_eager", ".3f"),
    "/ compiled": ("of_compiled", ".3f"),
    "/ floor": ("of_floor", ".3f"),
    "GB/s of the passes": ("gigabytes_per_second", ".1f"),
    "extra memory / student": ("extra_memory", ".1%"),
    "loss error": ("loss_error", ".0e"),
    "gradient error": ("gradient_error", ".0e"),
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

    def with_leaves(self) -> Batch:
        """A view whose student is new to autograd, as one that takes a gradient must be."""
        return dataclasses.replace(self, student=[feature.detach().requires_grad_() for feature in self.student])

    def feature_bytes(self) -> int:
        """Of the student's features, which is what one pass reads or writes."""
        return sum(feature.nbytes for feature in self.student)


def make_batch(args: argparse.Namespace, seed: int, num_boxes: int, area: float = 1.0) -> Batch:
    """Random features and gradients; boxes with sides of 16 pixels to half the image. The device draws them all."""
    (height, width), channels, strides = SHAPES[args.shapes]
    width = round(width * area / strides[-1]) * strides[-1]
    generator = torch.Generator(args.device).manual_seed(seed)
    memory_format = torch.channels_last if args.layout == "channels_last" else torch.contiguous_format

    def features() -> list[Tensor]:
        shapes = [(args.batch, channels, height // stride, width // stride) for stride in strides]
        tensors = (torch.randn(shape, generator=generator, device=args.device) for shape in shapes)
        return [tensor.to(args.dtype).contiguous(memory_format=memory_format) for tensor in tensors]

    def uniform() -> Tensor:
        return torch.rand(num_boxes, 2, generator=generator, device=args.device)

    limits = torch.tensor([width, height], device=args.device)
    boxes = []
    for _ in range(args.batch):
        centres = uniform() * limits
        sides = 16 * (limits / 32) ** uniform()
        boxes.append(torch.cat([centres - sides / 2, centres + sides / 2], dim=1))
    return Batch(features(), features(), features(), features(), boxes, (height, width))


def total_loss(implementation: str, weights: LossWeights) -> Callable[[Batch], Tensor]:
    options = {"weights": weights, "implementation": implementation, **OPTIONS}
    return lambda batch: sum(distillation_losses(**vars(batch), **options).values())


def compiled_reference(weights: LossWeights) -> Callable[[Batch], Tensor]:
    """torch.compile of the reference; the arguments' checks stay outside, to its advantage."""
    compute = torch.compile(reference.distillation_losses)
    return lambda batch: sum(compute(**vars(batch), weights=weights, **OPTIONS).values())


class Timer:
    """Times on the device's own clock; times are in milliseconds."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def __call__(self, run: Callable[[], object]) -> tuple[object, float]:
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # Half a millisecond in which the host enqueues what is timed, so that the device finds it ready.
            torch.cuda._sleep(1_000_000)
            start.record()
            result = run()
            end.record()
            end.synchronize()
            return result, start.elapsed_time(end)
        begin = time.perf_counter()
        result = run()
        return result, 1e3 * (time.perf_counter() - begin)


def forward_and_backward(compute: Callable[[Batch], Tensor], batch: Batch, timer: Timer) -> tuple[float, float]:
    batch = batch.with_leaves()
    loss, forward = timer(lambda: compute(batch))
    _, backward = timer(lambda: torch.autograd.grad(loss, batch.student))
    return forward, backward


def host_times(compute: Callable[[Batch], Tensor], batch: Batch) -> tuple[float, float]:
    """How long forward and backward keep the host, which waits for the device before them only."""
    torch.cuda.synchronize()
    return forward_and_backward(compute, batch, Timer("cpu"))


def loss_and_gradients(compute: Callable[[Batch], Tensor], batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
    batch = batch.with_leaves()
    loss = compute(batch)
    return loss, torch.autograd.grad(loss, batch.student)


def capturable(compute: Callable[[Batch], Tensor], batch: Batch) -> bool:
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
    compute: Callable[[Batch], Tensor], batch: Batch, pool: object
) -> tuple[list[torch.cuda.CUDAGraph], tuple[Tensor, tuple[Tensor, ...]]]:
    """CUDA graphs of forward and of forward with backward, and what every replay of the latter makes anew.

    Graphs of one pool share memory: a result that the caller drops is overwritten by others' replays.
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


def timed_calls(
    compute: Callable[[Batch], Tensor], batches: list[Batch], timer: Timer, replayed: bool
) -> Callable[[int], tuple[float, float]]:
    """Forward's and backward's milliseconds by turn, each turn on the next batch."""
    if not replayed:
        return lambda turn: forward_and_backward(compute, batches[turn % len(batches)], timer)
    pool = torch.cuda.graph_pool_handle()
    graphs = [capture(compute, batch, pool)[0] for batch in batches]

    def replay(turn: int) -> tuple[float, float]:
        forward, both = (timer(graph.replay)[1] for graph in graphs[turn % len(batches)])
        return forward, both - forward

    return replay


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


def check_equality(
    implementations: dict[str, Callable[[Batch], Tensor]], batch: Batch, weights: LossWeights, replayed: dict[str, bool]
) -> dict[str, dict[str, float]]:
    """Relative errors of the summed loss and, by each level's largest element, of the gradient, against float64."""
    exact_loss, exact_gradients = loss_and_gradients(total_loss("reference", weights), batch.to(torch.float64))
    errors = {}
    for name, compute in implementations.items():
        if replayed[name]:
            (_, graph), (loss, gradients) = capture(compute, batch, torch.cuda.graph_pool_handle())
            graph.replay()
            torch.cuda.synchronize()
        else:
            loss, gradients = loss_and_gradients(compute, batch)
        pairs = zip(gradients, exact_gradients)
        errors[name] = {
            "loss_error": abs(loss.item() - exact_loss.item()) / abs(exact_loss.item()),
            "gradient_error": max(((g.double() - e).abs().max() / e.abs().max()).item() for g, e in pairs),
        }
    return errors


def peak_extra_bytes(compute: Callable[[Batch], Tensor], batch: Batch) -> int:
    """The most memory that forward and backward hold at a time beside their inputs and the gradient."""
    if batch.student[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_and_gradients(compute, batch)
        return torch.cuda.max_memory_allocated() - before - batch.feature_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss_and_gradients(compute, batch)
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


def sweep(args: argparse.Namespace, kinds: dict[str, tuple[int, float]], timer: Timer) -> dict[str, float]:
    """Milliseconds of the extension's forward and backward for each number of boxes and area."""
    compute = total_loss("fused", WEIGHTS[args.weights])
    subjects = {}
    for name, (num_boxes, area) in kinds.items():
        batches = [make_batch(args, seed, num_boxes, area) for seed in range(2)]
        subjects[name] = timed_calls(compute, batches, timer, capturable(compute, batches[0]))
    times = take_turns(subjects, args.rounds, args.warm_up)
    return {name: statistics.median(map(sum, zip(*columns))) for name, columns in times.items()}


def compare(args: argparse.Namespace, timer: Timer) -> tuple[dict[str, dict], float, int]:
    """Results per implementation, the floor in milliseconds, and the bytes of the student's features."""
    weights, passes = WEIGHTS[args.weights], PASSES[args.weights]
    implementations = {"eager reference": total_loss("reference", weights)}
    if args.compile:
        implementations["compiled reference"] = compiled_reference(weights)
    implementations["fused"] = total_loss("fused", weights)
    batches = [make_batch(args, seed, args.boxes) for seed in range(args.inputs)]
    feature_bytes = batches[0].feature_bytes()
    replayed = {name: capturable(compute, batches[0]) for name, compute in implementations.items()}
    errors = check_equality(implementations, batches[0], weights, replayed)

    def subject(name: str, compute: Callable[[Batch], Tensor]):
        call = timed_calls(compute, batches, timer, replayed[name])
        if not timer.cuda:
            return call
        return lambda turn: (*call(turn), *host_times(compute, batches[turn % len(batches)]))

    subjects = {name: subject(name, compute) for name, compute in implementations.items()}
    subjects["copy"] = copy_milliseconds(batches[0], timer)
    times = take_turns(subjects, args.rounds, args.warm_up)
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
            "extra_memory": peak_extra_bytes(compute, batches[0]) / feature_bytes,
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


def measure(args: argparse.Namespace) -> dict:
    timer = Timer(args.device)
    results, floor, feature_bytes = compare(args, timer)
    result = {
        "device": torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"CPU, {counted(torch.get_num_threads(), 'thread')}",
        "torch": torch.__version__,
        "shapes": args.shapes,
        "batch": args.batch,
        "dtype": str(args.dtype).removeprefix("torch."),
        "layout": args.layout,
        "boxes": args.boxes,
        "weights": args.weights,
        "passes": PASSES[args.weights],
        "feature_megabytes": feature_bytes / 1e6,
        "floor_ms": floor,
        "implementations": results,
    }
    if args.sweeps:
        result["ms_by_boxes"] = sweep(args, {str(count): (count, 1.0) for count in BOX_COUNTS}, timer)
        result["ms_by_area"] = sweep(args, {str(area): (args.boxes, area) for area in AREAS}, timer)
    return result


def report(result: dict) -> str:
    """The tables as Markdown."""
    passes, floor = result["passes"], result["floor_ms"]
    copied = passes * result["feature_megabytes"] / floor
    copying = {"both_ms": floor, "of_floor": 1.0, "gigabytes_per_second": copied}
    lines = {**result["implementations"], f"floor: {passes} passes": copying}
    columns = {header: c for header, c in COLUMNS.items() if c[0] in result["implementations"]["fused"]}
    rows = [
        [name, *(format(line[key], spec) if key in line else "" for key, spec in columns.values())]
        for name, line in lines.items()
    ]
    title = (
        f"{result['shapes']}, batch {result['batch']}, {result['dtype']}, {result['layout']}, "
        f"{counted(result['boxes'], 'box', 'boxes')} an image, weights: {result['weights']}; "
        f"{result['feature_megabytes']:.1f} MB of student features; "
        f"{result['device']}; torch {result['torch']}"
    )
    options = {"tablefmt": "pipe", "disable_numparse": True}
    parts = [title, tabulate(rows, ["", *columns], **options)]
    if "ms_by_boxes" in result:
        by_boxes, by_area = result["ms_by_boxes"], result["ms_by_area"]
        rows = [[count, f"{ms:.3f}", f"{ms / by_boxes['0']:.3f}"] for count, ms in by_boxes.items()]
        parts.append(tabulate(rows, ["boxes an image", "fused, both ms", "/ no boxes"], **options))
        rows = [[area, f"{ms:.3f}", f"{ms / float(area) / by_area['1.0']:.3f}"] for area, ms in by_area.items()]
        parts.append(tabulate(rows, ["area", "fused, both ms", "ms per area / at area 1"], **options))
    return "\n\n".join(parts)


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
    label = f"{result['passes']} passes at copy bandwidth"
    axes.axvline(result["floor_ms"], color="black", linestyle="--", label=label)
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
    parser.add_argument(
        "--weights", choices=tuple(WEIGHTS), default="all", help="of all four losses, or a config's default"
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; the median counts")
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before")
    parser.add_argument("--inputs", type=int, default=3, help="sets of inputs that rotate")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parser.add_argument("--no-sweeps", dest="sweeps", action="store_false", help="one number of boxes, one area")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times there")
    args = parser.parse_args()
    for name, least in (("batch", 1), ("boxes", 0), ("rounds", 1), ("warm_up", 0), ("inputs", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be at least {least}")
    check_written_files(parser, args, ("json", "plot"))
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
