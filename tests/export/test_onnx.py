"""An ONNX file detects what the student does, on images of any size, or is refused."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detectron2.modeling import build_model
from tiny import calm, detector_config

from gkd_d2.export import ExportError
from gkd_d2.export.onnx import OnnxDetector, check_runs, import_extra, make_onnx, metadata, trace_onnx
from gkd_d2.export.quantize import quantize
from gkd_d2.export.torchscript import detect_by_script, make_script
from gkd_d2.export.tracing import detect

SIZES = ((96, 120), (64, 200), (131, 77))


def noise(*sizes):
    return [255 * torch.rand(3, *size) for size in sizes]


def student(kind, image_format="BGR"):
    """A tiny student that detects much, and its config."""
    cfg = detector_config(kind)
    cfg.INPUT.FORMAT = image_format
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    return calm(build_model(cfg)).eval(), cfg


@pytest.fixture(scope="module", params=["faster", "retinanet"])
def exported(request):
    """A student, its config, and its ONNX file."""
    model, cfg = student(request.param)
    return model, cfg, make_onnx(model, cfg, noise(*SIZES))


def test_it_detects_what_the_student_does_at_sizes_it_never_saw(exported):
    model, _, file = exported
    session = onnxruntime.InferenceSession(file.SerializeToString())
    for size in ((50, 61), (224, 160)):
        (image,) = noise(size)
        boxes, scores, classes = session.run(["boxes", "scores", "classes"], {"image": image[None].numpy()})
        expected = detect(model, image)
        assert len(expected) > 10
        assert (boxes.dtype, scores.dtype, classes.dtype) == (np.float32, np.float32, np.int64)
        # Those of equal scores may change places.
        ours, theirs = (
            sorted(map(tuple, np.column_stack([found[1], found[2], found[0]]).round(3).tolist()))
            for found in (
                (boxes, scores, classes),
                (expected.pred_boxes.tensor.numpy(), expected.scores.numpy(), expected.pred_classes.numpy()),
            )
        )
        np.testing.assert_allclose(ours, theirs, atol=5e-3)


def nodes(graph):
    """All of a graph, of the branches of its conditions too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes(attribute.g)


def test_its_operators_are_onnxs_own(exported):
    model, _, file = exported
    assert [(one.domain, one.version) for one in file.opset_import] == [("", 17)]
    found = list(nodes(file.graph))
    assert {node.domain for node in found} == {""}
    kinds = {node.op_type for node in found}
    assert {"NonMaxSuppression", "TopK"} <= kinds
    aligned = [node for node in found if node.op_type == "RoiAlign"]
    assert bool(aligned) == hasattr(model, "roi_heads")
    for node in aligned:
        modes = [one.s for one in node.attribute if one.name == "coordinate_transformation_mode"]
        assert modes == [b"half_pixel"]


def test_it_says_how_its_input_is_made(exported):
    _, cfg, file = exported
    said = {entry.key: entry.value for entry in file.metadata_props}
    assert said["image_format"] == "BGR"
    assert (said["min_size"], said["max_size"]) == ("800", "1333")
    assert json.loads(said["pixel_mean"]) == cfg.MODEL.PIXEL_MEAN
    # Detectron2's own dataset, whose annotations need not be there.
    assert json.loads(said["class_names"])[:2] in (["person", "bicycle"], [])


def test_the_order_of_channels_is_the_students(exported):
    """The picture is read in the order that the file names: an image in the other one gives other detections."""
    model, _, file = exported
    (image,) = noise((96, 120))
    detector = OnnxDetector(file.SerializeToString())
    assert not torch.allclose(detector.detect(image.flip(0)).scores[:5], detect(model, image).scores[:5], atol=1e-5)


@pytest.mark.parametrize("kind", ["faster", "retinanet"])
def test_a_fixed_size_is_padded_as_detectron2_pads(kind):
    model, cfg = student(kind)
    file = make_onnx(model, cfg, noise(*SIZES), (128, 160))
    assert [axis.dim_value for axis in file.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 128, 160]
    # 97 and 129 are padded to 128 and 160 by Detectron2, too.
    (image,) = noise((97, 129))
    found, expected = OnnxDetector(file.SerializeToString()).detect(image), detect(model, image)
    # The best lie within the image in both; in the padding there is more than Detectron2, which clips, can find.
    best = found.scores.argmax(), expected.scores.argmax()
    assert found.scores[best[0]] == pytest.approx(expected.scores[best[1]].item(), abs=1e-3)
    assert found.image_size == (97, 129)
    assert (found.pred_boxes.tensor[:, 2] <= 129).all() and (found.pred_boxes.tensor[:, 3] <= 97).all()
    # One twice as large is made smaller, and its boxes are its own.
    large = torch.nn.functional.interpolate(image[None], scale_factor=2.0)[0]
    again = OnnxDetector(file.SerializeToString()).detect(large)
    assert again.pred_boxes.tensor[:, 2].max() > 129


def test_a_file_that_detects_differently_is_refused():
    model, cfg = student("retinanet")

    # The tracer takes the float for a constant: it is the width of the first image that the file sees.
    def shift(module, inputs, outputs):
        outputs[0]["instances"].pred_boxes.tensor += float(inputs[0][0]["image"].shape[2])

    model.register_forward_hook(shift)
    with pytest.raises(ExportError, match=r"the ONNX file differs from the model on an image of \d+ x \d+ pixels"):
        make_onnx(model, cfg, noise(*SIZES))


def test_a_score_that_differs_is_refused():
    model, cfg = student("retinanet")

    def drift(module, inputs, outputs):
        if torch.jit.is_tracing():
            outputs[0]["instances"].scores += 2e-3

    model.register_forward_hook(drift)
    message = r"score \(within 0.001\), such as the model's box \(.*\) of class \d and score"
    with pytest.raises(ExportError, match=message):
        make_onnx(model, cfg, noise(*SIZES))


def test_what_can_not_be_checked_is_refused():
    model, cfg = student("retinanet")
    model.test_score_thresh = model.score_threshold = 1.0
    with pytest.raises(ExportError, match="nothing above its score threshold, 1, on the 3 sample pictures, .* ONNX"):
        make_onnx(model, cfg, noise(*SIZES))


@pytest.mark.parametrize("image_format", ["L", "YUV-BT.601"])
def test_other_formats_are_refused(image_format):
    """A user of the file would take them for RGB."""
    model, cfg = student("retinanet")
    cfg.INPUT.FORMAT = image_format
    with pytest.raises(ExportError, match=f"images in BGR or RGB, but INPUT.FORMAT is {image_format}"):
        make_onnx(model, cfg, noise(*SIZES))


def test_only_names_of_as_many_classes_are_taken(coco_dataset):
    model, cfg = student("retinanet")
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = ("coco_2017_val",), ("toy_kitti_train",)
    assert json.loads(metadata(cfg, 3)["class_names"]) == ["Car", "Pedestrian", "Cyclist"]
    assert metadata(cfg, 4)["class_names"] == "[]"


@pytest.mark.parametrize("kind", ["ONNX", "TorchScript"])
def test_the_limit_of_candidates_holds_where_the_traced_picture_has_fewer(kind):
    model, cfg = student("retinanet")
    model.test_topk_candidates, model.test_nms_thresh, model.max_detections_per_image = 60, 1.0, 1000
    # 24 cells at the first level, 9 scores each: of the picture that is traced all levels but that one have fewer.
    small, large = noise((32, 48), (200, 300))
    if kind == "ONNX":
        found = OnnxDetector(trace_onnx(model, cfg, small).SerializeToString()).detect(large)
    else:
        found = detect_by_script(make_script(model, [small]), large)
    expected = detect(model, large)
    # Three levels of more than 60, one of 3 x 5 cells, one of 2 x 3.
    assert len(expected) == 60 * 3 + min(60, 3 * 5 * 9) + min(60, 2 * 3 * 9) == len(found)
    assert model.test_topk_candidates == 60 and type(model.test_topk_candidates) is int


def test_masks_are_refused():
    model, cfg = student("mask")
    with pytest.raises(ExportError, match=r"the student detects masks, too \(MODEL.MASK_ON\)"):
        make_onnx(model, cfg, noise(*SIZES))


def test_a_package_that_is_missing_is_named():
    with pytest.raises(ExportError, match=r"--onnx needs no_such_package, which is not .*: pip install .*export"):
        import_extra("no_such_package.part", "--onnx")


def test_every_convolution_and_product_is_in_eight_bits(exported):
    model, _, file = exported
    calibration = noise(*SIZES)
    quantized = quantize(file, calibration)
    onnx.checker.check_model(quantized)
    assert {one.domain for one in quantized.opset_import} == {node.domain for node in nodes(quantized.graph)} == {""}
    dequantized = {node.output[0] for node in quantized.graph.node if node.op_type == "DequantizeLinear"}
    products = [node for node in quantized.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(products) > 50
    assert all({*node.input[:2]} <= dequantized for node in products)
    kept = sum(int(np.prod(one.dims)) for one in quantized.graph.initializer if one.data_type == onnx.TensorProto.FLOAT)
    assert kept < 0.02 * sum(parameter.numel() for parameter in model.parameters())
    assert {entry.key for entry in file.metadata_props} <= {entry.key for entry in quantized.metadata_props}
    plain, small = OnnxDetector(file.SerializeToString()), OnnxDetector(quantized.SerializeToString())
    difference = (plain.detect(calibration[0]).scores[:20] - small.detect(calibration[0]).scores[:20]).abs().max()
    assert 0 < difference < 0.05


@pytest.mark.parametrize("kind", ["faster", "retinanet"])
def test_an_image_without_detections_gives_none(kind):
    """In 8 bits, too, for which onnxruntime computes sizes in another way."""
    model, cfg = student(kind)
    pictures = noise(*SIZES)
    best = [detect(model, picture).scores.max().item() for picture in pictures]
    predictor = model.roi_heads.box_predictor if kind == "faster" else model
    predictor.test_score_thresh = max(best) - 1e-6
    # Traced where there is one, run where there is none.
    file = trace_onnx(model, cfg, pictures[best.index(max(best))])
    blank = torch.full((3, 33, 33), 128.0)
    assert not len(detect(model, blank))
    for exported in (file, quantize(file, pictures)):
        found = OnnxDetector(exported.SerializeToString()).detect(blank)
        assert (found.pred_boxes.tensor.shape, found.scores.shape, found.pred_classes.shape) == ((0, 4), (0,), (0,))


def test_a_file_that_can_not_be_run_is_refused(exported):
    _, _, file = exported
    changed = onnx.ModelProto()
    changed.CopyFrom(file)
    # The weights of its first convolution for two channels.
    node = next(node for node in changed.graph.node if node.op_type == "Conv")
    weights = next(one for one in changed.graph.initializer if one.name == node.input[1])
    values = onnx.numpy_helper.to_array(weights)[:, :2]
    weights.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), weights.name))
    with pytest.raises(ExportError, match="onnxruntime can't run the ONNX file on an image of 96 x 120 pixels: .*Conv"):
        check_runs(OnnxDetector(changed.SerializeToString()), noise((96, 120)), "ONNX file")
