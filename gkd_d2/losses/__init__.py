"""The distillation losses of features: what they can be asked for, and two implementations that agree.

``reference`` computes them in plain PyTorch, ``fused`` in the compiled extension.
"""

from gkd_d2.losses.losses import box_context_mask, distillation_losses, gradient_map
from gkd_d2.losses.options import LossOptions, LossWeights

__all__ = ["LossOptions", "LossWeights", "box_context_mask", "distillation_losses", "gradient_map"]
