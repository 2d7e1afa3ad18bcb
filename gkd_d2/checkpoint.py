"""Detectron2's checkpointer, where a checkpoint that does not fit is an error and a half-written one does no harm."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Iterable
from typing import IO

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor

from gkd_d2.text import counted, listed


class CheckpointError(ValueError):
    """A checkpoint can't be used; the text says why."""


class DamagedCheckpointError(CheckpointError):
    """A file can't be read as a checkpoint, as when its writing was cut off."""


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
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is not a checkpoint but a Git LFS pointer, which `git lfs pull` replaces by the file itself"
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        return "is not a checkpoint but a web page, as saved where a link leads to a page and not to the file itself"
    if start.startswith(b"PK"):
        try:
            return "" if zipfile.is_zipfile(filename) else "is damaged: it ends too early"
        except zipfile.BadZipFile as error:
            return f"is damaged: {error}"
    return ""


class _CheckpointReader(DetectionCheckpointer):
    """Refuses files that are not whole checkpoints, in any form that Detectron2 reads; each refusal is of one kind."""

    def load_weights(
        self, path: str, key: str = "MODEL.WEIGHTS", detector: str = "the detector that the config describes"
    ) -> dict:
        """Load the model's tensors, and nothing else.

        Args:
            path: a file or URL; empty: nothing is loaded.
            key: of the config, that names it; for errors, where it is not empty.
            detector: the model, for errors.

        Returns:
            What else the checkpoint holds.

        Raises:
            CheckpointError: the file is not a whole checkpoint, or does not fit the model.
        """
        start = f"{key}: " if key else ""
        try:
            return self.load(path, checkpointables=[])
        except DamagedCheckpointError as error:
            # That of a URL is in Detectron2's cache.
            again = f"Remove it to fetch {path} again" if "://" in path else "Copy or fetch it again"
            raise DamagedCheckpointError(f"{start}{error}. {again}, or name another checkpoint") from error
        except CheckpointError as error:
            raise CheckpointError(f"{start}{path} does not fit {detector}: {error}") from error

    def load(self, path: str, *args, **kwargs) -> dict:
        try:
            return super().load(path, *args, **kwargs)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        finally:
            # Detectron2's HEAD keeps it where a loading fails, and then refuses the next one.
            self._parsed_url_during_load = None

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """As Detectron2's.

        Raises:
            CheckpointError: the checkpoint is not whole, or does not fit the model.
        """
        if not (resume and self.has_checkpoint()):
            return self.load_weights(path)
        last = self.get_checkpoint_file()
        advice = "name another checkpoint as MODEL.WEIGHTS, without --resume"
        try:
            return self._load_listed(last)
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"OUTPUT_DIR: {error}. Copy it again, or {advice}") from error
        except CheckpointError as error:
            raise CheckpointError(
                f"OUTPUT_DIR: {last} does not fit the detector that the config describes: {error}; {advice}"
            ) from error

    def _load_listed(self, path: str) -> dict:
        """Load a checkpoint that last_checkpoint names, or one before it."""
        if not os.path.isfile(path):
            raise DamagedCheckpointError(f"last_checkpoint names {path}, which is no file")
        return self.load(path)

    def _load_file(self, filename: str) -> dict:
        damage = find_damage(filename)
        if damage:
            raise DamagedCheckpointError(f"the checkpoint {filename} {damage}")
        try:
            loaded = super()._load_file(filename)
        except OSError:
            # The machine's fault, which may pass; the file may be whole.
            raise
        except Exception as error:  # zip, pickle and torch each have their own for a file that ends too early
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                raise OSError(
                    f"the checkpoint {filename} can't be read: it needs more memory than there is, or is damaged"
                ) from error
            raise DamagedCheckpointError(f"the checkpoint {filename} {_why_unreadable(error)}") from error
        model = loaded["model"] if isinstance(loaded, dict) else loaded
        if not _is_state(model):
            held = _some(map(str, model)) if isinstance(model, dict) else f"a {type(model).__name__}"
            raise DamagedCheckpointError(
                f"the checkpoint {filename} is not of Detectron2's form, with the model's tensors by their names under "
                f"'model': it holds {held}"
            )
        wrong = [name for name, values in model.items() if not _is_finite(values)]
        if wrong:
            raise DamagedCheckpointError(
                f"the checkpoint {filename} holds numbers that are infinite or NaN, in {_some(wrong)}"
            )
        return loaded


class StudentCheckpointer(_CheckpointReader):
    """Refuses a checkpoint that sets nothing of the model; writes whole files or none, and can do without the last.

    Attributes:
        source: path of the checkpoint that is being loaded, or was loaded last.
        unset: names of the model's tensors that it did not set.
    """

    source = ""
    unset: tuple[str, ...] = ()

    def save(self, name: str, *, resumable: bool = True, **kwargs) -> None:
        """Write a checkpoint under a temporary name and rename it: a final name always holds a whole one.

        Args:
            name: of the file, without ".pth".
            resumable: whether a resume shall start from it.
            kwargs: what else to save; plain tensors and numbers.

        Raises:
            OSError: it can't be written, as on a full disk; earlier checkpoints stay as they are.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        states = {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **states, **kwargs}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        try:
            _write_whole(path, lambda file: torch.save(data, file))
        except (OSError, RuntimeError) as error:
            # Where torch can't write it complains about its file, and what the system said comes before.
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            last = self.get_checkpoint_file() if self.has_checkpoint() else "none"
            raise OSError(
                f"the checkpoint {path} can't be written ({reason}); is the disk full? The last whole one: {last}"
            ) from error
        if resumable:
            self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        _write_whole(path, lambda file: file.write(last_filename_basename.encode()))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """As Detectron2's, but where the last checkpoint is damaged or gone the one before it is taken, with a warning.

        Raises:
            DamagedCheckpointError: ``resume`` is set and there are checkpoints, but none can be read.
        """
        if not (resume and self.has_checkpoint()):
            return super().resume_or_load(path, resume=False)
        last = self.get_checkpoint_file()
        for candidate in [last, *self._periodic_checkpoints(before=last)]:
            try:
                return self._load_listed(candidate)
            except DamagedCheckpointError as error:
                self.logger.warning("%s. Falling back to the checkpoint before it", error)
        raise DamagedCheckpointError(
            f"no checkpoint in {self.save_dir} can be read: start anew without --resume, in another OUTPUT_DIR"
        )

    def load(self, path: str, *args, **kwargs) -> dict:
        self.source = path
        return super().load(path, *args, **kwargs)

    def _periodic_checkpoints(self, before: str) -> list[str]:
        """The checkpoints that are named after their iteration, latest first.

        Those with a later iteration than ``before`` are of another run, which OUTPUT_DIR held earlier.
        """
        found = {path: _iteration(path) for path in self.get_all_checkpoint_files()}
        end = _iteration(before)
        earlier = [path for path, number in found.items() if number is not None and (end is None or number < end)]
        return sorted(earlier, key=found.get, reverse=True)

    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        names = _decisive(self.model.state_dict())
        self.unset = tuple(sorted(_decisive(incompatible.missing_keys)))
        if names <= set(incompatible.missing_keys):
            raise ValueError(
                f"the checkpoint sets none of the model's {counted(len(names), 'tensor')}: the model has "
                f"{_some(names)}, the checkpoint {_some(incompatible.unexpected_keys)}. MODEL.WEIGHTS must name a "
                "checkpoint of this detector or of its backbone"
            )
        return incompatible


class CompleteCheckpointer(_CheckpointReader):
    """Refuses a checkpoint that leaves anything of the model unset: for networks that are used as they are."""

    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        unset = sorted(_decisive(incompatible.missing_keys))
        if unset:
            shapes = "".join(
                f"\n  {name}: {tuple(there)} in the checkpoint, {tuple(here)} in the model"
                for name, there, here in incompatible.incorrect_shapes
            )
            raise ValueError(
                f"the checkpoint leaves {len(unset)} of the model's parameters unset: {', '.join(unset)}{shapes}"
            )
        return incompatible


def _is_state(model: object) -> bool:
    """Whether it is a dictionary of tensors, or of arrays that can be made tensors, by their names."""
    if not (isinstance(model, dict) and all(isinstance(name, str) for name in model)):
        return False
    try:
        return all(isinstance(v if torch.is_tensor(v) else torch.from_numpy(v), torch.Tensor) for v in model.values())
    except (TypeError, ValueError):
        return False


def _is_finite(values: Tensor | np.ndarray) -> bool:
    """Whether no value is infinite or NaN; integers never are."""
    return bool(torch.as_tensor(values).isfinite().all())


def _why_unreadable(error: Exception) -> str:
    """What an error of a reader says of the file, in a few words."""
    text = str(error)
    # torch reads tensors and plain data alone, unless it is told that the file is to be trusted.
    if match := re.search(r"Unsupported (?:global|class).*?([\w.]+) was not an allowed global", text, re.DOTALL):
        return (
            f"holds Python objects beside tensors ({match[1]}), which torch does not load: write its tensors into a "
            "checkpoint of their own, by torch.load with weights_only=False if you trust the file"
        )
    if "Weights only load failed" in text:
        return "is not a checkpoint: its content is of another form"
    # A text of a single word or number, as a KeyError's, says nothing by itself.
    reason = text.splitlines()[0] if len(text.split()) > 1 else f"{type(error).__name__} {text}".strip()
    return f"is damaged: {reason}"


def _decisive(names: Iterable[str]) -> set[str]:
    """``names`` without BatchNorm's counters: old checkpoints lack them, and torch then sets them by itself."""
    return {name for name in names if not name.endswith("num_batches_tracked")}


def _some(names: Iterable[str]) -> str:
    """The first few of ``names`` for a message."""
    return listed(sorted(names), 3) or "nothing"


def _iteration(path: str) -> int | None:
    """The number in the name of a periodic checkpoint."""
    match = re.fullmatch(r"model_(\d+)\.pth", os.path.basename(path))
    return int(match[1]) if match else None


def _write_whole(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file, and give it its name when every byte is on the disk."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.remove(partial)
        raise
