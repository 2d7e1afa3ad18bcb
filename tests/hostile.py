"""Pickles that would run code where they are read as Python reads them."""

from __future__ import annotations

import argparse
import io
import pickle
import struct
from pathlib import Path

import torch


class Touch:
    """Pickled as a call that makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def _text(value: str) -> bytes:
    return b"\x8c" + struct.pack("<B", len(value)) + value.encode()


def hostile_pickles(mark: Path) -> dict[str, bytes]:
    """Name -> pickle of weights that makes the file ``mark`` where pickle.load reads it, or lets an object in."""
    state = {"weight": Touch(mark)}
    tensors = io.BytesIO()
    torch.save(Touch(mark), tensors)
    found = {f"protocol {p}": pickle.dumps({"model": state, "__author__": "x"}, protocol=p) for p in (0, 2, 4, 5)}
    deep = [({"a": {1: [Touch(mark)]}},)]
    found["deep"] = pickle.dumps({"blobs": {"w": 1.0}, "cfg": deep})
    found["key"] = pickle.dumps({"model": {}, "__author__": (Touch(mark),)})
    call = _text(str(mark)) + _text("w") + b"\x86R."
    # The name's parts are looked up one after the other.
    found["dotted name"] = b"\x80\x04" + _text("numpy") + _text("ndarray.__class__.__base__") + b"\x93."
    found["dotted call"] = b"\x80\x04" + _text("pickle") + _text("codecs.builtins.open") + b"\x93" + call
    found["storage"] = (
        b"\x80\x02ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(tensors.getvalue())) + tensors.getvalue()
    ) + b"\x85R."
    found["class"] = pickle.dumps({"model": {}, "__author__": argparse.Namespace(lr=1)})
    # An array of pointers, which are the file's bytes where NumPy's own type is changed by the file.
    found["pointers"] = (
        b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01\x85cnumpy\ndtype\n"
        b"U\x02O8K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08AAAAAAAAtb."
    )
    return found
