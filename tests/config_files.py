"""Config files of a test's own, and what they are read as."""

from __future__ import annotations

from pathlib import Path

from detectron2.config import CfgNode

from gkd_d2.config import read_config


def read(path: str | Path, *opts: str) -> CfgNode:
    """The config of a file with KEY VALUE pairs."""
    return read_config(str(path), list(opts))


def write(path: Path, text: str) -> Path:
    """Write a file, its folder too; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
