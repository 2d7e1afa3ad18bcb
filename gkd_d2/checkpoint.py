"""Detectron2's checkpointer, where a checkpoint that does not fit is an error and a half-written one does no harm."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import IO

import torch
from detectron2.checkpoint import DetectionCheckpointer


class DamagedCheckpointError(RuntimeError):
    """A checkpoint can't be read, as when its writing was cut off."""


class StudentCheckpointer(DetectionCheckpointer):
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
                if not os.path.isfile(candidate):
                    raise DamagedCheckpointError(f"last_checkpoint names {candidate}, which is no file")
                return self.load(candidate)
            except DamagedCheckpointError as error:
                self.logger.warning("%s. Falling back to the checkpoint before it", error)
        raise DamagedCheckpointError(
            f"no checkpoint in {self.save_dir} can be read: start anew without --resume, in another OUTPUT_DIR"
        )

    def load(self, path: str, *args, **kwargs) -> dict:
        self.source = path
        try:
            return super().load(path, *args, **kwargs)
        finally:
            # Detectron2's HEAD keeps it where a loading fails, and then refuses the next one.
            self._parsed_url_during_load = None

    def _periodic_checkpoints(self, before: str) -> list[str]:
        """The checkpoints that are named after their iteration, latest first.

        Those with a later iteration than ``before`` are of another run, which OUTPUT_DIR held earlier.
        """
        found = {path: _iteration(path) for path in self.get_all_checkpoint_files()}
        end = _iteration(before)
        earlier = [path for path, number in found.items() if number is not None and (end is None or number < end)]
        return sorted(earlier, key=found.get, reverse=True)

    def _load_file(self, filename: str) -> dict:
        try:
            return super()._load_file(filename)
        except OSError:
            # The file system's fault, which may pass; the file may be whole.
            raise
        except Exception as error:  # zip, pickle and torch each have their own for a file that ends too early
            reason = str(error) or type(error).__name__
            raise DamagedCheckpointError(f"the checkpoint {filename} is damaged: {reason}") from error

    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        names = _decisive(self.model.state_dict())
        self.unset = tuple(sorted(_decisive(incompatible.missing_keys)))
        if names <= set(incompatible.missing_keys):
            raise ValueError(
                f"the checkpoint sets none of the model's {len(names)} tensors: the model has {_some(names)}, the "
                f"checkpoint {_some(incompatible.unexpected_keys)}. MODEL.WEIGHTS must name a checkpoint of this "
                "detector or of its backbone"
            )
        return incompatible


class CompleteCheckpointer(DetectionCheckpointer):
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


def _decisive(names: Iterable[str]) -> set[str]:
    """``names`` without BatchNorm's counters: old checkpoints lack them, and torch then sets them by itself."""
    return {name for name in names if not name.endswith("num_batches_tracked")}


def _some(names: Iterable[str]) -> str:
    """The first few of ``names`` for a message."""
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "nothing"


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
