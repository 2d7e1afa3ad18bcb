from gkd_d2.data.toy.scene import FIRST_VAL_ID, ToyObject, make_scene, make_toy_kitti  # noqa: F401
