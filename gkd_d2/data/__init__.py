"""Datasets. Importing this package registers the built-in ones in Detectron2's catalog."""

from gkd_d2.data.datasets.builtin import check_datasets, register_kitti

__all__ = ["check_datasets", "register_kitti"]
