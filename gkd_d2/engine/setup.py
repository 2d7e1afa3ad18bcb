"""The start of a run in each of its processes: log, config.yaml and seeds."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import sys
from pathlib import Path

from detectron2.engine import default_setup
from detectron2.utils import comm

from gkd_d2.engine.output import OutputError, naming_output
from gkd_d2.engine.run import Run
from gkd_d2.utils.files import write_whole
from gkd_d2.utils.last_checkpoint import has_checkpoint


def set_up_run(run: Run, args: argparse.Namespace) -> None:
    """Detectron2's ``default_setup``; config.yaml is written whole, and a log that can't be written ends the run.

    An evaluation leaves the config.yaml of a training as it is: it holds the seed that a resume needs, and the teacher.
    A training that begins anew sets the metrics.json of an earlier one aside.

    Args:
        run: whose output folder is made if need be.
        args: of Detectron2's default_argument_parser.

    Raises:
        OutputError: OUTPUT_DIR can't be written to; from then on a message that log.txt can't take raises it, too.
    """
    folder = run.output_dir
    rank = comm.get_rank()
    with naming_output(folder):
        os.makedirs(folder, exist_ok=True)
        log = _LogFile(folder, f"log.txt.rank{rank}" if rank else "log.txt")
    # The parent of this package's logger is Detectron2's.
    for name in ("fvcore", "detectron2"):
        logging.getLogger(name).addHandler(log)
    # Without a folder Detectron2 writes no files of its own.
    default_setup(run.without_output(), args)
    if comm.is_main_process():
        path = Path(folder, "config.yaml")
        keeps = args.eval_only and path.is_file()
        place = "" if keeps else f", saved to {path}"
        logging.getLogger(__name__).info("The whole config%s:\n%s", place, run.dump())
        if keeps:
            return
        try:
            write_whole({path: run.dump()})
        except OSError as error:
            raise OutputError.of(str(path), error, folder) from error
        if not args.eval_only and not (args.resume and has_checkpoint(folder)):
            _begin_anew(folder, resume=args.resume)


def _begin_anew(folder: str, *, resume: bool) -> None:
    """Say so where a resume was asked for, and keep what an earlier run measured apart from what this one will."""
    logger = logging.getLogger(__name__)
    if resume:
        logger.info("There is no checkpoint in %s to resume: the training begins anew", folder)
    metrics = Path(folder, "metrics.json")
    if not metrics.is_file():
        return
    numbered = (metrics.with_name(f"metrics.{number}.json") for number in itertools.count(1))
    earlier = next(path for path in numbered if not path.exists())
    with naming_output(folder):
        metrics.rename(earlier)
    logger.info("%s of an earlier run is now %s", metrics, earlier)


class _LogFile(logging.FileHandler):
    """Appends to a log in OUTPUT_DIR, in the form of Detectron2's.

    Args:
        folder: the run's OUTPUT_DIR.
        name: of the file.
    """

    def __init__(self, folder: str, name: str):
        super().__init__(os.path.join(folder, name), encoding="utf-8")
        self.setFormatter(
            logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt="%m/%d %H:%M:%S")
        )
        self._what = os.path.join(folder, name)
        self._folder = folder
        self._failed = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._failed:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._failed = True
        # What is pending would be tried, and complained about, again when the process ends.
        with contextlib.suppress(OSError):
            self.close()
        raise OutputError.of(self._what, error, self._folder) from error
