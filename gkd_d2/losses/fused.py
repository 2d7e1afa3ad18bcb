"""The losses of :mod:`gkd_d2.losses.reference` by the compiled extension ``gkd_d2._C``, in few passes over memory.

Two ops do the work: ``gkd_d2::distillation_losses`` returns the four losses and what its backward needs,
``gkd_d2::distillation_losses_backward`` the gradient with respect to the student's features. They run under autograd,
autocast, ``torch.compile(fullgraph=True)`` and, on CUDA, graph capture; no call waits for the device.
"""

from __future__ import annotations

import functools
import importlib
import re

import torch
from torch import Tensor

from gkd_d2.losses.options import LOSS_KEYS, LossOptions, LossWeights
from gkd_d2.losses.reference import accumulation_dtype

# What the Python side expects of the extension; setup.py compiles it in. Raise it when what it registers or the state
# changes.
INTERFACE_VERSION = 4

_REBUILD = "build it with `pip install -e . --no-build-isolation` in the environment that is to use it"


def _load() -> tuple[object | None, str | None]:
    """The extension, or None and the sentence that says why there is none."""
    try:
        extension = importlib.import_module("gkd_d2._C")
    except ModuleNotFoundError:
        return None, f"the extension gkd_d2._C is not built: {_REBUILD}"
    except ImportError as error:
        return None, f"the extension gkd_d2._C does not load, likely built for another torch ({error}): {_REBUILD}"
    built = getattr(extension, "INTERFACE_VERSION", None)
    if built != INTERFACE_VERSION:
        return None, (
            f"the extension gkd_d2._C is stale (interface {built}, but this version needs {INTERFACE_VERSION}): "
            f"{_REBUILD}"
        )
    return extension, None


_extension, _load_error = _load()


def cuda_architectures() -> list[str]:
    """The architectures that the CUDA kernels are built for, such as "8.0" and "9.0+PTX"; empty without them."""
    return _extension.CUDA_ARCHITECTURES.split() if _extension else []


def unavailable_reason(device: torch.device) -> str | None:
    """Why the extension can't compute on ``device``, in one sentence; None where it can.

    Of "cuda" without an index it is the current card; where torch finds none, the kernels' being there is enough.
    """
    if _load_error is not None:
        return _load_error
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"the extension gkd_d2._C has kernels for cpu and cuda, but none for {device.type}"
    if not _extension.CUDA_ARCHITECTURES:
        return (
            "the extension gkd_d2._C is built without CUDA kernels: "
            "with a CUDA toolkit, `FORCE_CUDA=1 pip install -e . --no-build-isolation` builds them"
        )
    return _wrong_card_reason(device.index)


# torch.compile takes the answer as it is, instead of tracing how torch asks the driver.
@torch.compiler.assume_constant_result
def _wrong_card_reason(index: int | None) -> str | None:
    """Why the CUDA kernels don't run on a card; without it the driver would only say "no kernel image"."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(index)
    architectures = cuda_architectures()
    if any(_runs_on(capability, architecture) for architecture in architectures):
        return None
    wanted = "{}.{}".format(*capability)
    return (
        f"the extension gkd_d2._C is built for {', '.join(architectures)}, but {torch.cuda.get_device_name(index)} has "
        f'compute capability {wanted}: `TORCH_CUDA_ARCH_LIST="{wanted}" pip install -e . --no-build-isolation` builds '
        "it for this card"
    )


# Every training step asks.
@functools.cache
def _runs_on(capability: tuple[int, int], architecture: str) -> bool:
    """Whether a card of a compute capability runs code that is built for an architecture, such as "9.0+PTX".

    Machine code runs on later minor versions of its major one, PTX on all later capabilities. Code for "9.0a", either
    way, runs on 9.0 alone, and code for the family "10.0f" on later minor versions of 10.
    """
    match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", architecture)
    if match is None:
        return False
    built, suffix, ptx = (int(match[1]), int(match[2])), match[3], match[4]
    if suffix == "a":
        return capability == built
    return capability >= built and (capability[0] == built[0] or (ptx is not None and suffix == ""))


def distillation_losses(
    student: list[Tensor],
    teacher: list[Tensor],
    student_grad: list[Tensor] | None,
    teacher_grad: list[Tensor] | None,
    boxes: list[Tensor],
    image_size: tuple[int, int],
    *,
    weights: LossWeights,
    options: LossOptions,
) -> dict[str, Tensor]:
    """The weighted losses, summed over levels; as :func:`gkd_d2.losses.reference.distillation_losses`.

    Contiguous and channels_last features are read as they are, others are copied once for forward and backward.
    Gradients that are the same in all cells, such as a mean N,C,1,1, are read at one. Boxes on another device than the
    features are copied there; under CUDA graph capture they must be on it.

    Raises:
        ValueError: an argument is wrong; the op names it and its value.
    """
    student = list(student)
    needs_grad = torch.is_grad_enabled() and any(feature.requires_grad for feature in student)
    losses, _ = torch.ops.gkd_d2.distillation_losses(
        student,
        list(teacher),
        list(student_grad or ()),
        list(teacher_grad or ()),
        torch.cat(boxes).to(student[0].device, non_blocking=True),
        [box.shape[0] for box in boxes],
        list(image_size),
        [weights.gradient, weights.box, weights.attention, weights.image],
        options.temperature,
        options.weighting,
        options.rectifier,
        options.map_region,
        needs_grad,
    )
    return dict(zip(LOSS_KEYS.values(), losses.unbind()))


def _state_size(student: list[Tensor], weights: list[float]) -> int:
    """The number of elements that forward keeps for backward: StateLayout of csrc/math.h."""
    gradient, box, attention, image = (weight != 0 for weight in weights)
    maps = gradient + (box or image) + box + attention
    vectors = gradient + (box or image) + attention
    return sum(s.shape[0] * (maps * s.shape[2] * s.shape[3] + vectors * s.shape[1]) for s in student)


def _fake_losses(student, teacher, student_grad, teacher_grad, boxes, box_counts, image_size, weights, *options):
    save_state = options[-1]
    size = _state_size(student, weights) if save_state else 0
    dtype = accumulation_dtype(student[0])
    return student[0].new_empty(4, dtype=dtype), student[0].new_empty(size, dtype=dtype)


def _fake_backward(loss_gradients, state, student, teacher, weights):
    return [torch.empty_like(s, memory_format=_kernel_format(s)) for s in student]


def _kernel_format(feature: Tensor) -> torch.memory_format:
    """How the kernels read a feature and write its gradient."""
    if not feature.is_contiguous() and feature.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


if _extension is not None:
    torch.library.register_fake("gkd_d2::distillation_losses", _fake_losses)
    torch.library.register_fake("gkd_d2::distillation_losses_backward", _fake_backward)
