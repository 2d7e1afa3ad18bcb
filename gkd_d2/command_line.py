"""Command lines that end with KEY VALUE pairs."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from gkd_d2.config_merge import check_no_options

_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+|SEED|OUTPUT_DIR|VIS_PERIOD|CUDNN_BENCHMARK", re.ASCII)


def parse_options_first(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line that ends with KEY VALUE pairs.

    argparse takes all that follows the first pair for pairs, and reports an option among them as missing.

    Args:
        parser: its last argument is ``opts``, with ``nargs=argparse.REMAINDER``.
        arguments: default: those of this process.

    Raises:
        SystemExit: an option comes after a pair, with a sentence and status 1; or as of ``parser.parse_args``.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    first = next((number for number, argument in enumerate(arguments) if _KEY.fullmatch(argument)), len(arguments))
    try:
        check_no_options(arguments[first:])
    except ValueError as error:
        sys.exit(str(error))
    return parser.parse_args(arguments)
