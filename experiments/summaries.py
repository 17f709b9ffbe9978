"""Grouping runs and summing up figures over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bipolar.runs import Run

CONFIDENCE = 0.95


def by_activation(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs grouped by the name of their activation, in the order of the grid; seeds in order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.activation, []).append(run)
    return {name: sorted(members, key=lambda run: run.seed) for name, members in groups.items()}


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval by Student's t; NaN half-width below two values."""
    from scipy import stats

    sample = np.asarray(list(values), dtype=float)
    if sample.size == 0:
        return math.nan, math.nan
    if sample.size < 2:
        return float(sample.mean()), math.nan
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, sample.size - 1) * sample.std(ddof=1) / math.sqrt(sample.size)
    return float(sample.mean()), float(half)


def number(value: float | None) -> float:
    """None (what was not finite when it was recorded) as NaN."""
    return math.nan if value is None else float(value)


def final(run: Run, key: str) -> float:
    """A final figure of the run's summary, e.g. `test_error`; NaN for a run that diverged."""
    return math.nan if run.summary["status"] == "diverged" else number(run.summary["final"].get(key))


def layer_curve(run: Run, key: str, step: int | None = None) -> NDArray[Any]:
    """One figure for every layer, first to last, at `step` (None: the last that was measured)."""
    return np.array([number(value) for value in run.layers(key, step)])


def loss_curve(run: Run, split: str, key: str) -> tuple[NDArray[Any], NDArray[Any]]:
    steps, values = run.curve(split, key)
    return np.array(steps), np.array([number(value) for value in values])


def cell(values: Iterable[float], form: Callable[[float], str]) -> str:
    """`mean ± half-width` for a table, from the runs in which the figure is finite, and how many if not all."""
    everything = list(values)
    finite = [value for value in everything if math.isfinite(value)]
    mean, half = mean_interval(finite)
    if math.isnan(mean):
        return "–"
    text = form(mean) if math.isnan(half) else f"{form(mean)} ± {form(half)}"
    return text if len(finite) == len(everything) else f"{text} (n = {len(finite)})"


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def significant(value: float) -> str:
    return f"{value:.3g}"
