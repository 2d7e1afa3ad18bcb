#!/usr/bin/env python3
"""Times a distilled training step against what it cannot avoid: the student's own step and the teacher's forward.

The networks of a distiller's config are built with random weights and given random images and boxes, so that neither
checkpoints nor data are needed. In every setting the student's own step, the teacher's forward with its heads and the
distilled step take turns in one process, so that a busy machine favours none; the ratio is the median of the rounds'
ratios. The phases of a step add up to it. Memory is the peak of what torch's allocator holds in a step, the weights and
the optimizer's state that the step needs included. On a CPU, run it with an allocator that keeps freed memory, as
docs/benchmarks.md shows: fresh memory costs more than much of the arithmetic, and not in every step alike. Examples:
    python tools/benchmark_step.py --config-file configs/gkd_frcnn_kitti.yaml --json step.json --plot step.png
    python tools/benchmark_step.py --config-file configs/gkd_retinanet_kitti.yaml --setting default --batch 1 \\
        --size 128 416 --rounds 3
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from gkd_d2.config import read_distiller_config, teacher_config
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.utils.command_line import check_written_files, parse_options_first
from gkd_d2.utils.registries import build_detector
from gkd_d2.utils.text import counted
from gkd_d2.utils.user_modules import add_import_option

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

GOAL, MEMORY_GOAL = 1.20, 1.25
FEWER_PROPOSALS = {"half the proposals": 2, "an eighth of the proposals": 8}
# So small that no gradient of random networks overflows in float16.
FLOAT16_SCALE = 2.0**10

TEACHER_FORWARD, TEACHER_GRADIENT = "teacher forward", "teacher gradient"
STUDENT_FORWARD, HEADS_GRADIENT = "student forward", "heads' gradient"
LOSSES, BACKWARD, OPTIMIZER = "distillation losses", "backward", "optimizer"
PHASES = (TEACHER_FORWARD, TEACHER_GRADIENT, STUDENT_FORWARD, HEADS_GRADIENT, LOSSES, BACKWARD, OPTIMIZER)
PLAIN_PHASES = (STUDENT_FORWARD, BACKWARD, OPTIMIZER)
KINDS = ("plain", "teacher", "distilled")


class PhaseClock:
    """Divides the time on the device's own clock among phases; times are in milliseconds."""

    def __init__(self, device: str):
        self._cuda = device == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def switch(self, phase: str) -> str:
        """A phase begins; returns the one that it ends or interrupts."""
        mark = time.perf_counter()
        if self._cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        previous = self._marks[-1][0] if self._marks else ""
        self._marks.append((phase, mark))
        return previous

    def during(self, phase: str, function: Callable) -> Callable:
        """``function``, whose time belongs to ``phase`` but for what inner calls claim."""

        @functools.wraps(function)
        def timed(*args, **kwargs):
            outer = self.switch(phase)
            result = function(*args, **kwargs)
            self.switch(outer)
            return result

        return timed

    def finish(self) -> dict[str, float]:
        """Phase -> its time since the last call."""
        self.switch("")
        marks, self._marks = self._marks, []
        times: dict[str, float] = {}
        if self._cuda:
            marks[-1][1].synchronize()
        for (phase, begin), (_, end) in itertools.pairwise(marks):
            elapsed = begin.elapsed_time(end) if self._cuda else 1e3 * (end - begin)
            times[phase] = times.get(phase, 0.0) + elapsed
        return times


@dataclasses.dataclass(frozen=True)
class Setting:
    """A way to run the steps.

    Attributes:
        context: to be entered around the steps.
        dtype: of autocast; None: float32.
    """

    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    dtype: torch.dtype | None = None


def build_distiller(cfg: CfgNode) -> GKDDistiller:
    """The distiller of a config, its networks with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "teacher.pth"
        cfg.GKD.TEACHER.WEIGHTS = str(weights)
        theirs = teacher_config(cfg)
        teacher = calm(build_detector(theirs, place=" of GKD.TEACHER.CONFIG_FILE"))
        torch.save({"model": teacher.state_dict()}, weights)
        del teacher
        distiller = build_model(cfg).train()
    distiller.listeners = []
    calm(distiller.student)
    return distiller


def calm(model: nn.Module) -> nn.Module:
    """Make the blocks of a random ResNet nearly identities, for features would grow from block to block."""
    for block in model.modules():
        if isinstance(block, (BasicBlock, BottleneckBlock)):
            last = block.conv3 if isinstance(block, BottleneckBlock) else block.conv2
            with torch.no_grad():
                last.norm.weight.fill_(0.2)
    return model


def make_batch(args: argparse.Namespace, num_classes: int) -> list[dict]:
    """Random images, on the CPU as from a loader; boxes with sides of 16 pixels to half the image."""
    generator = torch.Generator().manual_seed(0)
    height, width = args.size
    limits = torch.tensor([width, height])
    batch = []
    for _ in range(args.batch):
        centres = torch.rand(args.boxes, 2, generator=generator) * limits
        sides = 16 * (limits / 32) ** torch.rand(args.boxes, 2, generator=generator)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([centres - sides / 2, centres + sides / 2], dim=1))
        instances.gt_boxes.clip((height, width))
        instances.gt_classes = torch.randint(num_classes, (args.boxes,), generator=generator)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def claim_phases(distiller: GKDDistiller, clock: PhaseClock) -> None:
    """Let the distiller's parts tell the clock when they work; what is left to the outer ones are gradients."""
    teacher = distiller._teacher
    for owner, method, phase in (
        (teacher, "features", TEACHER_GRADIENT),
        (teacher.split, "features", TEACHER_FORWARD),
        (teacher.split, "losses", TEACHER_FORWARD),
        (distiller, "observe", HEADS_GRADIENT),
        (distiller._split, "features", STUDENT_FORWARD),
        (distiller._split, "losses", STUDENT_FORWARD),
        (distiller, "_distil", LOSSES),
    ):
        setattr(owner, method, clock.during(phase, getattr(owner, method)))


class Steps:
    """The three things that are timed, in one setting, whose context the caller enters.

    Args:
        distiller: left as it is but for the gradients of its parameters and running statistics.
        cfg: its config.
        batch: of all steps.
        setting: how they run.
        clock: that :func:`claim_phases` was given.
    """

    def __init__(self, distiller: GKDDistiller, cfg: CfgNode, batch: list[dict], setting: Setting, clock: PhaseClock):
        self._distiller = distiller
        self._batch = batch
        self._dtype = setting.dtype
        self._clock = clock
        # Both kinds of step share the student's weights, which stay: at learning rate 0 a step costs as much.
        self._optimizer = build_optimizer(cfg, distiller)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0

    def plain(self) -> dict[str, float]:
        """The student's own step."""
        return self._train(self._distiller.student, 1.0)

    def distilled(self) -> dict[str, float]:
        """The whole distilled step."""
        self._distiller.gradient_scale = FLOAT16_SCALE if self._dtype == torch.float16 else 1.0
        return self._train(self._distiller, self._distiller.gradient_scale)

    def teacher(self) -> dict[str, float]:
        """The teacher's forward with its heads and without any gradient."""
        teacher = self._distiller._teacher
        self._clock.switch(TEACHER_FORWARD)
        with self._autocast(), torch.no_grad(), teacher._own_streams():
            images, features = teacher.split.features(self._batch)
            teacher.split.losses(images, features, self._batch)
        return self._clock.finish()

    def feature_bytes(self) -> int:
        """Of the teacher's distilled levels."""
        with self._autocast():
            levels = self._distiller.teacher_features
            features, _ = self._distiller._teacher.features(self._batch, levels, with_gradients=False)
        self._clock.finish()
        return sum(feature.nbytes for feature in features)

    def state_bytes(self, *models: nn.Module) -> int:
        """Of the weights, buffers and optimizer's state of models."""
        state = [value for m in models for p in m.parameters() for value in self._optimizer.state.get(p, {}).values()]
        return tensor_bytes(itertools.chain(state, *(itertools.chain(m.parameters(), m.buffers()) for m in models)))

    def release(self) -> None:
        """Free the gradients of the last step."""
        self._optimizer.zero_grad(set_to_none=True)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._distiller.device.type, self._dtype, enabled=self._dtype is not None)

    def _train(self, model: nn.Module, scale: float) -> dict[str, float]:
        self.release()
        self._clock.switch(STUDENT_FORWARD)
        with self._autocast():
            losses = model(self._batch)
            total = scale * sum(losses.values())
        self._clock.switch(BACKWARD)
        total.backward()
        self._clock.switch(OPTIMIZER)
        self._optimizer.step()
        return self._clock.finish()


def tensor_bytes(tensors: Iterable[object]) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object):
    """``owner`` with another attribute."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def channels_last(distiller: GKDDistiller):
    """Weights of both networks in the layout that makes the features channels_last."""
    distiller.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        distiller.to(memory_format=torch.contiguous_format)


def make_settings(distiller: GKDDistiller, device: str) -> dict[str, Setting]:
    """Name -> setting, each but the first with one thing changed."""
    teacher = distiller._teacher.model
    compiled = torch.compile(teacher.backbone)
    settings = {
        "default": Setting(),
        "two passes": Setting(lambda: replaced(distiller, "one_pass", False)),
        "channels_last": Setting(lambda: channels_last(distiller)),
        "compiled teacher": Setting(lambda: replaced(teacher, "backbone", compiled)),
        "bfloat16": Setting(dtype=torch.bfloat16),
    }
    if device == "cuda":
        settings["float16"] = Setting(dtype=torch.float16)
    if hasattr(teacher, "roi_heads"):
        number = teacher.roi_heads.batch_size_per_image
        for name, divisor in FEWER_PROPOSALS.items():
            fewer = functools.partial(replaced, teacher.roi_heads, "batch_size_per_image", number // divisor)
            settings[name] = Setting(fewer)
    return settings


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """The most memory that a step holds beside what was held before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def measure_memory(steps: Steps, distiller: GKDDistiller, device: str) -> dict[str, float]:
    """Peaks in megabytes, and the distilled step's in proportion to what its goal is."""
    teacher = distiller._teacher.model
    steps.release()
    plain = steps.state_bytes(distiller.student) + peak_bytes(steps.plain, device)
    steps.release()
    distilled = steps.state_bytes(distiller, teacher) + peak_bytes(steps.distilled, device)
    weights, features = steps.state_bytes(teacher), steps.feature_bytes()
    megabytes = {"plain": plain, "distilled": distilled, "teacher_weights": weights, "teacher_features": features}
    result = {f"{name}_megabytes": value / 1e6 for name, value in megabytes.items()}
    return result | {"ratio": distilled / (plain + weights + features)}


def median_phases(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {phase: statistics.median(times[phase] for times in rounds) for phase in PHASES if phase in rounds[0]}


def measure(args: argparse.Namespace, cfg: CfgNode) -> dict:
    """All settings, turn by turn."""
    distiller = build_distiller(cfg)
    clock = PhaseClock(args.device)
    claim_phases(distiller, clock)
    batch = make_batch(args, distiller._split.num_classes)
    settings = make_settings(distiller, args.device)
    unknown = set(args.setting or ()) - set(settings)
    if unknown:
        raise ValueError(f"--setting {', '.join(unknown)} is none of this config's: {', '.join(settings)}")
    # One optimizer a setting: its state takes the layout of the weights.
    chosen = {
        name: Steps(distiller, cfg, batch, setting, clock)
        for name, setting in settings.items()
        if not args.setting or name in args.setting
    }
    rounds = {name: {kind: [] for kind in KINDS} for name in chosen}
    memory = {}
    load = os.getloadavg()[0]
    # TorchScript recompiles what runs often, which the trainer turns off on a CPU.
    with torch.jit.optimized_execution(args.device != "cpu"), EventStorage() as storage:
        for turn in range(args.warm_up + args.rounds):
            for name, steps in chosen.items():
                with settings[name].context():
                    for kind in KINDS:
                        times = getattr(steps, kind)()
                        storage.step()
                        if turn >= args.warm_up:
                            rounds[name][kind].append(times)
                    steps.release()
        for name, steps in chosen.items():
            with settings[name].context():
                memory[name] = measure_memory(steps, distiller, args.device)
    return {
        "config": args.config_file,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu_name(),
        "load_before_and_after": [load, os.getloadavg()[0]],
        # An allocator that keeps freed memory changes a CPU's times.
        "preloaded": os.environ.get("LD_PRELOAD", ""),
        "torch": torch.__version__,
        "batch": args.batch,
        "size": args.size,
        "rounds": args.rounds,
        "settings": {name: summary(rounds[name]) | {"memory": memory[name]} for name in chosen},
    }


def summary(rounds: dict[str, list[dict[str, float]]]) -> dict:
    """Medians in milliseconds, and the ratio of each round's distilled step to what it cannot avoid."""
    totals = {kind: [sum(times.values()) for times in turns] for kind, turns in rounds.items()}
    ratios = [d / (p + t) for p, t, d in zip(totals["plain"], totals["teacher"], totals["distilled"])]
    return {
        "plain_ms": statistics.median(totals["plain"]),
        "teacher_ms": statistics.median(totals["teacher"]),
        "distilled_ms": statistics.median(totals["distilled"]),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "phases_ms": {kind: median_phases(turns) for kind, turns in rounds.items()},
    }


def cpu_name() -> str:
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}, {counted(torch.get_num_threads(), 'thread')}"


def report(result: dict) -> str:
    """The tables as Markdown."""
    load = " and ".join(f"{value:.1f}" for value in result["load_before_and_after"])
    title = (
        f"{result['config']}, {result['batch']} x {result['size'][0]}x{result['size'][1]}, "
        f"{counted(result['rounds'], 'round')}; "
        f"{result['device']}; load before and after {load}; torch {result['torch']}; "
        f"preloaded: {result['preloaded'] or 'nothing'}"
    )
    settings = result["settings"]
    times, memory = [], []
    for name, setting in settings.items():
        unavoidable = setting["plain_ms"] + setting["teacher_ms"]
        low, high = setting["ratio_range"]
        row = [setting["plain_ms"], setting["teacher_ms"], unavoidable, setting["distilled_ms"]]
        spread = f"{low:.3f} to {high:.3f}"
        times.append([name, *(f"{ms:.0f}" for ms in row), f"{setting['ratio']:.3f}", spread])
        peaks = setting["memory"]
        row = [peaks[f"{key}_megabytes"] for key in ("plain", "teacher_weights", "teacher_features", "distilled")]
        memory.append([name, *(f"{megabytes:.0f}" for megabytes in row), f"{peaks['ratio']:.3f}"])
    phases = [
        [phase, *(f"{s['phases_ms']['distilled'].get(phase, 0.0):.0f}" for s in settings.values())] for phase in PHASES
    ]
    plain = [[phase, *(f"{s['phases_ms']['plain'][phase]:.0f}" for s in settings.values())] for phase in PLAIN_PHASES]
    options = {"tablefmt": "pipe", "disable_numparse": True}
    time_headers = ["ms", "student's own step", "teacher's forward", "both", "distilled step", "/ both", "rounds"]
    memory_headers = ["MB", "student's own step", "teacher's weights", "its features", "distilled step", "/ all three"]
    return "\n\n".join(
        [
            title,
            tabulate(times, time_headers, **options),
            tabulate(phases, ["distilled step, ms", *settings], **options),
            tabulate(plain, ["student's own step, ms", *settings], **options),
            tabulate(memory, memory_headers, **options),
        ]
    )


def plot(result: dict, path: Path) -> None:
    """What cannot be avoided and the distilled step, bar beside bar, stacked by phase; the goal as a mark."""
    from matplotlib.figure import Figure

    settings = result["settings"]
    figure = Figure(figsize=(8, 1.5 + 0.9 * len(settings)), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(PHASES, ("#4c78a8", "#9ecae9", "#54a24b", "#b6d7a8", "#e45756", "#f58518", "#79706e")))
    labels, goals = [], []
    for index, (name, setting) in enumerate(settings.items()):
        phases = setting["phases_ms"]
        for kinds, label, place in ((("teacher", "plain"), "cannot be avoided", 0), (("distilled",), "distilled", 1)):
            height, left = 3 * index + place, 0.0
            labels.append((height, f"{name}: {label}"))
            for kind in kinds:
                for phase, milliseconds in phases[kind].items():
                    axes.barh(height, milliseconds, left=left, color=colours[phase], height=0.9)
                    left += milliseconds
        goals.append((3 * index + 1, GOAL * (setting["plain_ms"] + setting["teacher_ms"])))
    heights, limits = zip(*goals)
    mark = axes.scatter(limits, heights, marker="|", s=250, color="black", label=f"{GOAL:.2f} of the unavoidable")
    axes.set_yticks(*zip(*labels), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_title(f"{Path(result['config']).stem}, batch {result['batch']}, {result['device']}", fontsize=9)
    bars = [axes.barh(0, 0, color=colour, label=phase) for phase, colour in colours.items()]
    figure.legend(handles=[*bars, mark], fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of a distiller")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=2, help="images (default: 2)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=[384, 1248], metavar=("H", "W"), help="of the images (default: 384 1248)"
    )
    parser.add_argument("--boxes", type=int, default=10, help="boxes an image (default: 10)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before (default: 2)")
    parser.add_argument(
        "--setting", action="append", metavar="NAME", help="may be given several times (default: all that apply)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the phases there")
    add_import_option(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="override the config")
    args = parse_options_first(parser)
    # A first step makes the optimizer's state, which is no part of a step's cost.
    for name in ("batch", "boxes", "rounds", "warm_up"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be at least 1")
    check_written_files(parser, args, ("json", "plot"))
    if min(args.size) < 1:
        parser.error(f"--size is {args.size}, but both numbers must be at least 1")
    if not Path(args.config_file).is_file():
        parser.error(f"--config-file {args.config_file} is no file")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and there is none")
    return args


def main() -> None:
    """Run the command."""
    args = parse_arguments()
    try:
        cfg = read_distiller_config(args.config_file, args.opts, args.imports)
        cfg.MODEL.DEVICE = args.device
        result = measure(args, cfg)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(report(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
