"""Draw what an ONNX file of tools/export_student.py detects in a picture: no PyTorch, no Detectron2.

Example: python examples/detect_onnx.py output/student/model.onnx picture.jpg drawn.jpg 0.5
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps


def detect(session, picture):
    """Boxes, N,4, xyxy in pixels of the picture, scores, N, and classes, N."""
    meta = session.get_modelmeta().custom_metadata_map
    least, most = int(meta["min_size"]), int(meta["max_size"])
    scale = min(least / min(picture.size), most / max(picture.size)) if least else 1
    height, width = session.get_inputs()[0].shape[2:]
    if fixed := isinstance(height, int):
        scale = min(scale, width / picture.width, height / picture.height)
    resized = picture.resize([int(scale * side + 0.5) for side in picture.size], Image.BILINEAR)
    pixels = np.asarray(resized)[:, :, :: -1 if meta["image_format"] == "BGR" else 1]
    # A file of fixed size gets the mean where the picture leaves a margin.
    shape = (height, width, 3) if fixed else pixels.shape
    image = np.full(shape, json.loads(meta["pixel_mean"]), dtype=np.float32)
    image[: resized.height, : resized.width] = pixels
    boxes, scores, classes = session.run(None, {"image": image.transpose(2, 0, 1)[None]})
    boxes = (boxes.reshape(-1, 2, 2) * np.divide(picture.size, resized.size)).clip(0, picture.size).reshape(-1, 4)
    # None that lies in the margin.
    found = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return boxes[found], scores[found], classes[found]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "picture", "drawn"):
        parser.add_argument(name, help="a file")
    parser.add_argument("threshold", type=float, nargs="?", default=0.5, help="lowest score (default: 0.5)")
    args = parser.parse_args()
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    picture = ImageOps.exif_transpose(Image.open(args.picture)).convert("RGB")
    detections = zip(*detect(session, picture))
    draw = ImageDraw.Draw(picture)
    for box, score, number in detections:
        if score >= args.threshold:
            name = names[number] if names else f"class {number}"
            print(f"{name} {score:.3f} at", *(f"{side:.1f}" for side in box))
            draw.rectangle(box.tolist(), outline="red", width=2)
            draw.text(box[:2].tolist(), f"{name} {score:.2f}", fill="yellow")
    picture.save(args.drawn)
