"""What the documents say is there: links and paths exist, marked commands run, every tool explains itself.

A fenced block of bash below the line ``<!-- test -->`` is run, after the marked blocks above it in the same document,
in one copy of the tree. Put the mark on what takes seconds.
"""

import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from documents import MARK, fenced_blocks

import gkd_d2

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = sorted((ROOT / "tools").glob("*.py"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What a run leaves in the tree.
LEFTOVERS = (".*", "*.egg-info", "__pycache__")
# The same, in the root alone.
ROOT_LEFTOVERS = ("build", "datasets", "output")

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FOLDERS = "|".join(("configs", "csrc", "docs", "examples", "gkd_d2", "tests", "tools"))
PATH = re.compile(rf"(?<![\w./])(?:{FOLDERS})/[\w./*-]*[\w/*]")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_and_paths_exist(document):
    text = document.read_text(encoding="utf-8")
    links = [target.partition("#")[0] for target in LINK.findall(text) if not target.startswith(("#", "https:"))]
    broken = [target for target in links if not (document.parent / target).exists()]
    absent = [path for path in PATH.findall(text) if not list(ROOT.glob(path.rstrip("/")))]
    assert broken + absent == []


def test_documents_that_the_code_names_exist():
    sources = [*(ROOT / "gkd_d2").rglob("*.py"), *TOOLS, *EXAMPLES, ROOT / "setup.py", ROOT / "Makefile"]
    named = {(name(file), page) for file in sources for page in re.findall(r"docs/\w+\.md", file.read_text())}
    assert len(named) > 3
    assert [(file, page) for file, page in named if not (ROOT / page).is_file()] == []


def test_the_readme_claims_what_the_studies_found():
    """Mean and deviation of AP, a row a setting, a column a detector of a study."""
    section = (ROOT / "README.md").read_text().partition("## Does it teach?")[2].partition("\n## ")[0]
    claimed = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "±" in line]
    assert len(claimed) >= 4
    results = (ROOT / "docs" / "results.md").read_text()
    columns = itertools.product(("Toy scenes", "Toy scenes, new seeds"), ("frcnn", "retinanet"))
    for column, (study, detector) in enumerate(columns, start=1):
        part = results.partition(f"\n## {study}\n")[2].partition(f"\n### {detector}\n")[2].partition("\n### ")[0]
        found = dict(re.findall(r"^\| ([\w-]+) \| [\d.–]+ \| ([\d.]+ ± [\d.]+) \|", part, re.MULTILINE))
        told = {row[0]: row[column] for row in claimed if row[column] != "–"}
        assert len(told) >= 4 and told.items() <= found.items()


def test_there_is_one_version():
    version = gkd_d2.__version__
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == version


def test_paths_are_found_in_prose_and_commands():
    text = (
        "`python tools/a.py --config-file configs/b/c.yaml`, [d](docs/d.md). In configs/toy/: see csrc/*.h, x/docs/no."
    )
    assert PATH.findall(text) == ["tools/a.py", "configs/b/c.yaml", "docs/d.md", "configs/toy/", "csrc/*.h"]


def marks(document: Path) -> int:
    return document.read_text(encoding="utf-8").splitlines().count(MARK)


@pytest.mark.parametrize("document", filter(marks, DOCUMENTS), ids=name)
def test_marked_commands_run(document, tmp_path):
    tree = tmp_path / "gkd_d2"
    anywhere = shutil.ignore_patterns(*LEFTOVERS)
    shutil.copytree(
        ROOT,
        tree,
        ignore=lambda folder, names: anywhere(folder, names) | (set(ROOT_LEFTOVERS) if folder == str(ROOT) else set()),
    )
    # `python` and `.venv/bin/python` of a document are the Python that runs the test.
    (tree / ".venv").symlink_to(sys.prefix)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("DETECTRON2_DATASETS", None)
    marked = [block for block in fenced_blocks(document) if block.marked]
    assert len(marked) == marks(document), f"{MARK} stands above no fenced block"
    for block in marked:
        assert block.language == "bash"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text], cwd=tree, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{name(document)}:{block.line}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.mark.parametrize("tool", TOOLS, ids=name)
def test_help_shows_an_example(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(tool), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(tool), run_name="__main__")
    assert end.value.code == 0
    assert f"python tools/{tool.name} " in capsys.readouterr().out.replace("\n", " ")
