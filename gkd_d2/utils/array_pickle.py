"""Pickles of NumPy arrays and plain data, as in Detectron2's model zoo, read so that nothing in a file is run."""

from __future__ import annotations

import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import IO

import numpy as np

from gkd_d2.utils.text import printable


class RefusedObjectError(pickle.UnpicklingError):
    """A pickle holds what is neither an array nor plain data; the text is its name."""


def load_arrays(file: IO[bytes]) -> object:
    """Read one pickle, of Python 2 too, that holds arrays of numbers or text, plain containers, numbers and text.

    Args:
        file: open for reading, and seekable.

    Raises:
        RefusedObjectError: it holds something else, which pickle would import and call.
        Exception: it is damaged or no pickle; of many kinds.
    """
    start = file.tell()
    _check_memo(file)
    file.seek(start)
    return _ArrayUnpickler(file, encoding="latin1").load()


def _check_memo(file: IO[bytes]) -> None:
    """Compare the numbers that a pickle gives its parts with their count: pickle makes a list of the largest's length.

    A damaged number would take all memory.
    """
    for count, (code, argument, _place) in enumerate(pickletools.genops(file)):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise pickle.UnpicklingError(f"its part {count} has the number {argument}")


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        found = _ADMITTED.get((module, name))
        if found is None:
            raise RefusedObjectError(printable(f"{module}.{name}"))
        return found


class _Kind:
    """Stands for a type of numbers or text: NumPy's own takes any state, and with it arrays of forged pointers."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype

    def __setstate__(self, state: tuple) -> None:
        _version, order, *_ = state
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """An array that takes its values from a pickle."""

    def __setstate__(self, state: tuple) -> None:
        *_version, shape, kind, fortran, values = state
        array = _array(values, kind, shape, "F" if fortran else "C")
        super().__setstate__((1, array.shape, array.dtype, bool(fortran), array.base))


def _array(values: bytes | str, kind: _Kind, shape: tuple[int, ...], order: str) -> np.ndarray:
    """The array of these bytes, which NumPy compares with its size; those of Python 2 are read as text."""
    # Of a number bytes() would make so many zeros.
    values = values.encode("latin1") if isinstance(values, str) else bytes(memoryview(values))
    array = np.ndarray(shape, kind.dtype, values, order=order)
    if array.nbytes != len(values):
        raise pickle.UnpicklingError(f"{len(values)} bytes for an array of {array.nbytes}")
    return array


class _Function:
    """Stands for a function that a pickle calls: of the function itself it could change the defaults, for good."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *arguments) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it would change a function")


# What a pickle calls in place of NumPy's and Python's own.
@_Function
def _empty_array(*_) -> _Array:
    return _Array.__new__(_Array, 0, np.int8)


@_Function
def _array_of_buffer(values: bytes, kind: _Kind, shape: tuple[int, ...], order: str, axes=None) -> np.ndarray:
    if order == "K" and axes is not None:
        return _array(values, kind, shape, "C").transpose(axes).copy()
    return _array(values, kind, shape, order).copy()


@_Function
def _scalar(kind: _Kind, value: bytes | str) -> np.generic:
    return _array(value, kind, (), "C")[()]


@_Function
def _kind(name: str, *_) -> _Kind:
    # Booleans, numbers and text with their sizes; the others hold pointers, or parts.
    if not re.fullmatch(r"[biufc]\d{1,2}|[SU]\d{1,9}", name):
        raise RefusedObjectError(f"numpy.dtype of {name[:20]!a}")
    return _Kind(np.dtype(name))


@_Function
def _dictionary(*items) -> OrderedDict:
    return _OrderedDict(*items)


class _OrderedDict(OrderedDict):
    def __setstate__(self, state: object) -> None:
        """Take no attributes, such as the versions that torch adds to a state_dict."""


@_Function
def _bytes(text: str = "", *_) -> bytes:
    """How protocols before 3 write bytes: as text and the name of an encoding, or as nothing."""
    return text.encode("latin1")


_ADMITTED = {
    # The first argument of the functions that make arrays, which do not look at it.
    ("numpy", "ndarray"): "numpy.ndarray",
    ("numpy", "dtype"): _kind,
    ("collections", "OrderedDict"): _dictionary,
    ("_codecs", "encode"): _bytes,
}
# As NumPy 1 and 2 name them.
for _package in ("numpy.core", "numpy._core"):
    _ADMITTED[f"{_package}.multiarray", "_reconstruct"] = _empty_array
    _ADMITTED[f"{_package}.multiarray", "scalar"] = _scalar
    _ADMITTED[f"{_package}.numeric", "_frombuffer"] = _array_of_buffer
# As Python 2 and 3 name them.
for _package in ("__builtin__", "builtins"):
    _ADMITTED[_package, "bytes"] = _bytes
    for _plain in (complex, frozenset, set):
        _ADMITTED[_package, _plain.__name__] = _plain
