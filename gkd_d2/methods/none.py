"""none: no distillation, for a student alone under a distiller's config."""

from __future__ import annotations

from detectron2.config import CfgNode

from gkd_d2.methods.method import METHOD_REGISTRY, Method


class Nothing(Method):
    """No loss at all: the distiller's training forward is the student's own."""

    def __init__(self):
        super().__init__({})

    def forward(self, levels, factor=1.0):
        return {}


@METHOD_REGISTRY.register()
def none(cfg: CfgNode) -> Nothing:
    """There are no options."""
    return Nothing()
