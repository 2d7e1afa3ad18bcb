"""Detectron2's checkpointer, where a checkpoint that does not fit is an error and a half-written one does no harm."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import detectron2
import torch
from detectron2.checkpoint import Checkpointer, DetectionCheckpointer

from gkd_d2.utils.checkpoint_files import (
    check_sums,
    find_damage,
    find_wrong_content,
    first_few,
    read_other_form,
    why_unreadable,
)
from gkd_d2.utils.files import fill, replacing
from gkd_d2.utils.last_checkpoint import Resumable, find_resumable, has_checkpoint
from gkd_d2.utils.text import counted, listed

# What a checkpoint holds beside "model" where MODEL_EMA.ENABLED was set; the name is d2go's.
EMA_STATE = "ema_state"


def file_of_weights(path: str) -> str:
    """The file or URL of weights, without what Detectron2 after 0.5 reads at its end, ``?matching_heuristics=True``."""
    return path if detectron2.__version__ == "0.5" else path.partition("?matching_heuristics=")[0]


class CheckpointError(ValueError):
    """A checkpoint can't be used; the text says why."""


class DamagedCheckpointError(CheckpointError):
    """A file can't be read as a checkpoint, as when its writing was cut off."""


class NoAverageError(CheckpointError):
    """A checkpoint holds no averaged weights."""


class _PlainReader(Checkpointer):
    """fvcore's, which before torch 2.6 would let torch run what a file asks for."""

    def _load_file(self, f: str) -> dict:
        return torch.load(f, map_location=torch.device("cpu"), weights_only=True)


class _CheckpointReader(DetectionCheckpointer, _PlainReader):
    """Refuses files that are not whole checkpoints, in any form that Detectron2 reads, and runs nothing in them."""

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
        except NoAverageError as error:
            raise NoAverageError(f"{start}{error}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{start}{path} does not fit {detector}: {error}") from error

    def load(self, path: str, *args, **kwargs) -> dict:
        try:
            return super().load(path, *args, **kwargs)
        except CheckpointError:
            raise
        except AssertionError as error:
            # That of fvcore, "Checkpoint ... not found!".
            raise CheckpointError(str(error)) from error
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
        advice = "name another checkpoint as MODEL.WEIGHTS, without --resume"
        try:
            last = self._find_last().last
            return self._load_listed(last)
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"OUTPUT_DIR: {error}. Copy it again, or {advice}") from error
        except CheckpointError as error:
            raise CheckpointError(
                f"OUTPUT_DIR: {last} does not fit the detector that the config describes: {error}; {advice}"
            ) from error

    def has_checkpoint(self) -> bool:
        return has_checkpoint(self.save_dir)

    def get_checkpoint_file(self) -> str:
        return find_resumable(self.save_dir).last

    def _find_last(self) -> Resumable:
        """The checkpoints to resume from, with a warning where last_checkpoint does not tell which.

        Raises:
            DamagedCheckpointError: there are none.
        """
        found = find_resumable(self.save_dir)
        if not found.paths:
            raise DamagedCheckpointError(f"{found.fault}, and {self.save_dir} holds no checkpoint of a run")
        if found.fault:
            self.logger.warning("%s", found.warning)
        return found

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
            if not check_sums(filename):
                self.logger.warning(
                    "The checkpoint %s was written without CRC-32 sums: damage to its numbers can't be found", filename
                )
            loaded = read_other_form(filename) or super()._load_file(filename)
            wrong = find_wrong_content(loaded)
        except OSError:
            # The machine's fault, which may pass; the file may be whole.
            raise
        except Exception as error:  # zip, pickle and torch each have their own for a file that ends too early
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                raise OSError(
                    f"the checkpoint {filename} can't be read: it needs more memory than there is, or is damaged"
                ) from error
            # Not from the error: torch's would advise to run what the file asks for.
            raise DamagedCheckpointError(f"the checkpoint {filename} {why_unreadable(error)}") from None
        if wrong:
            raise DamagedCheckpointError(f"the checkpoint {filename} {wrong}")
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
            if isinstance(error.__context__, (KeyboardInterrupt, SystemExit)):
                # torch, too, complains about a file whose writing was broken off.
                raise error.__context__ from None
            # Where torch can't write it complains about its file, and what the system said comes before.
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            last = self.get_checkpoint_file() or "none"
            raise OSError(
                f"the checkpoint {path} can't be written ({reason}); is the disk full? The last whole one: {last}"
            ) from error
        if resumable:
            self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        if os.path.isdir(path):
            # A file can't take the place of a folder.
            os.rename(path, f"{path}.folder")
        _write_whole(path, lambda file: file.write(last_filename_basename.encode()))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """As Detectron2's, but where the last checkpoint is damaged or gone the one before it is taken, with a warning.

        A warning also says that checkpoints of an earlier run will be overwritten.

        Raises:
            DamagedCheckpointError: ``resume`` is set and there are checkpoints, but none can be read.
        """
        if not resume and self.save_to_disk:
            self._warn_of_overwriting()
        if not (resume and self.has_checkpoint()):
            return super().resume_or_load(path, resume=False)
        advice = "start anew without --resume, in another OUTPUT_DIR"
        try:
            candidates = self._find_last().paths
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"{error}: {advice}") from error
        for candidate in candidates:
            try:
                return self._load_listed(candidate)
            except DamagedCheckpointError as error:
                self.logger.warning("%s. Falling back to the checkpoint before it", error)
        tried = listed(map(os.path.basename, candidates), 3)
        raise DamagedCheckpointError(
            f"of the checkpoints in {self.save_dir} none can be read that a resume may take ({tried}): {advice}"
        )

    def _warn_of_overwriting(self) -> None:
        there = [path for path in find_resumable(self.save_dir).paths if os.path.isfile(path)]
        if there:
            self.logger.warning(
                "%s holds checkpoints of an earlier run, the last of them %s, and this run overwrites them: --resume "
                "continues that run, and another OUTPUT_DIR keeps it",
                self.save_dir,
                there[0],
            )

    def load(self, path: str, *args, **kwargs) -> dict:
        self.source = path
        return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        names = _decisive(self.model.state_dict())
        self.unset = tuple(sorted(_decisive(incompatible.missing_keys)))
        if names <= set(incompatible.missing_keys):
            raise ValueError(
                f"the checkpoint sets none of the model's {counted(len(names), 'tensor')}: the model has "
                f"{first_few(names)}, the checkpoint {first_few(incompatible.unexpected_keys)}. MODEL.WEIGHTS must "
                "name a checkpoint of this detector or of its backbone"
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


class AverageCheckpointer(CompleteCheckpointer):
    """Loads a checkpoint's averaged weights in place of its raw ones.

    Beside what others do, loading raises NoAverageError where it holds none.
    """

    def _load_file(self, filename: str) -> dict:
        loaded = super()._load_file(filename)
        if EMA_STATE not in loaded:
            raise NoAverageError(
                f"{filename} holds no averaged weights: it was trained without MODEL_EMA.ENABLED. Take its raw weights"
            )
        if wrong := find_wrong_content({"model": loaded[EMA_STATE]}):
            raise DamagedCheckpointError(f"the averaged weights of the checkpoint {filename}: it {wrong}")
        return {"model": loaded[EMA_STATE]}


def holds_average(path: str) -> bool:
    """Whether a checkpoint holds averaged weights, as one trained with MODEL_EMA.ENABLED does.

    No tensor is read. What is wrong with a file that is no checkpoint is said where it is loaded.

    Args:
        path: of a file on this machine.
    """
    # In another form no training saves them.
    if not zipfile.is_zipfile(path) or find_damage(path):
        return False
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # zip, pickle and torch each have their own
        return False
    return isinstance(loaded, dict) and EMA_STATE in loaded


def _decisive(names: Iterable[str]) -> set[str]:
    """``names`` without BatchNorm's counters: old checkpoints lack them, and torch then sets them by itself."""
    return {name for name in names if not name.endswith("num_batches_tracked")}


def _write_whole(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file, and give it its name when every byte is on the disk."""
    with replacing(Path(path), "partial") as partial:
        fill(partial, write)
