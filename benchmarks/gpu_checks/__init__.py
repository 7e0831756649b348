"""The sections of `benchmarks/gpu.py`, the check of a card: one module per section."""
