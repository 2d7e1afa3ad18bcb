"""The front end of Detectron2's LazyConfig: distillation in ``.py`` configs."""

from gkd_d2.lazy.distil import build_distiller, distil

__all__ = ["build_distiller", "distil"]
