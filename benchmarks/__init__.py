"""Benchmarks: ratios of two ways of doing the same, measured in turn in one process. `make bench` runs them.

Each file has a function `cases(quick)` that yields `Case`s (`timing.py`); `scripts/benchmark.py` measures them and
writes results/bench/<machine>/. To add one: a file like these, and its name in `GROUPS`.
"""

GROUPS = ("activations", "recurrent", "training", "statistics", "pipeline", "ensembles", "commands")
"""In the order of the report."""
