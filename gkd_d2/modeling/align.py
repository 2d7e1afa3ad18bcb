"""What makes the student's features comparable with the teacher's: 1x1 convolutions, and one dtype."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from fvcore.nn import weight_init
from torch import Tensor, nn


class AlignConv(nn.Conv2d):
    """A linear map of channels, student -> teacher. It has no bias, so that gradients have an exact counterpart.

    Args:
        student_channels: channels of the student's level.
        teacher_channels: channels of the teacher's level.
    """

    def __init__(self, student_channels: int, teacher_channels: int):
        super().__init__(student_channels, teacher_channels, kernel_size=1, bias=False)
        weight_init.c2_xavier_fill(self)

    @torch.no_grad()
    def align_gradient(self, gradient: Tensor, *, of_cells: bool = False) -> Tensor:
        """The detection loss's gradient with respect to the aligned feature.

        The loss does not pass through this convolution S = W F, so its gradient with respect to S is only defined by
        the chain rule: W^T dS = dF. The solution of least norm is taken (of least squares where there are fewer
        teacher than student channels). With it the gradient map of S equals the map of F, whatever W is. Where only
        the spatial mean of a gradient enters the losses, only the mean is solved for.

        Args:
            gradient: N,C_student,H,W, with respect to the student's own feature.
            of_cells: whether the gradient of each cell is wanted.

        Returns:
            N,C_teacher,1,1, its spatial mean; N,C_teacher,H,W with ``of_cells``.
        """
        # Autocast and half precision have no solver. Unlike lstsq this one lets a NaN through, for the trainer to see.
        with torch.autocast(gradient.device.type, enabled=False):
            weight = self.weight.flatten(1).to(torch.promote_types(gradient.dtype, torch.float32))
            wanted = gradient.to(weight.dtype)
            if not of_cells:
                wanted = wanted.mean(dim=(2, 3), keepdim=True)
            columns = wanted.movedim(1, 0).flatten(1)
            if weight.shape[0] >= weight.shape[1]:
                aligned = weight @ torch.linalg.solve_ex(weight.t() @ weight, columns)[0]
            else:
                aligned = torch.linalg.solve_ex(weight @ weight.t(), weight @ columns)[0]
        n, _, h, w = wanted.shape
        return aligned.reshape(-1, n, h, w).movedim(0, 1).to(gradient.dtype)


class AlignConvs(nn.ModuleDict):
    """Level name -> its convolution, for the levels whose channels differ.

    Args:
        channels: level name -> channels of the student and of the teacher.
    """

    def __init__(self, channels: dict[str, tuple[int, int]]):
        super().__init__({name: AlignConv(*pair) for name, pair in channels.items() if pair[0] != pair[1]})

    def align_features(self, names: Sequence[str], features: Sequence[Tensor]) -> list[Tensor]:
        """The student's features N,C,H,W of some levels, brought to the teacher's number of channels."""
        return [self[name](feature) if name in self else feature for name, feature in zip(names, features)]

    def align_gradients(
        self, names: Sequence[str], gradients: Sequence[Tensor], *, of_cells: bool = False
    ) -> list[Tensor]:
        """Gradients N,C,H,W at features of some levels -> those at :meth:`align_features` of them; see AlignConv."""
        return [
            self[name].align_gradient(gradient, of_cells=of_cells) if name in self else gradient
            for name, gradient in zip(names, gradients)
        ]


def in_one_dtype(*lists: list[Tensor] | None) -> list[list[Tensor] | None]:
    """Tensors in the widest of their dtypes.

    Under autocast two networks may give features of two dtypes, as where only one has normalised its own.
    """
    dtypes = {tensor.dtype for tensors in lists for tensor in tensors or ()}
    if len(dtypes) == 1:
        return list(lists)
    widest = functools.reduce(torch.promote_types, dtypes)
    return [tensors and [tensor.to(widest) for tensor in tensors] for tensors in lists]
