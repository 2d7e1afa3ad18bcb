"""What the benchmarks measured, as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate

from gkd_d2.analysis.benchmark.phases import PHASES, PLAIN_PHASES
from gkd_d2.utils.text import counted

# Header -> key of an implementation's results, and format; what was not measured has no column.
_LOSS_COLUMNS = {
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


def loss_tables(result: dict) -> str:
    """A line of what was measured, the implementations and the floor, and the sweeps where they were measured.

    Args:
        result: of :func:`gkd_d2.analysis.benchmark.losses.measure_losses`.
    """
    passes, floor = result["passes"], result["floor_ms"]
    copied = passes * result["feature_megabytes"] / floor
    copying = {"both_ms": floor, "of_floor": 1.0, "gigabytes_per_second": copied}
    lines = {**result["implementations"], f"floor: {passes} passes": copying}
    columns = {header: c for header, c in _LOSS_COLUMNS.items() if c[0] in result["implementations"]["fused"]}
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
    parts = [title, _table(rows, ["", *columns])]
    if "ms_by_boxes" in result:
        by_boxes, by_area = result["ms_by_boxes"], result["ms_by_area"]
        rows = [[count, f"{ms:.3f}", f"{ms / by_boxes['0']:.3f}"] for count, ms in by_boxes.items()]
        parts.append(_table(rows, ["boxes an image", "fused, both ms", "/ no boxes"]))
        rows = [[area, f"{ms:.3f}", f"{ms / float(area) / by_area['1.0']:.3f}"] for area, ms in by_area.items()]
        parts.append(_table(rows, ["area", "fused, both ms", "ms per area / at area 1"]))
    return "\n\n".join(parts)


def step_tables(result: dict) -> str:
    """A line of what was measured; for each setting the times, the phases of both kinds of step, and the memory.

    Args:
        result: of :func:`gkd_d2.analysis.benchmark.step.measure_step`.
    """
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
    time_headers = ["ms", "student's own step", "teacher's forward", "both", "distilled step", "/ both", "rounds"]
    memory_headers = ["MB", "student's own step", "teacher's weights", "its features", "distilled step", "/ all three"]
    return "\n\n".join(
        [
            title,
            _table(times, time_headers),
            _table(phases, ["distilled step, ms", *settings]),
            _table(plain, ["student's own step, ms", *settings]),
            _table(memory, memory_headers),
        ]
    )


def _table(rows: Iterable[Sequence[str]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)
