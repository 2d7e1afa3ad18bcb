"""What the benchmarks measured, as bars."""

from __future__ import annotations

from pathlib import Path

from gkd_d2.analysis.benchmark.phases import PHASES

# How many times as long as what it cannot avoid a distilled step may take.
_GOAL = 1.20
_DPI = 150


def plot_losses(result: dict, path: Path) -> None:
    """Draw bars of forward and backward, and the floor as a line.

    Args:
        result: of :func:`gkd_d2.analysis.benchmark.losses.measure_losses`.
        path: of the picture to write.
    """
    figure = _figure(7, 3)
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
    figure.savefig(path, dpi=_DPI)


def plot_step(result: dict, path: Path) -> None:
    """Draw what cannot be avoided and the distilled step, bar beside bar, stacked by phase; the goal as a mark.

    Args:
        result: of :func:`gkd_d2.analysis.benchmark.step.measure_step`.
        path: of the picture to write.
    """
    settings = result["settings"]
    figure = _figure(8, 1.5 + 0.9 * len(settings))
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
        goals.append((3 * index + 1, _GOAL * (setting["plain_ms"] + setting["teacher_ms"])))
    heights, limits = zip(*goals)
    mark = axes.scatter(limits, heights, marker="|", s=250, color="black", label=f"{_GOAL:.2f} of the unavoidable")
    axes.set_yticks(*zip(*labels), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_title(f"{Path(result['config']).stem}, batch {result['batch']}, {result['device']}", fontsize=9)
    bars = [axes.barh(0, 0, color=colour, label=phase) for phase, colour in colours.items()]
    figure.legend(handles=[*bars, mark], fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=_DPI)


def _figure(width: float, height: float):
    """An empty matplotlib figure, its size in inches."""
    # matplotlib is for runs that draw.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
