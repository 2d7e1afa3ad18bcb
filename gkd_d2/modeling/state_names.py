"""A distiller's state_dict in the student's own names, so that each loads the other's checkpoints."""

from __future__ import annotations

from torch import nn

_STUDENT = "student."
# What else trains: it keeps its names, and is no part of the detector.
_BESIDE = ("align", "method")


def name_as_student(distiller: nn.Module) -> None:
    """Save ``student.x`` of a module as ``x``, and load it so.

    Args:
        distiller: whose submodules are ``student``, ``align`` and ``method``.

    Raises:
        ValueError: a tensor of the student has a name of one of the others.
    """
    taken = [name for name in distiller.student.state_dict() if not is_students(name)]
    if taken:
        raise ValueError(
            f"the student {type(distiller.student).__name__} holds {taken[0]}, but in a distiller's checkpoint the "
            f"names {' and '.join(_BESIDE)} stand for what is trained beside the student: rename that module"
        )
    distiller._register_state_dict_hook(_drop_student_prefix)
    distiller._register_load_state_dict_pre_hook(_add_student_prefix)
    distiller.register_load_state_dict_post_hook(_name_missing_as_saved)


def is_students(name: str) -> bool:
    """Whether a tensor of a distiller's checkpoint is the student's, by its name there."""
    return name.partition(".")[0] not in _BESIDE


def _drop_student_prefix(module, state_dict, prefix, local_metadata) -> None:
    """State-dict hook: ``student.x`` is saved as ``x``, the modules' versions included."""
    start = prefix + _STUDENT
    for names in (state_dict, state_dict._metadata):
        for key in [k for k in names if k.startswith(start)]:
            names[prefix + key[len(start) :]] = names.pop(key)


def _add_student_prefix(state_dict, prefix, *args) -> None:
    """Load hook: ``x`` is the student's unless it is an align convolution's or the method's."""
    for key in [k for k in state_dict if k.startswith(prefix)]:
        name = key[len(prefix) :]
        if is_students(name) and not name.startswith(_STUDENT):
            state_dict[prefix + _STUDENT + name] = state_dict.pop(key)


def _name_missing_as_saved(module, incompatible) -> None:
    """Load hook: what is missing or unexpected is reported under the name it has in a checkpoint."""
    for keys in incompatible:
        keys[:] = [key.replace(_STUDENT, "", 1) if key.startswith(_STUDENT) else key for key in keys]
