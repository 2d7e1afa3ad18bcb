"""Files of weights with timm's names."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from gkd_d2.utils.checkpoint import CheckpointError, DamagedCheckpointError
from gkd_d2.utils.checkpoint_files import check_sums, find_damage, find_wrong_content, why_unreadable

# Where timm's own training script and others keep the model in a checkpoint; timm's own order, averages first.
_PLACES = ("state_dict_ema", "model_ema", "state_dict", "model")
# Which DistributedDataParallel puts before each name.
_WRAPPED = "module."


def read_timm_weights(path: str) -> dict[str, Tensor]:
    """Read a file of weights so that nothing in it is run: a ``.safetensors``, or what torch wrote.

    Args:
        path: of a state_dict, or a checkpoint that holds one under a name that timm knows.

    Returns:
        Name -> tensor.

    Raises:
        CheckpointError: it is no such file, or holds infinite or NaN values.
    """
    start = f"MODEL.TIMM.WEIGHTS is {path}"
    if not os.path.isfile(path):
        place = "" if os.path.isabs(path) else f" in the working folder, {os.getcwd()}"
        raise CheckpointError(f"{start}: there is no such file{place}")
    if damage := find_damage(path):
        raise DamagedCheckpointError(f"{start}, which {damage}")
    try:
        check_sums(path)
        loaded = _load(path)
    except OSError:
        raise
    except Exception as error:  # zip, pickle, torch and safetensors each have their own
        raise DamagedCheckpointError(f"{start}, which {why_unreadable(error)}") from None
    state = loaded
    if isinstance(loaded, dict):
        state = next((loaded[place] for place in _PLACES if loaded.get(place) is not None), loaded)
    if wrong := find_wrong_content({"model": state}):
        raise CheckpointError(f"{start}, which {wrong}")
    return {name.removeprefix(_WRAPPED): torch.as_tensor(value) for name, value in state.items()}


def _load(path: str) -> object:
    if path.endswith(".safetensors"):
        # Which timm depends on.
        from safetensors.torch import load_file

        return load_file(path)
    with _reading_namespaces():
        return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def _reading_namespaces() -> Iterator[None]:
    """Where timm's training script keeps its options: attributes alone, of plain data.

    As torch's ``safe_globals``, which came with 2.5.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
