"""Messages of a lazy run name its own keys."""

import ast
import re

import pytest

from gkd_d2.lazy.names import _KEY, in_lazy_words, lazy_name

# In messages of a run of yacs alone: its config, its trainer's keys, and keys whose sentence is about yacs.
YACS_ONLY = (
    "DATALOADER.REPEAT_THRESHOLD",
    "DATALOADER.SAMPLER_TRAIN",
    "DATASETS.PROPOSAL_FILES_TEST",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "GKD.IMPORTS",
    "GKD.KITTI_RESULTS",
    # The node, of which the keys are looked up.
    "GKD.LOSS_WEIGHTS",
    "GKD.STUDENT.META_ARCHITECTURE",
    # Beside what is said for both.
    "INPUT.MAX_SIZE_TRAIN",
    # Which builds the same backbone by its name.
    "MODEL.BACKBONE.NAME",
    "MODEL.LOAD_PROPOSALS",
    "MODEL.META_ARCHITECTURE",
    # The node.
    "MODEL.TIMM",
    "SOLVER.REFERENCE_WORLD_SIZE",
    "TEST.AUG.ENABLED",
)
FOLDERS = ("modeling", "engine", "methods", "losses", "data", "evaluation", "utils")


def keys_in_messages(project):
    """Keys in strings that are no docstrings, of what a lazy run passes through."""
    found = {}
    for folder in FOLDERS:
        for path in (project / "gkd_d2" / folder).rglob("*.py"):
            # It reads configs of yacs alone, and knows all their keys.
            if path.name == "config_merge.py":
                continue
            tree = ast.parse(path.read_text())
            documents = {
                id(node.body[0].value)
                for node in ast.walk(tree)
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
                and node.body
                and isinstance(node.body[0], ast.Expr)
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
                    for key in _KEY.findall(node.value):
                        found.setdefault(key, path.name)
    return found


def test_every_key_in_a_message_has_a_name(project):
    found = keys_in_messages(project)
    assert len(found) > 40
    unnamed = {key: path for key, path in found.items() if lazy_name(key) == key and key not in YACS_ONLY}
    assert not unnamed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GKD.TEACHER.WEIGHTS is empty", "model.teacher_weights is empty"),
        ("put `MODEL.DEVICE cpu` at the end", "put `train.device=cpu` at the end"),
        ("Lower SOLVER.BASE_LR, or GKD.LOSS_WEIGHTS.BOX", "Lower optimizer.lr, or model.method.weights.box"),
        ("GKD.MAP_REGION is 'x'", "model.method.map_region is 'x'"),
        ("OUTPUT_DIR: SEED", "train.output_dir: train.seed"),
        ("KITTI AP of /data/A.B/x and RANK", "KITTI AP of /data/A.B/x and RANK"),
        ("run/SEED/t.pth and /OUTPUT_DIR and GKD.FEATURES/x", "run/SEED/t.pth and /OUTPUT_DIR and GKD.FEATURES/x"),
        ("name that module in GKD.IMPORTS or by --import", "import that module in the config"),
    ],
)
def test_sentences(text, expected):
    assert in_lazy_words(text) == expected


def test_keys_are_found_whole():
    assert re.findall(_KEY, "GKD.FGD.TEMPERATURE. DATASETS.TRAIN,") == ["GKD.FGD.TEMPERATURE", "DATASETS.TRAIN"]
