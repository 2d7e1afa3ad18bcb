"""Draw what a file of tools/export_student.py --onnx detects in a picture, without PyTorch and Detectron2.

Example: python examples/detect_onnx.py output/student/model.onnx picture.jpg drawn.jpg 0.5
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="ONNX file")
parser.add_argument("picture", help="input image")
parser.add_argument("drawn", help="output image")
parser.add_argument("threshold", type=float, nargs="?", default=0.5, help="lowest score (default: 0.5)")
args = parser.parse_args()
onnxruntime.set_default_logger_severity(3)
session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
meta = session.get_modelmeta().custom_metadata_map
height, width = session.get_inputs()[0].shape[2:]
picture = ImageOps.exif_transpose(Image.open(args.picture)).convert("RGB")

# As Detectron2 resizes it; a minimum of 0 stands for no resizing.
least, most = int(meta["min_size"]), int(meta["max_size"])
scale = min(least / min(picture.size), most / max(picture.size)) if least else 1
fixed = isinstance(height, int)
if fixed:
    scale = min(scale, width / picture.width, height / picture.height)
resized = picture.resize([max(1, int(scale * side + 0.5)) for side in picture.size], Image.BILINEAR)
pixels = np.asarray(resized)[:, :, :: -1 if meta["image_format"] == "BGR" else 1]
# A file of fixed size gets the mean where the picture leaves a margin.
image = np.full((height, width, 3) if fixed else pixels.shape, json.loads(meta["pixel_mean"]), dtype=np.float32)
image[: resized.height, : resized.width] = pixels
boxes, scores, classes = session.run(["boxes", "scores", "classes"], {"image": image.transpose(2, 0, 1)[None]})

boxes = (boxes.reshape(-1, 2, 2) * np.divide(picture.size, resized.size)).clip(0, picture.size).reshape(-1, 4)
names, draw = json.loads(meta["class_names"]), ImageDraw.Draw(picture)
for box, score, number in zip(boxes, scores, classes):
    # Those in the margin are empty.
    if score >= args.threshold and (box[2:] > box[:2]).all():
        label = f"{names[number] if names else f'class {number}'} {score:.3f}"
        print(label, "at", *(f"{side:.1f}" for side in box))
        draw.rectangle(box.tolist(), outline="red", width=2)
        draw.text(box[:2].tolist(), label, fill="yellow")
picture.save(args.drawn)
