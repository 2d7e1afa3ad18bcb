"""How Detectron2 comes into an environment."""

import importlib.util
import os
import subprocess
import sys
import venv
import zipfile

import pytest


@pytest.fixture(scope="module")
def tool(project):
    """tools/install_detectron2.py as a module."""
    spec = importlib.util.spec_from_file_location("install_detectron2", project / "tools" / "install_detectron2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sources(tool, tmp_path):
    """A folder that holds every text to edit once, as v0.5 does."""
    for name, old, _ in tool.EDITS:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"# before\n{old}\n# after\n")
    return tmp_path


def test_eight_edits_in_seven_files(tool, sources):
    tool.apply_edits(sources)
    assert len(tool.EDITS) == 8
    assert len({name for name, _, _ in tool.EDITS}) == 7
    for name, _, new in tool.EDITS:
        text = (sources / name).read_text()
        assert new in text
        assert "# before" in text
        assert "# after" in text
        assert "pkg_resources" not in text
    assert "Image.LINEAR" not in (sources / "data/transforms/transform.py").read_text()


@pytest.mark.parametrize("index", range(8))
@pytest.mark.parametrize("times", [0, 2])
def test_an_edit_that_does_not_match_once_is_an_error(tool, sources, index, times):
    name, old, _ = tool.EDITS[index]
    path = sources / name
    path.write_text(path.read_text().replace(old, "" if times == 0 else f"{old}\n{old}"))
    with pytest.raises(tool.InstallError, match=f"{name}: expected .* exactly once, found it {times} times"):
        tool.apply_edits(sources)


def test_what_can_be_imported_is_kept(project):
    environment = {key: value for key, value in os.environ.items() if key != "DETECTRON2"}
    done = subprocess.run(
        [sys.executable, str(project / "tools" / "install_detectron2.py")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "can be imported from" in done.stdout
    assert "nothing to do" in done.stdout


def test_what_detectron2_names_comes_first(project, tmp_path):
    wheel = tmp_path / "detectron2-9.9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for package in ("detectron2", "detectron2/modeling", "detectron2/engine", "detectron2/evaluation"):
            archive.writestr(f"{package}/__init__.py", "__version__ = '9.9'\n")
        info = "detectron2-9.9.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: detectron2\nVersion: 9.9\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    command = [str(python), str(project / "tools" / "install_detectron2.py")]
    done = subprocess.run(command, env=os.environ | {"DETECTRON2": str(wheel)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"installing '{wheel}', because DETECTRON2 asks for it" in done.stdout
    assert "Detectron2 9.9 is ready" in done.stdout
    done = subprocess.run(
        command, env=os.environ | {"DETECTRON2": str(tmp_path / "no.whl")}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "this command failed" in done.stderr


@pytest.mark.parametrize("found", [None, ModuleNotFoundError("setuptools")])
def test_what_builds_wheels_is_fetched_where_it_is_missing(tool, found, tmp_path, monkeypatch):
    """As in a new environment, which has an early setuptools without wheel, or no setuptools."""
    commands = []
    monkeypatch.setattr(tool, "run", lambda *command: commands.append(command))
    monkeypatch.setenv("PYTHONPATH", "mine")
    tool.ensure_wheels_can_be_built(tmp_path)
    assert not commands and os.environ["PYTHONPATH"] == "mine"

    def find_spec(name):
        if found:
            raise found

    monkeypatch.setattr(tool.importlib.util, "find_spec", find_spec)
    tool.ensure_wheels_can_be_built(tmp_path)
    assert commands[0][-4:] == ("--target", tmp_path, "setuptools", "wheel")
    assert os.environ["PYTHONPATH"] == f"{tmp_path}{os.pathsep}mine"


def test_another_archive_is_refused(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "pip_that_fetches", lambda folder: [sys.executable])
    monkeypatch.setattr(tool, "run", lambda *command: (tmp_path / "detectron2_cdo-0.5.tar.gz").write_bytes(b"other"))
    with pytest.raises(tool.InstallError, match="has sha256 .* expected 53c9e79e"):
        tool.fetch(tmp_path)


def test_importing_without_detectron2_says_how_to_get_it():
    code = "import sys; sys.modules['detectron2'] = None; import gkd_d2"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: gkd_d2 needs Detectron2, which is not installed here: run tools/")
