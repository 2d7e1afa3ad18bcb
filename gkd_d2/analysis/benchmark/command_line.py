"""What the command lines of all benchmarks have in common."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path


def add_output_options(parser: argparse.ArgumentParser, drawn: str) -> None:
    """Add ``--json FILE`` and ``--plot FILE``.

    Args:
        parser: of the command line.
        drawn: what the plot shows, for the help.
    """
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=f"draw {drawn} there")


def write_results(args: argparse.Namespace, result: dict, tables: str, plot: Callable[[dict, Path], None]) -> None:
    """Print the tables, and write what the options of :func:`add_output_options` ask for.

    Args:
        args: of the command line.
        result: what was measured, in types of JSON.
        tables: to print.
        plot: draws the result into a file.

    Raises:
        OSError: a file can't be written.
    """
    print(tables)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(result, args.plot)
