"""Detectron2's writers of metrics.json and TensorBoard, where a file that can't be written is named."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter

from gkd_d2.engine.output import OutputError


def build_writers(folder: str, max_iter: int) -> list[EventWriter]:
    """Detectron2's writers, as its ``default_writers`` builds them.

    Args:
        folder: the run's OUTPUT_DIR. A line that an earlier run left half written in its metrics.json is ended.
        max_iter: the number of iterations.

    Raises:
        OutputError: a file can't be written; the writers raise it, too.
    """
    metrics = os.path.join(folder, "metrics.json")
    return [
        CommonMetricPrinter(max_iter),
        _NamingWriter(lambda: _json_writer(metrics), metrics, folder),
        _NamingWriter(lambda: TensorboardXWriter(folder), f"TensorBoard's file in {folder}", folder),
    ]


class _NamingWriter(EventWriter):
    """A writer whose first failure is an OutputError that names what it writes; from then on it does nothing."""

    def __init__(self, build: Callable[[], EventWriter], what: str, folder: str):
        self._what = what
        self._folder = folder
        self._writer: EventWriter | None = None
        self._writer = self._try(build)

    def write(self) -> None:
        if self._writer is not None:
            self._try(self._writer.write)

    def close(self) -> None:
        if self._writer is not None:
            self._try(self._writer.close)

    def _try(self, action: Callable):
        try:
            return action()
        except OSError as error:
            writer, self._writer = self._writer, None
            # What is pending would be tried, and complained about, again when the process ends.
            if writer is not None:
                with contextlib.suppress(OSError):
                    writer.close()
            raise OutputError.of(self._what, error, self._folder) from error


def _json_writer(path: str) -> JSONWriter:
    if os.path.isfile(path) and os.path.getsize(path):
        with open(path, "ab+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
    return JSONWriter(path)
