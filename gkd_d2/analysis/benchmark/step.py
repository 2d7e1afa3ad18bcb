"""A distilled training step timed against what it cannot avoid: the student's own step and the teacher's forward.

The networks have random weights and are given random images, so that neither checkpoints nor data are needed. The three
take turns in one process; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from gkd_d2.analysis.benchmark.inputs import random_images
from gkd_d2.analysis.benchmark.phases import (
    BACKWARD,
    OPTIMIZER,
    PHASES,
    STUDENT_FORWARD,
    TEACHER_FORWARD,
    PhaseClock,
    claim_phases,
)
from gkd_d2.analysis.benchmark.settings import Setting, make_settings
from gkd_d2.analysis.benchmark.timing import Rounds, device_name, peak_bytes, take_turns
from gkd_d2.config import teacher_spec, without_backbone_weights
from gkd_d2.methods import Method, build_method
from gkd_d2.modeling.common_size import sized_features
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.modeling.responses import check_responses

# So small that no gradient of random networks overflows in float16.
_FLOAT16_SCALE = 2.0**10
# The steps that are timed, methods of Steps.
_KINDS = ("plain", "teacher", "distilled")


class Steps:
    """The three things that are timed, in one setting, whose context the caller enters.

    Args:
        distiller: left as it is but for the gradients of its parameters and running statistics.
        cfg: its config.
        batch: of all steps.
        setting: how they run.
        clock: that :func:`gkd_d2.analysis.benchmark.phases.claim_phases` was given.
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
        """The student's own step: phase -> milliseconds."""
        return self._train(self._distiller.student, 1.0)

    def distilled(self) -> dict[str, float]:
        """The whole distilled step: phase -> milliseconds."""
        self._distiller.gradient_scale = _FLOAT16_SCALE if self._dtype == torch.float16 else 1.0
        return self._train(self._distiller, self._distiller.gradient_scale)

    def teacher(self) -> dict[str, float]:
        """The teacher's forward with its heads and without any gradient: phase -> milliseconds."""
        teacher, size = self._distiller._teacher, self._distiller._common_size.of(self._batch)
        self._clock.switch(TEACHER_FORWARD)
        with self._autocast(), torch.no_grad(), teacher._own_streams():
            images, features = sized_features(teacher.split, self._batch, size)
            teacher.split.losses(images, features, self._batch)
        return self._clock.finish()

    def feature_bytes(self) -> int:
        """Of the teacher's distilled levels."""
        with self._autocast():
            levels, size = self._distiller.teacher_features, self._distiller._common_size.of(self._batch)
            seen = self._distiller._teacher.observe(self._batch, levels, with_gradients=False, size=size)
        features, _ = seen.at(levels)
        self._clock.finish()
        return sum(feature.nbytes for feature in features)

    def state_bytes(self, *models: nn.Module) -> int:
        """Of the weights, buffers and optimizer's state of models."""
        state = [value for m in models for p in m.parameters() for value in self._optimizer.state.get(p, {}).values()]
        return _bytes_of(itertools.chain(state, *(itertools.chain(m.parameters(), m.buffers()) for m in models)))

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


def measure_step(
    cfg: CfgNode,
    config_file: str,
    *,
    batch: int,
    size: tuple[int, int],
    boxes: int,
    rounds: Rounds,
    settings: Collection[str] = (),
    methods: Collection[str] = (),
) -> dict:
    """Time the steps of a distiller, phase by phase, and measure their memory, in several settings turn by turn.

    Args:
        cfg: of the distiller; its MODEL.DEVICE is "cpu" or "cuda". The teacher's weights that it names are replaced by
            random ones.
        config_file: that it was read from, for the results.
        batch: number of images.
        size: (height, width) of the images in pixels.
        boxes: in each image.
        rounds: of which at least one is a warm-up, for the first step makes the optimizer's state.
        settings: names of :func:`gkd_d2.analysis.benchmark.settings.make_settings`; empty: all.
        methods: such as "crosskd" and "gkd+crosskd", to be timed beside the config's own, as settings of these names.

    Returns:
        What :func:`gkd_d2.analysis.benchmark.tables.step_tables` shows, in types of JSON.

    Raises:
        ValueError: a setting is none of this distiller's, or it, or a method, can't be built from the config.
    """
    device = cfg.MODEL.DEVICE
    distiller = build_random_distiller(cfg)
    clock = PhaseClock(device)
    claim_phases(distiller, clock)
    batched_inputs = random_images(batch, size, boxes, distiller._split.num_classes)
    known = make_settings(distiller, device, {name: _build_method(cfg, name, distiller) for name in methods})
    unknown = set(settings) - set(known)
    if unknown:
        raise ValueError(f"--setting {', '.join(unknown)} is none of this config's: {', '.join(known)}")
    chosen = {name: setting for name, setting in known.items() if not settings or name in settings or name in methods}
    # One optimizer a setting: its state takes the layout of the weights.
    steps = {name: Steps(distiller, cfg, batched_inputs, setting, clock) for name, setting in chosen.items()}

    def subject(name: str, storage: EventStorage) -> Callable[[int], tuple[dict[str, float], ...]]:
        def run(_: int) -> tuple[dict[str, float], ...]:
            phases = []
            with chosen[name].context():
                for kind in _KINDS:
                    phases.append(getattr(steps[name], kind)())
                    storage.step()
                steps[name].release()
            return tuple(phases)

        return run

    memory = {}
    load = os.getloadavg()[0]
    # TorchScript recompiles what runs often, which the trainer turns off on a CPU.
    with torch.jit.optimized_execution(device != "cpu"), EventStorage() as storage:
        phases = take_turns({name: subject(name, storage) for name in chosen}, rounds)
        for name, setting in chosen.items():
            with setting.context():
                memory[name] = _measure_memory(steps[name], distiller, device)
    cpu = f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    return {
        "config": config_file,
        "device": device_name(device, cpu),
        "load_before_and_after": [load, os.getloadavg()[0]],
        # An allocator that keeps freed memory changes a CPU's times.
        "preloaded": os.environ.get("LD_PRELOAD", ""),
        "torch": torch.__version__,
        "batch": batch,
        "size": size,
        "rounds": rounds.timed,
        "settings": {name: _summary(dict(zip(_KINDS, phases[name]))) | {"memory": memory[name]} for name in chosen},
    }


def _build_method(cfg: CfgNode, name: str, distiller: GKDDistiller) -> Method:
    """A method, or several with "+" between them, that the distiller's can be replaced by."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.GKD.METHOD, cfg.GKD.METHODS = "gkd", name.split("+")
    # What ratios the config's own method has says nothing about others; a step of any weights costs as much.
    cfg.GKD.BALANCE, cfg.GKD.RATIOS = "fixed", CfgNode()
    method = build_method(cfg)
    method.build_parameters(dict.fromkeys(distiller.student_features, 1))
    if any(True for _ in method.parameters()):
        raise ValueError(
            f"--method {name} has parameters of its own: give it by GKD.METHOD instead, in a run of its own"
        )
    if method.needs_predictions:
        teacher, pairs = distiller._teacher, zip(distiller.student_features, distiller.teacher_features)
        check_responses(method, distiller._split, teacher.split, pairs, teacher.classes)
    return method


def build_random_distiller(cfg: CfgNode) -> GKDDistiller:
    """The distiller of a config, in training mode, its networks with random weights.

    Args:
        cfg: its GKD.TEACHER.WEIGHTS are changed to a file that is gone afterwards.

    Raises:
        ValueError: it can't be built from the config.
    """
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "teacher.pth"
        cfg.GKD.TEACHER.WEIGHTS = str(weights)
        teacher = _calm(teacher_spec(cfg).build())
        torch.save({"model": teacher.state_dict()}, weights)
        del teacher
        distiller = build_model(without_backbone_weights(cfg)).train()
    distiller.listeners = []
    # Where weights are calibrated, a step of any factors costs as much.
    distiller.factors = dict.fromkeys(distiller.method.active().values(), 1.0)
    _calm(distiller.student)
    return distiller


def _calm(model: nn.Module) -> nn.Module:
    """Make the blocks of a random ResNet nearly identities, for features would grow from block to block."""
    for block in model.modules():
        if isinstance(block, (BasicBlock, BottleneckBlock)):
            last = block.conv3 if isinstance(block, BottleneckBlock) else block.conv2
            with torch.no_grad():
                last.norm.weight.fill_(0.2)
    return model


def _measure_memory(steps: Steps, distiller: GKDDistiller, device: str) -> dict[str, float]:
    """Peaks in megabytes, and the distilled step's in proportion to what its goal is."""
    teacher = distiller.teacher
    steps.release()
    plain = steps.state_bytes(distiller.student) + peak_bytes(steps.plain, device)
    steps.release()
    distilled = steps.state_bytes(distiller, teacher) + peak_bytes(steps.distilled, device)
    weights, features = steps.state_bytes(teacher), steps.feature_bytes()
    megabytes = {"plain": plain, "distilled": distilled, "teacher_weights": weights, "teacher_features": features}
    result = {f"{name}_megabytes": value / 1e6 for name, value in megabytes.items()}
    return result | {"ratio": distilled / (plain + weights + features)}


def _bytes_of(values: Iterable[object]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def _summary(rounds: dict[str, list[dict[str, float]]]) -> dict:
    """Medians in milliseconds, and the ratio of each round's distilled step to what it cannot avoid."""
    totals = {kind: [sum(times.values()) for times in turns] for kind, turns in rounds.items()}
    ratios = [d / (p + t) for p, t, d in zip(totals["plain"], totals["teacher"], totals["distilled"])]
    return {
        "plain_ms": statistics.median(totals["plain"]),
        "teacher_ms": statistics.median(totals["teacher"]),
        "distilled_ms": statistics.median(totals["distilled"]),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "phases_ms": {kind: _median_phases(turns) for kind, turns in rounds.items()},
    }


def _median_phases(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {phase: statistics.median(times[phase] for times in rounds) for phase in PHASES if phase in rounds[0]}
