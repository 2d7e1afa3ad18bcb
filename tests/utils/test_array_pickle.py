"""Pickles of arrays are read; what could run code is refused."""

import io
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hostile import hostile_pickles

from gkd_d2.utils.array_pickle import RefusedObjectError, load_arrays

NAMES = {
    "protocol": "(builtins|__builtin__|io|_io).open",
    "storage": "torch.storage._load_from_bytes",
    "dotted name": "numpy.ndarray.__class__.__base__",
    "dotted call": "pickle.codecs.builtins.open",
    "class": "argparse.Namespace",
    "pointers": "numpy.dtype of 'O8'",
}


def load(content):
    return load_arrays(io.BytesIO(content))


@pytest.mark.parametrize("kind", hostile_pickles("mark"))
def test_what_could_run_is_refused_by_its_name(kind, tmp_path):
    mark = tmp_path / "made"
    content = hostile_pickles(mark)[kind]
    with pytest.raises(RefusedObjectError, match=NAMES.get(kind) or NAMES["protocol"]):
        load(content)
    assert not mark.exists()
    if kind.startswith(("protocol", "deep", "key", "dotted call", "storage")):
        # Python's own reader runs it.
        pickle.loads(content)
        assert mark.exists()


def arrays():
    """Of the types and orders that checkpoints hold."""
    kinds = ("f4", "f8", "f2", "i8", "u1", "i4", "?", "c8", ">f4", "S3", "U3")
    found = {kind: np.arange(6).reshape(2, 3).astype(kind) for kind in kinds}
    found |= {"F": np.asfortranarray(found["f4"]), "T": found["f4"].T, "part": found["f4"][:, ::2]}
    found |= {"turned": np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)}
    return found | {"none": np.zeros((0, 3), "f4"), "scalar array": np.array(3.0)}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("package", ["numpy.core", "numpy._core"])
def test_arrays_and_plain_data_are_read_as_pickle_reads_them(package, protocol):
    plain = {
        "text": "a",
        "bytes": b"a\xff",
        "no bytes": b"",
        "none": None,
        "numbers": [1, 2.5, 1 << 70, 1j],
        3: (True, {1}, frozenset("a")),
    }
    data = OrderedDict(arrays=arrays(), plain=plain, numbers=[np.float32(1.5), np.int64(3), np.bool_(True)])
    data.attribute = "as the _metadata of torch's state_dict"
    content = pickle.dumps(data, protocol=protocol)
    for written in (b"numpy.core", b"numpy._core"):
        # Names of protocol 4 and later have their lengths in front.
        if protocol < 4:
            content = content.replace(written, package.encode())
    loaded, expected = load(content), pickle.loads(content)
    assert loaded["plain"] == plain and loaded["numbers"] == data["numbers"]
    assert [type(number) for number in loaded["numbers"]] == [np.float32, np.int64, np.bool_]
    assert loaded["arrays"].keys() == data["arrays"].keys()
    for name, array in expected["arrays"].items():
        found = loaded["arrays"][name]
        assert found.dtype == array.dtype and found.shape == array.shape and (found == array).all(), name
        assert isinstance(found, np.ndarray) and found.flags.writeable
    assert torch.equal(torch.from_numpy(loaded["arrays"]["f4"]), torch.arange(6.0).reshape(2, 3))


def test_pickles_of_python_2():
    """Whose bytes and names are text in Python 3, as in files of Caffe2."""
    content = (
        b"\x80\x02}U\x05blobs}U\x01w"
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\n"
        b"U\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08"
        + np.array([1.5, -3], "<f4").tobytes()
        + b"tbss."
    )
    assert load(content)["blobs"]["w"].tolist() == [1.5, -3]
    assert pickle.loads(content, encoding="latin1")["blobs"]["w"].tolist() == [1.5, -3]


class Stated:
    """Pickled as a call and a state of what it returns."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def test_no_pickle_changes_the_types_of_numpy():
    """As pickle lets it do: the type of all arrays of the process is one object."""
    kinds = [np.dtype(kind) for kind in ("f4", "i8", "?", "S1", "U1", "O")]

    def described():
        return [(kind.flags, kind.itemsize, kind.alignment, kind.byteorder, kind.names) for kind in kinds]

    before = described()
    whole = (3, "<", None, None, None, -1, -1, 0)
    values = (None, -1, 0, 63, 1000, ">", "x", ("a", "b"), {"a": (np.dtype("i8"), 0)}, (np.dtype("i8"), (2,)))
    states = [(*whole[:i], value, *whole[i + 1 :]) for i in range(8) for value in values]
    for state in [*states, whole[:2], (), None, 3, {"dtype": 1}, (None, {"dtype": np.float64(1), "x": 1})]:
        kind = Stated(np.dtype, ("f4", False, False), state)
        array = Stated(np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, (2,), kind, False, b"ABCDEFGH"))
        try:
            found = load(pickle.dumps(array))
        except (AttributeError, TypeError, ValueError):
            continue
        assert found.dtype == np.float32 and found.nbytes == 8
    assert described() == before


def test_bytes_of_another_length_are_refused():
    content = pickle.dumps(np.arange(4, dtype="f4"), protocol=2)
    for changed in (content.replace(b"K\x04\x85", b"K\x05\x85"), content.replace(b"K\x04\x85", b"K\x03\x85")):
        assert changed != content
        with pytest.raises((pickle.UnpicklingError, ValueError, TypeError)):
            load(changed)


def test_a_number_of_a_part_that_would_take_all_memory():
    content = pickle.dumps({"a": 1.5}, protocol=2)
    (changed,) = {content.replace(b"q\x00", b"r\xff\xff\xff\x0f")} - {content}
    with pytest.raises(pickle.UnpicklingError, match="its part 2 has the number 268435455"):
        load(changed)


def test_a_call_that_would_take_all_memory():
    with pytest.raises(AttributeError):
        load(b"\x80\x02c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.")
    with pytest.raises(RefusedObjectError, match="bytearray"):
        load(b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.")


def test_no_pickle_changes_what_the_next_one_calls():
    """As pickle lets it do with a function: its attributes, and the defaults of its arguments."""
    expected = {"bytes": b"", "array": np.arange(3.0)}
    for name in (b"__builtin__\nbytes", b"numpy.core.numeric\n_frombuffer", b"numpy.core.multiarray\nscalar"):
        for state in (b"N}U\x0c__defaults__)s\x86", b"N}U\x09_functionNs\x86", b"}U\x01aK\x01s"):
            with pytest.raises(pickle.UnpicklingError, match="it would change a function"):
                load(b"\x80\x02c" + name + b"\n" + state + b"b.")
    for protocol in (2, 5):
        found = load(pickle.dumps(expected, protocol=protocol))
        assert found["bytes"] == b"" and (found["array"] == expected["array"]).all()


def test_a_number_in_place_of_an_arrays_bytes():
    """Of which Python makes as many zeros."""
    content = pickle.dumps(np.zeros(127, "u1"), protocol=4)
    values = b"B" + (127).to_bytes(4, "little") + bytes(127)
    changed = content.replace(b"C\x7f" + bytes(127), b"K\x7f").replace(values, b"K\x7f")
    assert len(changed) < len(content)
    # Without the frame's length, which is that of the whole.
    changed = b"\x80\x04" + changed[11:]
    with pytest.raises(TypeError, match="bytes-like object is required"):
        load(changed)
