"""Modules of the user's own, which register datasets, detectors and methods when they are imported."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterable


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--import MODULE``, which may be given several times, as ``imports``."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="Python module to import first, as one that registers a dataset, a meta-architecture or a method; added "
        "to GKD.IMPORTS of the config; looked for as by any import statement, PYTHONPATH included, then in the working "
        "folder; may be given several times",
    )


def import_modules(names: Iterable[str], origin: str) -> None:
    """Import modules, in this order.

    They are looked for as by any import statement and then in the working folder, which becomes the last entry of
    ``sys.path``: of it, processes that are started later know too.

    Args:
        names: of modules, as in an import statement.
        origin: the key or option that names them, for errors.

    Raises:
        ValueError: a name is not that of a module, or the module is not found.
        ImportError: the import of a module that was found raises an error, which is its cause.
    """
    for name in names:
        if not isinstance(name, str) or name.endswith(".py") or not all(map(str.isidentifier, name.split("."))):
            raise ValueError(
                f"{origin} names {name!r}, which is not the name of a module: write it as in an import statement, "
                "my_module or my_package.my_module"
            )
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(name)
        except Exception as error:
            # A module that is found may itself import one that is not.
            if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
                raise ValueError(
                    f"{origin} names the module {name}, which is not found ({error}): it is looked for on PYTHONPATH "
                    f"and in the working folder, {os.getcwd()}"
                ) from None
            raise ImportError(
                f"{origin} names the module {name}, whose import fails: {type(error).__name__}: {error}"
            ) from error
