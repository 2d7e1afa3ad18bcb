"""Numbers of a network that are infinite or NaN."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gkd_d2.utils.text import listed


def find_not_finite(network: nn.Module, ignored: Iterable[Tensor] = ()) -> list[str]:
    """Names of the parameters and buffers that hold infinite or NaN values.

    A buffer that no checkpoint holds may be infinite, as a mask is; it counts where it holds NaN.

    Args:
        network: any module.
        ignored: some of its parameters and buffers that are not looked at.
    """
    left_out = set(map(id, ignored))
    saved = set(map(id, network.state_dict(keep_vars=True).values()))
    return [
        name
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
        if id(tensor) not in left_out and not (is_finite(tensor) if id(tensor) in saved else not tensor.isnan().any())
    ]


def check_finite(network: nn.Module, owner: str, weights: str = "MODEL.WEIGHTS") -> None:
    """Refuse a network of which a parameter or buffer is not finite; see :func:`find_not_finite`.

    Args:
        network: with its weights loaded.
        owner: whose it is, as "the teacher's", for the error.
        weights: the key that names its checkpoint, for the error.

    Raises:
        ValueError: some are not; they are named.
    """
    names = find_not_finite(network)
    if names:
        raise ValueError(
            f"there are infinite or NaN values in {owner} {listed(names, 3)}: {weights} must name a sound checkpoint, "
            "and MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must be finite"
        )


def running_statistics(network: nn.Module) -> list[Tensor]:
    """Those of the norms in training mode, which every forward changes and none depends on."""
    norms = [module for module in network.modules() if isinstance(module, _NormBase) and module.training]
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or NaN; integers never are."""
    return bool(tensor.isfinite().all())
