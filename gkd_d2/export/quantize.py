"""An ONNX file in 8 bits, by onnxruntime's static quantization."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from gkd_d2.export.errors import ExportError
from gkd_d2.export.onnx import INPUT, OnnxDetector, import_extra

if TYPE_CHECKING:
    from onnx import ModelProto

# The most pictures that are calibrated on.
CALIBRATION_LIMIT = 200
# What is computed in 8 bits. The decoding of boxes and all else that works with coordinates stays in 32.
_OPERATORS = ["Conv", "Gemm", "MatMul"]


class _Reader:
    """Hands the pictures to onnxruntime, one after the other."""

    def __init__(self, exported: ModelProto, pictures: Iterable[Tensor]):
        detector = OnnxDetector(exported.SerializeToString())
        self._inputs = ({INPUT: detector.fit(picture)[0][None].numpy()} for picture in pictures)

    def get_next(self) -> dict | None:
        return next(self._inputs, None)


def quantize(exported: ModelProto, pictures: Iterable[Tensor]) -> ModelProto:
    """Quantize convolutions and matrix products to 8 bits, weights by channel, as QuantizeLinear and DequantizeLinear.

    Args:
        exported: from :func:`gkd_d2.export.onnx.make_onnx`; left as it is.
        pictures: C,H,W each. The range of each activation is that seen on them.

    Raises:
        ExportError: onnxruntime is not installed, or can't do it.
        OSError: a picture can't be read.
    """
    onnx = import_extra("onnx", "--int8")
    quantization = import_extra("onnxruntime.quantization", "--int8")
    shape_inference = import_extra("onnxruntime.quantization.shape_inference", "--int8")
    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, quantized = (Path(folder, f"{name}.onnx") for name in ("plain", "prepared", "quantized"))
        onnx.save(exported, plain)
        try:
            # Symbolic inference can't follow sizes that depend on the data.
            shape_inference.quant_pre_process(plain, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                quantized,
                _Reader(exported, pictures),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=_OPERATORS,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        except (OSError, ExportError):
            raise
        # onnxruntime's errors have no class in common but this one.
        except Exception as error:
            raise ExportError(f"onnxruntime can't quantize the ONNX file: {error}") from error
        result = onnx.load(quantized)
    # onnxruntime names all domains that it knows; of another than ONNX's own is no operator.
    for opset in [opset for opset in result.opset_import if opset.domain]:
        result.opset_import.remove(opset)
    onnx.checker.check_model(result)
    return result
