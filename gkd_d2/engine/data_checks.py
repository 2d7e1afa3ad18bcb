"""What a run needs of its datasets is looked at before anything is built."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from gkd_d2.data.classes import known_class_names
from gkd_d2.data.contents import DatasetContents, read_contents
from gkd_d2.data.datasets.builtin import check_datasets
from gkd_d2.engine.run import Run, Teacher
from gkd_d2.evaluation.coco_evaluation import check_coco_ground_truth
from gkd_d2.modeling.class_map import check_number_of_classes, check_teachers_datasets, map_classes
from gkd_d2.modeling.pairing import check_class_names
from gkd_d2.utils.text import counted, listed


def dataset_problems(run: Run, *, eval_only: bool, read: bool = True) -> list[str]:
    """What is wrong with the datasets of a run: absent, of other classes than the model, impossible to use.

    Args:
        run: as its config describes it.
        eval_only: whether it only evaluates.
        read: whether to read annotations, for which see :func:`gkd_d2.data.contents.read_contents`. Otherwise only
            whether the files are there is looked at.

    Returns:
        A sentence for each problem.
    """
    used = list(dict.fromkeys([*(() if eval_only else run.train_sets), *run.test_sets]))
    if not run.own_data and not (used and (eval_only or run.train_sets)):
        return [f"DATASETS.{'TEST' if eval_only else 'TRAIN'} is empty: there is no data to use"]
    problems = _absent(used)
    if problems or not read:
        return problems
    found: dict[str, DatasetContents] = {}
    for name in used:
        try:
            found[name] = _contents(run, name)
        except (OSError, ValueError) as error:
            problems.append(f"DATASETS.{'TEST' if name in run.test_sets else 'TRAIN'} names {name}: {error}")
    problems += _absent_images(found)
    different = _other_classes_among(found)
    if eval_only:
        problems += _other_classes(_classes(run), found, "both must be as in the model's training")
    elif different:
        problems += different
    else:
        problems += _other_classes(_classes(run), found)
    return problems or _other_order(run, found)


def _classes(run: Run) -> tuple[str, int] | None:
    """As ``DetectorSpec.classes``; None too where the config names no detector, which is reported as that."""
    try:
        return run.student.classes
    except ValueError:
        return None


def teacher_class_problems(run: Run, teacher: Teacher) -> list[str]:
    """Where a teacher's classes are not those of the student's training sets or of its own, or do not map to them.

    The teacher's own datasets need not be registered or there.

    Args:
        run: of the student.
        teacher: of the run.

    Returns:
        A sentence for each problem.
    """
    ours, own = (
        {name: DatasetContents(names) for name in datasets if (names := known_class_names(name))}
        for datasets in (run.train_sets, teacher.spec.train_sets)
    )
    # It can't have the classes of training sets that differ, which is reported as their own fault.
    if _other_classes_among(ours):
        return []
    problems = []
    if not teacher.classes:
        remedy = (
            "take a teacher that was trained on the student's classes, or name all of the teacher's classes in "
            "GKD.TEACHER.CLASSES"
        )
        problems += _other_classes(teacher.spec.classes, ours, remedy)
        own = {name: contents for name, contents in own.items() if name not in ours}
    remedy = "both must be as in the teacher's training; GKD.TEACHER.OPTS can change either"
    problems += _other_classes(teacher.spec.classes, own, remedy)
    if problems:
        return problems
    try:
        if teacher.classes:
            _check_class_map(run, teacher)
        else:
            check_class_names(run.train_sets, teacher.spec.train_sets)
    except ValueError as error:
        return [str(error)]
    return []


def _check_class_map(run: Run, teacher: Teacher) -> None:
    """Raise a ValueError where the student's classes can't be looked up among the teacher's."""
    map_classes(run.class_names(), teacher.classes)
    if teacher.spec.classes is not None:
        setting, number = teacher.spec.classes
        check_number_of_classes(teacher.classes, number, setting)
    check_teachers_datasets(teacher.classes, teacher.spec.train_sets)


def _absent(names: Iterable[str]) -> list[str]:
    problems = []
    broken: dict[str, list[str]] = {}
    for name in names:
        try:
            check_datasets([name])
        except (KeyError, OSError) as error:
            # Training and test set often lie in one folder, whose absence is said once.
            reason = error.args[0] if isinstance(error, KeyError) else str(error)
            broken.setdefault(reason, []).append(name)
            continue
        # Datasets in COCO's form that Detectron2 or the user registered.
        metadata = MetadataCatalog.get(name)
        for key in ("json_file", "image_root"):
            path = metadata.get(key)
            if path and not PathManager.exists(path):
                problems.append(f"DATASETS names {name}, whose {key} {path} does not exist: put it there")
    return problems + [f"DATASETS names {', '.join(names)}: {reason}" for reason, names in broken.items()]


def _contents(run: Run, name: str) -> DatasetContents:
    """What a dataset holds; raises OSError or ValueError where it can't be used."""
    options = {"masks": run.masks, "keypoints": run.keypoints}
    tested = name in run.test_sets
    if tested and MetadataCatalog.get(name).get("evaluator_type", "coco") == "coco":
        return check_coco_ground_truth(name, **options)
    return read_contents(name, evaluate=tested, **options)


def _absent_images(found: Mapping[str, DatasetContents]) -> Iterator[str]:
    """A sentence for each dataset whose first or last image is absent; to look for all would take long."""
    for name, contents in found.items():
        # What has a scheme is no path of this machine.
        absent = [path for path in contents.images if "://" not in path and not os.path.isfile(path)]
        if absent:
            folder = MetadataCatalog.get(name).get("image_root") or os.path.dirname(absent[0]) or "."
            yield (
                f"DATASETS names {name}, whose image {absent[0]} does not exist: put its images into the folder "
                f"{folder}, or register the dataset with the folder that holds them"
            )


def _other_classes_among(found: Mapping[str, DatasetContents]) -> list[str]:
    """A sentence for each dataset that has not as many classes as the first, which is a training set."""
    named = [name for name, contents in found.items() if contents.class_names is not None]
    if not named:
        return []
    number = len(found[named[0]].class_names)
    return [
        f"dataset {name} has {_described(contents)}, but dataset {named[0]} has {_described(found[named[0]])}: give "
        "both the same classes in the same order, those without objects too"
        for name, contents in found.items()
        if (contents.class_names is not None and len(contents.class_names) != number)
        or _least_number(contents) > number
    ]


def _other_classes(
    classes: tuple[str, int] | None, found: Mapping[str, DatasetContents], remedy: str = ""
) -> Iterator[str]:
    """A sentence for each dataset that has not as many classes as a detector: the setting of them, and their number."""
    if classes is None:
        return
    setting, number = classes
    for name, contents in found.items():
        least = _least_number(contents)
        if contents.class_names is not None and least != number:
            advice = remedy or f"set it to {least}"
        elif least > number:
            advice = remedy or f"set it to at least {least}"
        else:
            continue
        yield f"{setting} is {number}, but dataset {name} has {_described(contents)}: {advice}"


def _least_number(contents: DatasetContents) -> int:
    """Of the classes; their very number where the names are known."""
    if contents.class_names is not None:
        return len(contents.class_names)
    return 0 if contents.largest_category is None else contents.largest_category + 1


def _described(contents: DatasetContents) -> str:
    if contents.class_names is None:
        return f"annotations of category_id {contents.largest_category}, counted from 0"
    return f"{counted(len(contents.class_names), 'class', 'classes')} ({listed(contents.class_names)})"


def _other_order(run: Run, found: Mapping[str, DatasetContents]) -> list[str]:
    """Where one class has different numbers in two datasets, of which the second is evaluated wrongly."""
    problems = []
    for trained, tested in itertools.product(dict.fromkeys(run.train_sets), dict.fromkeys(run.test_sets)):
        # What only was trained on is not read for an evaluation.
        names = (found[d].class_names if d in found else known_class_names(d) for d in (trained, tested))
        ours, theirs = ([name.casefold() for name in known or ()] for known in names)
        moved = [name for name in theirs if name in ours and ours.index(name) != theirs.index(name)]
        if moved:
            problems.append(
                f"class {moved[0]} is number {ours.index(moved[0])} of the training set {trained}, but number "
                f"{theirs.index(moved[0])} of the test set {tested}: give both the same classes in the same order; in "
                "COCO's form the ids of the categories decide the order"
            )
    return problems
