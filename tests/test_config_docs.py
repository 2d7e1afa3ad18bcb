"""docs/configuration.md is made from the comments of gkd_d2/config/keys.py."""

import pytest
from detectron2.config import CfgNode, get_cfg

from gkd_d2.config import add_gkd_config
from gkd_d2.config_docs import COMMAND, documented_keys, markdown


def test_the_page_is_that_of_the_config(project):
    page = (project / "docs" / "configuration.md").read_text(encoding="utf-8")
    expected = markdown(documented_keys(add_gkd_config))
    assert page == expected, f"docs/configuration.md is not up to date, run: {COMMAND}"


def test_defaults_are_those_of_the_config():
    cfg = get_cfg()
    add_gkd_config(cfg)
    keys = documented_keys(add_gkd_config)
    assert {"GKD.STUDENT.META_ARCHITECTURE", "GKD.LOSS_WEIGHTS.BOX", "GKD.TEMPERATURE"} <= {key for key, *_ in keys}
    for key, default, comment in keys:
        node = cfg
        for name in key.split("."):
            node = node[name]
        assert (node == default, bool(comment)) == (True, True), key


def test_comments_and_values_of_every_form():
    def add(cfg: CfgNode) -> None:
        cfg.MINE = CfgNode()
        # Two lines
        # about one key.
        cfg.MINE.RATE = 1e-3  # not this one
        # A comment of two keys and the node between them.
        cfg.MINE.FIRST = 60 * 60
        cfg.MINE.INNER = CfgNode()
        cfg.MINE.INNER.SECOND: tuple = (
            1,
            2,
        )

        # In a node of Detectron2, a | b or <name>.
        if "ACCUMULATE" not in cfg.SOLVER:
            cfg.SOLVER.ACCUMULATE = "# no comment"
        # A default of Detectron2 that is changed.
        cfg.SOLVER.BASE_LR = 0.5

    keys = documented_keys(add)
    assert keys == [
        ("MINE.RATE", 0.001, "Two lines about one key."),
        ("MINE.FIRST", 3600, "A comment of two keys and the node between them."),
        ("MINE.INNER.SECOND", (1, 2), "A comment of two keys and the node between them."),
        ("SOLVER.ACCUMULATE", "# no comment", "In a node of Detectron2, a | b or <name>."),
        ("SOLVER.BASE_LR", 0.5, "A default of Detectron2 that is changed."),
    ]
    rows = markdown(keys).splitlines()[-5:]
    assert rows[0] == "| `MINE.RATE` | `0.001` | Two lines about one key. |"
    assert rows[3] == r"| `SOLVER.ACCUMULATE` | `'# no comment'` | In a node of Detectron2, a \| b or \<name>. |"


def test_a_key_without_comment_is_named():
    def add(cfg: CfgNode) -> None:
        # The comment of the node ends at the empty line.
        cfg.MINE = CfgNode()

        cfg.MINE.BARE = 1

    with pytest.raises(ValueError, match="^MINE.BARE: add has no comment above it"):
        documented_keys(add)


def test_a_key_that_is_no_plain_assignment_is_named():
    def add(cfg: CfgNode) -> None:
        # A comment.
        cfg.MINE = CfgNode({"HIDDEN": 1})

    with pytest.raises(ValueError, match="^MINE.HIDDEN: add does not add it by `cfg.A.B = value`"):
        documented_keys(add)
