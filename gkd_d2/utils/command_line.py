"""Command lines that end with KEY VALUE pairs, and checks of what options give."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from gkd_d2.utils.config_merge import check_no_options
from gkd_d2.utils.files import check_file_writable


class _Parsed(argparse.Namespace):
    """Checks ``opts`` as soon as argparse has found them, which is before it looks for options that are required."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "opts" and value:
            check_no_options(value)
        super().__setattr__(name, value)


def parse_options_first(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line that ends with KEY VALUE pairs.

    argparse takes all that follows the first pair for pairs, and reports an option among them as missing.

    Args:
        parser: its last argument is ``opts``, with ``nargs=argparse.REMAINDER``.
        arguments: default: those of this process.

    Raises:
        SystemExit: an option comes after a pair, with a sentence and status 1; or as of ``parser.parse_args``.
    """
    try:
        parsed = parser.parse_args(arguments, _Parsed())
    except ValueError as error:
        sys.exit(str(error))
    return argparse.Namespace(**vars(parsed))


def check_at_least(parser: argparse.ArgumentParser, parsed: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Check that the numbers which options give are not too small.

    Args:
        parser: of the command line.
        parsed: what it gave.
        least: name of an option, as that of its attribute -> the least number it may have.

    Raises:
        SystemExit: one is smaller, with argparse's status 2.
    """
    for name, number in least.items():
        if getattr(parsed, name) < number:
            parser.error(f"--{name.replace('_', '-')} is {getattr(parsed, name)}, but must be at least {number}")


def check_config_file(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    """Check that the file of --config-file is there.

    Raises:
        SystemExit: it is not, with argparse's status 2.
    """
    if not Path(parsed.config_file).is_file():
        parser.error(f"--config-file {parsed.config_file} is no file")


def check_device(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    """Check that ``--device`` is there.

    Raises:
        SystemExit: it is "cuda", and torch finds no GPU; with argparse's status 2.
    """
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and there is none")


def check_written_files(parser: argparse.ArgumentParser, parsed: argparse.Namespace, names: Sequence[str]) -> None:
    """Check that the files which options name can be written.

    Args:
        parser: of the command line.
        parsed: what it gave.
        names: of the options, without dashes; one that was not given is passed over.

    Raises:
        SystemExit: one can't be written, with argparse's status 2.
    """
    for name in names:
        if path := getattr(parsed, name):
            try:
                check_file_writable(path, f"--{name}")
            except OSError as error:
                parser.error(str(error))
