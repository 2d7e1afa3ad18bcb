"""The imitation losses as computations on tensors: ``reference`` in plain PyTorch, ``fused`` in the extension."""
