"""Files that appear whole or not at all, and folders that can't be written to."""

import os
import subprocess
from pathlib import Path

import pytest

from gkd_d2.utils.files import check_file_writable, check_writable, naming, write_whole


def test_text_is_written_whole_or_not_at_all(tmp_path):
    kept, new = tmp_path / "kept.txt", tmp_path / "a" / "b" / "new.txt"
    kept.write_text("before")
    # The last of them can't take its name.
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        write_whole({new: "new", kept: "after", tmp_path / "folder": "none"})
    assert kept.read_text() == "before" and not (tmp_path / "a").exists()
    write_whole({new: "new", kept: "after"})
    assert (kept.read_text(), new.read_text()) == ("after", "new")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["kept.txt", "new.txt"]


def read_only(tmp_path) -> Path:
    """A folder in which nobody can write, root included."""
    folder = tmp_path / "read_only"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    return folder


def test_a_folder_that_can_be_written_to_stays_as_it_is(tmp_path):
    check_writable(tmp_path, "--output")
    check_writable(tmp_path / "a" / "b", "--output")
    check_file_writable(tmp_path / "a.json", "--json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("file", "file is a file"),
        ("file/below", "file is a file"),
        ("link", "link is a link that leads to nothing"),
        ("link/below", "link is a link that leads to nothing"),
        ("/proc/below", "no file can be written to /proc (No such file or directory)"),
    ],
)
def test_a_folder_that_can_not_be_written_to(folder, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    with pytest.raises(OSError) as error:
        check_writable(folder, "--output")
    assert str(error.value) == f"--output is {folder!r}, but {reason}: name a folder that can be written to"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_read_only_file_system(tmp_path):
    folder = read_only(tmp_path)
    try:
        with pytest.raises(OSError, match=r"no file can be written to .*read_only \(Read-only file system\)"):
            check_writable(folder / "below", "--output")
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_file_that_can_not_be_written(tmp_path):
    with pytest.raises(OSError, match="--json .* can't be written: it is a folder"):
        check_file_writable(tmp_path, "--json")
    with pytest.raises(OSError, match="--json .* can't be written: there is no folder .*none"):
        check_file_writable(tmp_path / "none" / "a.json", "--json")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_fills_up_is_named_with_what_was_written(tmp_path):
    """The system names no file where it is a write that fails."""
    full = tmp_path / "report.md"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{full}'"), naming(full):
        full.write_text("text")
    # Its own error, and those of others that are no fault of the system's, stay as they are.
    for error in (FileNotFoundError(2, "No such file or directory", "other"), OSError("said already")):
        with pytest.raises(OSError) as raised, naming(full):
            raise error
        assert raised.value is error
    temporary = tmp_path / f"whole.txt.{os.getpid()}.tmp"
    temporary.symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/whole.txt'"):
        write_whole({tmp_path / "whole.txt": "text"})
