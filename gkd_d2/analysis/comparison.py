"""Finished runs compared on one validation set, as Markdown tables and notes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from gkd_d2.analysis.cost import Cost
from gkd_d2.analysis.roles import find_baselines, find_teacher, training_differences
from gkd_d2.analysis.runs import HEADLINE, Run
from gkd_d2.config import method_title

METRICS = {
    HEADLINE: "AP",
    "bbox/AP50": "AP50",
    "kitti/AP_moderate": "KITTI AP moderate",
    "kitti/mAP50_voc": "VOC mAP50",
    "bbox_EMA/AP": "AP (EMA)",
    "kitti_EMA/AP_moderate": "KITTI AP moderate (EMA)",
}
_CLASS_METRIC = "bbox/AP-"
NONE = "–"


def markdown_table(
    runs: Sequence[Run],
    dataset: str,
    *,
    roles: Mapping[str, str] | None = None,
    costs: Mapping[str, Cost] | None = None,
) -> str:
    """The average precision of every run, in percent, as a Markdown table.

    Args:
        runs: evaluated on ``dataset``.
        dataset: name of the validation set.
        roles: run name -> its role, as a column.
        costs: run name -> what its detector costs, as columns.

    Raises:
        ValueError: a run was never evaluated on ``dataset``.
    """
    metrics = [run.metrics(dataset) for run in runs]
    classes = sorted({name for found in metrics for name in found if name.startswith(_CLASS_METRIC)})
    labels = METRICS | {name: f"AP {name.removeprefix(_CLASS_METRIC)}" for name in classes}
    columns = {"": [run.name for run in runs]}
    if roles is not None:
        columns["role"] = [roles[run.name] for run in runs]
    for name, label in labels.items():
        if any(name in found for found in metrics):
            columns[label] = [_number(found.get(name)) for found in metrics]
    if costs is not None:
        columns["parameters (M)"] = [_number(costs[run.name].parameters / 1e6, 2) for run in runs]
        columns["GFLOPs"] = [_number(costs[run.name].gflops, 2) for run in runs]
        columns["ms an image"] = [_number(costs[run.name].milliseconds) for run in runs]
    columns["iterations"] = [str(run.iterations()) for run in runs]
    return markdown(columns, left=1 if roles is None else 2)


def gain_table(runs: Sequence[Run], dataset: str) -> str:
    """What every distilled run gains over its student trained alone, as a Markdown table; "" where there is no gain.

    The gain is the distilled run's average precision minus that of its baseline, their mean where there are several.
    The part of the gap is the gain over what the teacher is better than the baseline.

    Args:
        runs: evaluated on ``dataset``.
        dataset: name of the validation set.

    Raises:
        ValueError: a run was never evaluated on ``dataset``.
    """
    rows = []
    for run in runs:
        baselines = find_baselines(run, runs) if run.distilled else []
        if not baselines:
            continue
        teacher = find_teacher(run, runs)
        best = teacher.metrics(dataset) if teacher else {}
        alone = [baseline.metrics(dataset) for baseline in baselines]
        for name, value in run.metrics(dataset).items():
            if name not in METRICS or not all(name in found for found in alone):
                continue
            base = statistics.fmean(found[name] for found in alone)
            gap = best[name] - base if name in best else 0
            part = f"{100 * (value - base) / gap:.0f} %" if gap > 0 else NONE
            numbers = [_number(value), _number(base), f"{value - base:+.1f}", _number(best.get(name)), part]
            rows.append([run.name, METRICS[name], *numbers])
    if not rows:
        return ""
    header = ["", "metric", "distilled", "alone", "gain", "teacher", "of the gap to the teacher"]
    return markdown(dict(zip(header, zip(*rows))), left=2)


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader of the gains must know: who is compared with whom, and what else differs between them."""
    lines = []
    for run in (run for run in runs if run.distilled):
        baselines, teacher = find_baselines(run, runs), find_teacher(run, runs)
        if not baselines:
            lines.append(f"{run.name}: no run here trained the same MODEL alone, so its gain is not known.")
            continue
        names = ", ".join(baseline.name for baseline in baselines)
        mean = "the mean of " if len(baselines) > 1 else ""
        lines.append(
            f"{run.name}: the method is {method_title(run.config)}; alone is {mean}{names}; "
            f"teacher is {teacher.name if teacher else 'no run here'}."
        )
        for baseline in baselines:
            different = training_differences(run, baseline).items()
            if different:
                listed = "; ".join(f"{key} {ours!r} here, {theirs!r} there" for key, (ours, theirs) in different)
                lines.append(
                    f"{run.name} and {baseline.name} were configured differently beside distillation: {listed}."
                )
    return lines


def markdown(columns: Mapping[str, Sequence[str]], *, left: int) -> str:
    """A Markdown table whose first ``left`` columns are aligned to the left, the others to the right."""
    rows = [list(columns), ["---"] * left + ["---:"] * (len(columns) - left), *zip(*columns.values())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _number(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{value:.{digits}f}"
