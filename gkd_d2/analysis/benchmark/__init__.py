"""Benchmarks: the distillation losses by themselves, and a whole distilled training step.

``losses`` and ``step`` measure, each into a dictionary that can be written as JSON; ``tables`` and ``plots`` show what
they measured. tools/benchmark_losses.py and tools/benchmark_step.py are their command lines.
"""
