"""A student's classes among those of a teacher that detects more or others: a map by their names."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from gkd_d2.data.classes import known_class_names
from gkd_d2.utils.text import counted, did_you_mean, listed

_logger = logging.getLogger(__name__)


def student_class_names(train_sets: Sequence[str]) -> list[str]:
    """The names of a student's classes, which are those of its training sets.

    Args:
        train_sets: names of the datasets.

    Raises:
        ValueError: none of them has known names, or two of them differ in theirs.
    """
    known = {dataset: names for dataset in train_sets if (names := known_class_names(dataset))}
    if not known:
        raise ValueError(
            "GKD.TEACHER.CLASSES is set, but the names of the student's classes are not known: DATASETS.TRAIN is "
            f"{listed(train_sets) or 'empty'}. Register a training set with the names of its classes, as thing_classes "
            "in its metadata, and see that its files can be read"
        )
    first, names = next(iter(known.items()))
    for dataset in known:
        check_names_of_datasets(f"the student's training set {first}", names, [dataset], "give both the same classes")
    return names


def map_classes(names: Sequence[str], teacher_names: Sequence[str]) -> list[int | None]:
    """The teacher's number of each of the student's classes, by their names, in any case.

    Args:
        names: of the student's classes, in its order.
        teacher_names: GKD.TEACHER.CLASSES, in the teacher's order.

    Returns:
        A number for each class of the student; None where the teacher has no such class.

    Raises:
        ValueError: a name is no text, or there twice; or the teacher has none of the student's classes.
    """
    for source, given in (("GKD.TEACHER.CLASSES", teacher_names), ("the student's classes", names)):
        others = [name for name in given if not isinstance(name, str)]
        if others:
            raise ValueError(f"{source}: {others[0]!r} is no text: write it in quotation marks")
        folded = [name.casefold() for name in given]
        twice = [name for name, key in zip(given, folded) if folded.count(key) > 1]
        if twice:
            raise ValueError(f"{source}: {listed(twice)}: a name may stand there once only, in whatever case")
    numbers = {name.casefold(): number for number, name in enumerate(teacher_names)}
    found = [numbers.get(name.casefold()) for name in names]
    if all(number is None for number in found):
        raise ValueError(
            f"GKD.TEACHER.CLASSES names none of the student's classes, {_with_nearest(names, teacher_names)}. It "
            f"names {listed(teacher_names, 20)}: write the student's names there for the classes that are the same, or "
            "choose another teacher"
        )
    return found


def check_number_of_classes(teacher_names: Sequence[str], number: int, setting: str = "") -> None:
    """Refuse names that are not those of all of a teacher's classes.

    Args:
        teacher_names: GKD.TEACHER.CLASSES.
        number: of the teacher's classes.
        setting: that holds the number; empty: the built teacher has it.

    Raises:
        ValueError: there are more or fewer names.
    """
    if len(teacher_names) != number:
        has = f"{setting} is {number}" if setting else f"the teacher detects {number}"
        raise ValueError(
            f"GKD.TEACHER.CLASSES has {counted(len(teacher_names), 'name')}, but {has}: name all of the teacher's "
            "classes, in the order of its training"
        )


def check_names_of_datasets(source: str, names: Sequence[str], datasets: Sequence[str], remedy: str) -> None:
    """Refuse names that datasets contradict, as far as the names of their classes are known.

    Args:
        source: of the names, as the beginning of a sentence.
        names: of classes, in order.
        datasets: that should have these classes.
        remedy: what to do.

    Raises:
        ValueError: a dataset has other classes, or another order of them.
    """
    for dataset in datasets:
        theirs = known_class_names(dataset)
        if not theirs or [name.casefold() for name in theirs] == [name.casefold() for name in names]:
            continue
        if len(theirs) != len(names):
            difference = f"has {counted(len(names), 'class', 'classes')}, dataset {dataset} has {len(theirs)}"
        else:
            place = next(i for i, pair in enumerate(zip(names, theirs)) if pair[0].casefold() != pair[1].casefold())
            difference = f"has {names[place]} as class {place}, counted from 0, dataset {dataset} has {theirs[place]}"
        raise ValueError(f"{source} {difference}: {remedy}")


def check_teachers_datasets(teacher_names: Sequence[str], teacher_sets: Sequence[str]) -> None:
    """Refuse names that are not those that a teacher was trained on.

    Args:
        teacher_names: GKD.TEACHER.CLASSES.
        teacher_sets: the teacher's own training sets.

    Raises:
        ValueError: as :func:`check_names_of_datasets`.
    """
    check_names_of_datasets(
        "GKD.TEACHER.CLASSES",
        teacher_names,
        teacher_sets,
        "the teacher's config says that it was trained on that dataset, so give its classes in its order. Where a "
        "class of the same objects has another name here, or the teacher was trained on another dataset, let the "
        "teacher's config name no training set",
    )


def warn_of_unknown_classes(names: Sequence[str], teacher_names: Sequence[str], found: Sequence[int | None]) -> None:
    """Warn of the student's classes that its teacher does not know.

    Args:
        names: of the student's classes.
        teacher_names: GKD.TEACHER.CLASSES.
        found: by :func:`map_classes`.
    """
    unknown = [name for name, number in zip(names, found) if number is None]
    if unknown:
        # No name is misspelt for one that another class has.
        free = [name for number, name in enumerate(teacher_names) if number not in found]
        _logger.warning(
            "GKD.TEACHER.CLASSES does not name these of the student's classes: %s. The teacher's own losses leave out "
            "their objects and take them for background, so its gradients do not show them. Its features are imitated "
            "there as elsewhere, and the student's own losses are as without a teacher",
            _with_nearest(unknown, free),
        )


def are_the_same(found: Sequence[int | None] | None, teacher_number: int) -> bool:
    """Whether the student's classes are all of the teacher's, in its order.

    Args:
        found: by :func:`map_classes`; None: there is no map, and the classes must be the same.
        teacher_number: of the teacher's classes.
    """
    return found is None or list(found) == list(range(teacher_number))


def _with_nearest(names: Sequence[str], known: Sequence[str]) -> str:
    """Names, each with that among ``known`` that it may be misspelt for."""
    near = ((name, did_you_mean(name, known).removeprefix(": ")) for name in names)
    return listed((f"{name} ({question})" if question else name for name, question in near), 20)
