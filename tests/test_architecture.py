"""Imports go down, from floor to floor, and a training loads no more than it needs."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

# From the top; the package itself stands above its folders, and a folder within one below it where it is named.
FLOORS = (
    {"", "collect_env", "config_docs"},
    {"analysis", "export", "lazy"},
    {"engine"},
    {"modeling"},
    {"modeling.split"},
    {"evaluation"},
    {"methods", "data", "visualize"},
    {"data.datasets", "data.toy"},
    {"losses"},
    {"config"},
    {"utils"},
)


def imports(root):
    """Module -> modules of the package that it imports, those for type checkers and within functions included."""
    files = {".".join(path.relative_to(root.parent).with_suffix("").parts): path for path in root.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found = {}
    for name, path in modules.items():
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in (node for node in nodes if isinstance(node, ast.ImportFrom)):
            assert node.level == 0, f"{name} has a relative import"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {part if part in modules else node.module for part in parts}
        found[name] = names & modules.keys()
    return found


def test_imports_go_down(project):
    floor = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
    graph = imports(project / "gkd_d2")
    folder = {}
    for name in graph:
        parts = name.split(".")[1:3]
        folder[name] = next(f for f in (".".join(parts), *parts[:1]) if f in floor)
    up = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if folder[name] != folder[other] and floor[folder[name]] >= floor[folder[other]]
    ]
    assert not up
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle: {' <- '.join(error.args[1])}") from None


def test_a_training_loads_no_plots_and_nothing_that_looks_at_runs(project):
    """Neither of them takes part in it, and matplotlib alone takes a second to load; timm is for its own backbones."""
    tree = ast.parse((project / "tools" / "train_net.py").read_text())
    lines = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    code = "\n".join([*lines, "import sys", "print(*sys.modules)"])
    loaded = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    modules = loaded.stdout.split()
    assert "gkd_d2.engine.trainer" in modules
    unwanted = ("matplotlib", "tensorboard", "timm", "gkd_d2.analysis")
    assert not [name for name in modules if name.startswith(unwanted)]
