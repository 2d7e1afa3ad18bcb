"""The one size to which both networks' batches are padded, where each by itself would pad to another."""

from __future__ import annotations

import inspect
import logging
import math

from detectron2.structures import ImageList
from detectron2.utils import comm
from torch import Tensor

from gkd_d2.modeling.split import SplitDetector

_logger = logging.getLogger(__name__)


class CommonSize:
    """Decides to which size a batch is padded before either network runs, so that their levels agree cell by cell.

    Detectors whose backbones declare the same padding are left to pad by themselves. Otherwise the size is the larger
    one of both, rounded up to what both need. What that costs is logged once, at the first such batch.

    Padding that a network does not make by itself leaves its features as they are, but for the cells whose receptive
    field reaches into it: they see what the network makes of an empty border, where they would see the zeros that
    convolutions put around every level. Attention, and norms over the whole image, carry the difference to all cells.

    Args:
        student: the student.
        teacher: the teacher.
    """

    def __init__(self, student: SplitDetector, teacher: SplitDetector):
        self._splits = {"student": student, "teacher": teacher}
        self._paddings = {}
        # A split of the user's own whose features take no size pads in a way that only it knows.
        if all("size" in inspect.signature(split.features).parameters for split in (student, teacher)):
            self._paddings = {name: split.padding() for name, split in self._splits.items()}
        declared = [padding.declared for padding in self._paddings.values()]
        self._alike = declared[1:] == declared[:-1]
        self._said = False

    def of(self, batched_inputs: list[dict]) -> tuple[int, int] | None:
        """(height, width) in pixels to which both networks pad a batch; None: each pads by itself.

        Args:
            batched_inputs: as for Detectron2's meta-architectures.

        Raises:
            ValueError: an image does not fit into the square of a network.
        """
        if self._alike:
            return None
        own = {name: tuple(split.preprocess(batched_inputs).tensor.shape[-2:]) for name, split in self._splits.items()}
        divisor = math.lcm(*(padding.divisor for padding in self._paddings.values()))
        height, width = (math.ceil(max(pixels) / divisor) * divisor for pixels in zip(*own.values()))
        if not self._said:
            self._say(own, (height, width))
            self._said = True
        return height, width

    def _say(self, own: dict[str, tuple[int, int]], size: tuple[int, int]) -> None:
        """Log what each network computes beyond what it would compute alone."""
        costs = [
            f"the {name} computes {math.prod(size) / math.prod(alone):.2f} times the pixels that it would alone, of "
            f"{_times(alone)}"
            for name, alone in own.items()
            if alone != size
        ]
        squares = [
            f"the {name}'s backbone pads to a square of {padding.square}; if it takes other sizes too, set its "
            "square_pad to 0"
            for name, padding in self._paddings.items()
            if padding.square
        ]
        if costs and comm.is_main_process():
            _logger.log(
                logging.WARNING if squares else logging.INFO,
                "Both networks see a batch padded to one size, the first to %s: %s",
                _times(size),
                "; ".join([*costs, *squares]),
            )


def sized_features(
    split: SplitDetector, batched_inputs: list[dict], size: tuple[int, int] | None
) -> tuple[ImageList, dict[str, Tensor]]:
    """A detector's features of a batch of the size that :meth:`CommonSize.of` gave; a split may take no size at all."""
    return split.features(batched_inputs) if size is None else split.features(batched_inputs, size)


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
