"""Measurements on a GPU, self-contained: `python -m benchmarks.gpu [GROUP ...]`. See docs/gpu.md."""
