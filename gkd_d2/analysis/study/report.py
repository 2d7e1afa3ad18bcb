"""What a study shows: its part of a Markdown file."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from fvcore.nn import parameter_count

from gkd_d2.analysis.comparison import METRICS, NONE, markdown
from gkd_d2.analysis.runs import HEADLINE
from gkd_d2.analysis.study.gains import paired_gain
from gkd_d2.analysis.study.job import Job
from gkd_d2.analysis.study.plan import Study
from gkd_d2.analysis.study.plot import plot_settings
from gkd_d2.analysis.study.rows import Row, read_rows
from gkd_d2.config import detector_config
from gkd_d2.modeling.student import build_student
from gkd_d2.utils.files import write_whole
from gkd_d2.utils.text import counted


def study_section(study: Study, images: Path) -> str:
    """A study's part of the report, as Markdown.

    Args:
        study: its missing trainings are left out.
        images: folder that the plots go to.

    Returns:
        The text, with links to the plots relative to the folder above ``images``.
    """
    parts = [f"## {study.title}", _how(study)]
    for detector in study.detectors:
        teacher = study.teacher_job(detector)
        if not teacher.finished():
            parts.append(f"### {detector}\n\nIts teacher is not trained yet.")
            continue
        rows = read_rows(study, detector)
        parts += [f"### {detector}", _networks(study, detector, teacher), _table(study, rows)]
        tuned = _tuning_table(study, detector)
        if tuned:
            parts.append(tuned)
        path = images / f"{_slug(study.title)}_{_slug(detector)}.png"
        if any(row.metrics for row in rows.values()):
            images.mkdir(parents=True, exist_ok=True)
            plot_settings(rows, teacher.metrics()[HEADLINE], detector, path)
            parts.append(f"![AP of each seed]({images.name}/{path.name})")
    return "\n\n".join(parts) + "\n"


def write_sections(path: Path, sections: dict[str, str]) -> None:
    """Replace the parts of a report between ``<!-- study: NAME -->`` and ``<!-- end of study -->``; other text stays.

    Args:
        path: of the Markdown file; a new one gets the parts alone.
        sections: name -> text; those that the file does not have are added at its end.

    Raises:
        ValueError: a part begins more than once, or has no end; the file stays as it is.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else "# Results\n"
    for name, section in sections.items():
        begin, end = f"<!-- study: {name} -->", "<!-- end of study -->"
        block = f"{begin}\n\n{section}\n{end}"
        before, *after = text.split(begin)
        if not after:
            text = f"{text.rstrip()}\n\n{block}\n"
            continue
        old, found, rest = after[0].partition(end)
        if len(after) > 1 or not found or "<!-- study: " in old:
            raise ValueError(f"{path}: below one line {begin} there must be one line {end}, before any other study")
        text = f"{before}{block}{rest}"
    # What is written by hand must not be lost where this process is killed.
    write_whole({path: text})


def _how(study: Study) -> str:
    """How the trainings were made that the tables are about."""
    text = (
        f"Evaluated on {study.dataset}; seeds {', '.join(map(str, study.seeds))}. One seed gives every setting the "
        "same batches, augmentation and random draws, and the same number of iterations. AP in percent; ± is the "
        "standard deviation over the seeds; a gain is the mean difference in AP to another setting with the same seed, "
        "in brackets Student's 95 % interval of it."
    )
    if study.tuning.seeds:
        text += (
            " The factors of the weights were chosen among "
            f"{', '.join(f'{scale:g}' for scale in study.tuning.scales)} by the AP with the seeds "
            f"{', '.join(map(str, study.tuning.seeds))}, which are not reported."
        )
    return text


def _networks(study: Study, detector: str, teacher: Job) -> str:
    """A table of the two networks."""
    pair = study.detectors[detector]
    student = study.student_config(detector, next(iter(study.settings)))
    rows = []
    for name, cfg, ap in (
        ("teacher", teacher.config, f"{teacher.metrics()[HEADLINE]:.1f}"),
        ("student", detector_config(student), "below"),
    ):
        rows.append(
            {
                "": name,
                "ResNet": _resnet(cfg.MODEL),
                "FPN channels": str(cfg.MODEL.FPN.OUT_CHANNELS),
                "heads": _heads(cfg),
                "parameters (M)": f"{parameter_count(build_student(cfg))[''] / 1e6:.2f}",
                "batch": str(cfg.SOLVER.IMS_PER_BATCH),
                "iterations": str(cfg.SOLVER.MAX_ITER),
                "AP": ap,
            }
        )
    table = markdown({column: [row[column] for row in rows] for column in rows[0]}, left=1)
    return f"Config of the student: `{pair.config}`, of the teacher: `{pair.teacher.config}`.\n\n{table}"


def _resnet(model: CfgNode) -> str:
    resnets = model.RESNETS
    text = str(resnets.DEPTH)
    if resnets.DEPTH >= 50:
        text += f", width {resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP}"
    return f"{text}, res2 {resnets.RES2_OUT_CHANNELS}"


def _heads(cfg: CfgNode) -> str:
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        return f"{counted(cfg.MODEL.RETINANET.NUM_CONVS, 'convolution')} of the FPN's channels"
    head = cfg.MODEL.ROI_BOX_HEAD
    proposals = counted(cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, "proposal")
    return f"{counted(head.NUM_FC, 'layer')} of {head.FC_DIM}, {proposals}"


def _table(study: Study, rows: dict[str, Row]) -> str:
    """The settings of a detector of which there is a training, and what the others are."""
    first = next(iter(rows))
    present = [m for m in METRICS if any(row.values(m) for row in rows.values())]
    header = ["", "weights x", *(METRICS[m] for m in present), "AP of each seed", f"gain over {first}"]
    header += ["gain over another", "s / iteration"]
    cuda = any(row.cuda for row in rows.values())
    header.append("GPU memory, MB" if cuda else "process, MB")
    lines = []
    for name, row in rows.items():
        if not row.metrics:
            continue
        setting = study.settings[name]
        values, other = row.values(HEADLINE), setting.baseline
        seeds = ", ".join(f"{values[seed]:.1f}" if seed in values else NONE for seed in study.seeds)
        scaled = setting.tune or setting.scale_of or setting.scale != 1
        line = [name, f"{row.scale:g}" if scaled else NONE]
        line += [_mean_and_deviation(list(row.values(m).values())) for m in present]
        gains = [paired_gain(values, rows[n].values(HEADLINE)) if n and n != name else None for n in (first, other)]
        line += [seeds, NONE if gains[0] is None else str(gains[0])]
        line += [NONE if gains[1] is None else f"{other}: {gains[1]}"]
        line += [NONE if row.seconds is None else f"{row.seconds:.2f}"]
        line += [NONE if row.megabytes is None else f"{row.megabytes:.0f}"]
        lines.append(line)
    parts = [markdown(dict(zip(header, zip(*lines))), left=1)] if lines else []
    at_once = sorted(frozenset().union(*(row.at_once for row in rows.values())))
    if at_once:
        parts.append(f"Trainings at a time, which slow each other down: {', '.join(map(str, at_once))}.")
    absent = [name for name, row in rows.items() if not row.metrics]
    if absent:
        parts.append(f"Not trained yet: {', '.join(absent)}.")
    return "\n\n".join(parts)


def _tuning_table(study: Study, detector: str) -> str:
    """AP of every tuned setting at every scale, on the tuning seeds."""
    tuned = [
        name
        for name in study.settings_of(detector)
        if any(job.finished() for jobs in study.tuning_jobs(detector, name).values() for job in jobs)
    ]
    if not tuned:
        return ""
    columns = {"weights chosen by AP": tuned}
    for scale in study.tuning.scales:
        jobs = [study.tuning_jobs(detector, name)[scale] for name in tuned]
        columns[f"x {scale:g}"] = [
            f"{statistics.fmean(job.metrics()[HEADLINE] for job in some):.1f}"
            if all(job.finished() for job in some)
            else NONE
            for some in jobs
        ]
    return markdown(columns, left=1)


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return NONE
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def _slug(text: str) -> str:
    return re.sub(r"\W+", "_", text.lower()).strip("_")
