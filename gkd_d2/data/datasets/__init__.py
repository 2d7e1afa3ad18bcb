"""The datasets: KITTI, COCO-Traffic and files of COCO's form, and the names under which they are registered."""
