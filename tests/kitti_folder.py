"""Small folders of KITTI's form."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

SIZE = (200, 100)  # width, height
TAIL = "1.5 1.6 3.9 1.0 1.5 20.0 -1.57"  # the 7 fields of a 3D box
CAR = f"Car 0.00 0 -1.50 10.00 20.00 60.00 50.00 {TAIL}"
PEDESTRIAN = f"Pedestrian 0.25 1 0.30 100.00 10.00 120.00 70.00 {TAIL}"
CYCLIST = f"Cyclist 0.00 2 0.30 130.00 10.00 150.00 50.00 {TAIL}"
VAN = f"Van 0.00 0 0.30 80.00 60.00 99.00 90.00 {TAIL}"
DONT_CARE = "DontCare -1 -1 -10 155.00 5.00 195.00 45.00 -1 -1 -1 -1000 -1000 -1000 -10"


def write_kitti(root: Path, labels: dict[str, str], lists: dict[str, str] | None = None, suffix: str = ".png") -> Path:
    """Write a folder of KITTI's form: text of each label file by id, text of each list by split; returns the folder."""
    for folder in ("training/image_2", "training/label_2"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for image_id, text in labels.items():
        Image.new("RGB", SIZE, (90, 120, 60)).save(root / "training/image_2" / f"{image_id}{suffix}")
        (root / "training/label_2" / f"{image_id}.txt").write_bytes(text.encode())
    for split, text in (lists or {}).items():
        path = root / "ImageSets" / f"{split}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    return root
