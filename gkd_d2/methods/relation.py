"""The relation loss: imitation of all cells, to each of which blocks that train add what the whole image holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gkd_d2.methods.method import Level


class GlobalContext(nn.Module):
    """A feature, to every cell of which the same summary of all cells is added:

        R(F) = F + W2 ReLU( LayerNorm( W1 g ) ),    g = sum over h,w of p * F,    p = softmax over h,w of ( w0 . F )

    W1 leads from the C channels to C/2, at least 1, and W2 back. W2 and its bias start at 0, so that R(F) = F at first.
    w0 has no bias: the softmax would not see one, and so never train it.

    Source: the GcBlock of "Focal and Global Knowledge Distillation for Detectors", arXiv 2111.11837.

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 2, 1)
        self.attention = nn.Parameter(torch.empty(1, channels))
        nn.init.kaiming_normal_(self.attention)
        self.squeeze = nn.Linear(channels, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.expand = nn.Linear(hidden, channels)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, feature: Tensor) -> Tensor:
        """
        Args:
            feature: N,C,H,W, of the parameters' dtype, in which everything is computed, also under autocast.

        Returns:
            R(F), N,C,H,W.
        """
        with torch.autocast(feature.device.type, enabled=False):
            cells = feature.flatten(2)
            shares = torch.bmm(self.attention.expand(len(cells), 1, -1), cells).softmax(dim=2)
            summary = torch.bmm(cells, shares.transpose(1, 2))[:, :, 0]
            added = self.expand(self.norm(self.squeeze(summary)).relu())
            return feature + added[:, :, None, None]


class RelationLoss(nn.ModuleDict):
    """Squared differences of the two networks' features in their context, without a weight, at one level:

        1/N * sum over n,c,h,w of ( R_S(S) - R_T(T) )^2

    R_S and R_T are a :class:`GlobalContext` each, of this level alone. Both train with the student, T is constant. The
    last layers start at 0, so that at first it is plain imitation of all cells.

    Source: the global part of "Focal and Global Knowledge Distillation for Detectors", arXiv 2111.11837;
    the mean over the batch as in its public code.

    Args:
        channels: name of each level -> C.
    """

    def __init__(self, channels: Mapping[str, int]):
        super().__init__(
            {
                name: nn.ModuleDict({network: GlobalContext(count) for network in ("student", "teacher")})
                for name, count in channels.items()
            }
        )

    def forward(self, level: Level) -> Tensor:
        """
        Args:
            level: from :func:`gkd_d2.methods.method.widened`.

        Returns:
            A scalar.

        Raises:
            RuntimeError: no blocks were built for this level.
        """
        if level.name not in self:
            raise RuntimeError(
                f"the relation loss has no blocks for the level {level.name!r}, only for {', '.join(self) or 'none'}: "
                "call build_parameters of the method with the channels of its levels first, as the distiller does"
            )
        blocks = self[level.name]
        difference = blocks["student"](level.student) - blocks["teacher"](level.teacher)
        return difference.square().sum() / len(difference)
