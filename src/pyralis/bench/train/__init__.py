"""Whole training steps, beside other libraries: `pyralis bench train` (docs/benchmarks.md).

Every peer runs in a process of its own (`worker.py`), over a model of random weights (`made_model.py`), from the same
adapter and over the same tokens (`start.py`), so that the first losses can be compared (`losses.py`).
"""
