"""Files of weights: what is wrong with one, and what it holds, read so that nothing in it is run."""

from __future__ import annotations

import errno
import re
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import PurePath

import numpy as np
import torch
from torch import Tensor

from gkd_d2.utils.array_pickle import RefusedObjectError, load_arrays
from gkd_d2.utils.finite import is_finite
from gkd_d2.utils.text import listed, printable

_ZIP = b"PK\x03\x04"
# Among the attributes of a zip's parts.
_FOLDER = 0x10


def find_damage(filename: str) -> str:
    """Why a file can't be a whole checkpoint, as far as its first and last bytes tell.

    Args:
        filename: of a file on this machine.

    Returns:
        What to say after the file's name; empty where nothing is wrong.
    """
    with open(filename, "rb") as file:
        start = file.read(512)
    if not start:
        return "is damaged: it is empty"
    if not start.strip(b"\0"):
        return "is damaged: it begins with zeros alone"
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is not a checkpoint but a Git LFS pointer, which `git lfs pull` replaces by the file itself"
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        return "is not a checkpoint but a web page, as saved where a link leads to a page and not to the file itself"
    # Before 2.6 torch reads these two without its restriction to tensors and plain data.
    if _is_tar(filename):
        return "is a tar archive, as torch wrote before 2017, and is not read: unpack it, or save it by a newer torch"
    return _find_damage_of_zip(filename) if start.startswith(b"PK") else ""


def _is_tar(filename: str) -> bool:
    """Whether torch would read it as one."""
    try:
        tarfile.open(filename, "r:").close()
    except OSError:
        raise
    except Exception:  # beside TarError those of fields that are no numbers or names
        return False
    return True


def _find_damage_of_zip(filename: str) -> str:
    if filename.endswith(".pkl"):
        return "is of the form of a .pth: give it a name that ends so"
    try:
        if not zipfile.is_zipfile(filename):
            return "is damaged: it ends too early"
        with zipfile.ZipFile(filename) as archive:
            names = archive.namelist()
    except OSError as error:
        # A place in the file that can't be one.
        if error.errno != errno.EINVAL:
            raise
        return "is damaged: its directory is wrong"
    except Exception as error:  # zipfile has many kinds for a directory that is wrong
        return f"is damaged: {error}"
    if any(PurePath(name).name == "constants.pkl" for name in names):
        return "is a TorchScript program, and not a checkpoint: name the checkpoint that it was made from"
    return ""


def check_sums(filename: str) -> bool:
    """Compare the parts of a zip, as torch writes it, with the CRC-32 sums that it holds; torch itself does not.

    Args:
        filename: of a file in which :func:`find_damage` finds nothing.

    Returns:
        Whether they could be compared: torch.serialization.set_crc32_options(False) leaves the sums out. Files of other
        forms hold none, and are passed over.

    Raises:
        Exception: a part differs from its sum, or can't be read; of many kinds.
    """
    with open(filename, "rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return True
    with zipfile.ZipFile(filename) as archive:
        parts = archive.infolist()
        for part in parts:
            # Of folders torch reads no bytes, and takes what memory happens to hold.
            if part.external_attr & _FOLDER and not part.is_dir():
                raise zipfile.BadZipFile(f"its part {printable(part.filename)} is marked as a folder")
        # Damage does not reach all sums and set each to 0.
        if parts and not any(part.CRC for part in parts):
            return False
        try:
            wrong = archive.testzip()
        except OSError as error:
            # A place in the file that can't be one.
            if error.errno != errno.EINVAL:
                raise
            raise zipfile.BadZipFile("its directory is wrong") from error
    if wrong is not None:
        raise zipfile.BadZipFile(f"its part {printable(wrong)} does not agree with its CRC-32 sum")
    return True


def read_other_form(filename: str) -> dict | None:
    """Read a form of other projects that Detectron2 knows by its suffix: .pkl or .pyth.

    Args:
        filename: of a file on this machine.

    Returns:
        What Detectron2's checkpointer makes of it; None where the suffix is another.

    Raises:
        Exception: it can't be read; of many kinds.
    """
    if filename.endswith(".pyth"):
        data = torch.load(filename, map_location="cpu", weights_only=True)
        if not (isinstance(data, dict) and "model_state" in data):
            return {"model": data}
        model = {name: v for name, v in data["model_state"].items() if not name.endswith("num_batches_tracked")}
        return {"model": model, "__author__": "pycls", "matching_heuristics": True}
    if not filename.endswith(".pkl"):
        return None
    with open(filename, "rb") as file:
        data = load_arrays(file)
    if not isinstance(data, dict):
        return {"model": data}
    if "model" in data and "__author__" in data:
        return data
    # Caffe2's: detectors have "blobs", backbones don't.
    model = {name: value for name, value in data.get("blobs", data).items() if not name.endswith("_momentum")}
    return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}


def find_wrong_content(loaded: object) -> str:
    """Why what a file held is no checkpoint of use; empty where it is one.

    Args:
        loaded: as torch or :func:`read_other_form` gave it.

    Returns:
        What to say after the file's name.
    """
    model = loaded["model"] if isinstance(loaded, dict) else loaded
    if not _is_state(model):
        held = first_few(map(str, model)) if isinstance(model, dict) else f"a {type(model).__name__}"
        return "is not of Detectron2's form, with the model's tensors by their names under 'model': it holds " + held
    other = [name for name, values in model.items() if not is_plain(values)]
    if other:
        return f"holds what is no dense tensor of numbers, in {first_few(other)}"
    wrong = [name for name, values in model.items() if not is_finite(torch.as_tensor(values))]
    return f"holds numbers that are infinite or NaN, in {first_few(wrong)}" if wrong else ""


def _is_state(model: object) -> bool:
    """Whether it is a dictionary, not empty, of tensors or arrays by their names."""
    return (
        isinstance(model, dict)
        and bool(model)
        and all(isinstance(name, str) for name in model)
        and any(isinstance(values, (Tensor, np.ndarray)) for values in model.values())
    )


def is_plain(values: object) -> bool:
    """Whether it is a tensor that holds its numbers one by one, or an array that can be made one."""
    if isinstance(values, Tensor):
        return values.layout is torch.strided and not values.is_quantized and not values.is_meta
    try:
        torch.from_numpy(values)
    except (TypeError, ValueError):
        return False
    return True


def why_unreadable(error: Exception) -> str:
    """What an error of a reader says of the file, in a few words."""
    text = str(error)
    refused = text if isinstance(error, RefusedObjectError) else _refused_by_torch(text)
    if refused:
        return (
            f"holds objects beside arrays, tensors and plain data ({refused}), which could run any code and are not "
            "read: where you trust it, write its tensors alone into a .pth"
        )
    # torch 2.4 speaks of weights_only here, too.
    if cut := re.search(r"unexpected EOF.*", text):
        return f"is damaged: {cut[0]}"
    if "weights_only" in text or "Weights only" in text:
        return "is not a checkpoint: its content is of another form"
    # A text of a single word or number, as a KeyError's, says nothing by itself.
    reason = text.splitlines()[0] if len(text.split()) > 1 else f"{type(error).__name__} {text}".strip()
    return f"is damaged: {reason}"


def _refused_by_torch(text: str) -> str:
    """The object that torch does not read, by its error's text."""
    match = re.search(r"(?:GLOBAL|class) (\S+) (?:was not an allowed global|whose module)", text)
    return printable(match[1]) if match else ""


def first_few(names: Iterable[str]) -> str:
    """The first few of ``names`` for a message."""
    return listed(map(printable, sorted(names)), 3) or "nothing"
