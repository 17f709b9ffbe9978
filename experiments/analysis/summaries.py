"""Grouping runs and summing up figures over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bipolar.runs import Run
from experiments import part_of

CONFIDENCE = 0.95

Row = dict[str, str]
"""A line of a table: column title to text."""


def by_activation(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs grouped by the name of their activation, in the order of the grid; seeds in order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.activation, []).append(run)
    return {name: sorted(members, key=lambda run: run.seed) for name, members in groups.items()}


def in_parts(runs: Iterable[Run], *parts: str) -> list[Run]:
    """The runs of some parts of a claim; the part of `<profile>/<claim>` itself is the empty text."""
    return [run for run in runs if part_of(run.options["experiment_name"]) in parts]


def option(run: Run, name: str) -> Any:
    """An option of a run by its name on the command line, e.g. `network.pool`; None where it has none."""
    value: Any = run.options
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def where(runs: Iterable[Run], **options: Any) -> list[Run]:
    """The runs with these options; dots in names are written as two underscores: `network__pool="max"`."""
    wanted = {name.replace("__", "."): value for name, value in options.items()}
    return [run for run in runs if all(option(run, name) == value for name, value in wanted.items())]


def values_of(runs: Iterable[Run], name: str) -> list[Any]:
    """The values of an option that occur, in the order of the runs."""
    return list(dict.fromkeys(option(run, name) for run in runs))


def by_seed(runs: Iterable[Run]) -> list[Run]:
    return sorted(runs, key=lambda run: run.seed)


def has_diverged(run: Run) -> bool:
    return bool(run.summary["status"] == "diverged")


def chosen_rate(runs: Iterable[Run]) -> float:
    """The learning rate at which the fewest runs diverged, and of these the one with the smallest mean final validation
    loss of the others: one rule for every activation."""
    members = list(runs)

    def cost(rate: float) -> tuple[int, float]:
        losses = [final(run, "valid_loss") for run in where(members, optimizer__lr=rate)]
        finite = [loss for loss in losses if math.isfinite(loss)]
        return len(losses) - len(finite), float(np.mean(finite)) if finite else math.inf

    return min(sorted(values_of(members, "optimizer.lr")), key=cost)


def at_chosen_rate(runs: Iterable[Run]) -> list[Run]:
    """The runs of one group (an activation in one network) at its chosen learning rate, seeds in order."""
    members = list(runs)
    return by_seed(where(members, optimizer__lr=chosen_rate(members))) if members else []


def classes(run: Run) -> int:
    if text := run.environment.get("text"):
        return len(text["vocabulary"])
    return int(option(run, "dataset.classes") or {"cifar100": 100}.get(option(run, "dataset.name"), 10))


def error(run: Run) -> float:
    """Error on the held-out (test) images, in percent; that of guessing for a run that diverged."""
    return 100 * (1 - 1 / classes(run)) if has_diverged(run) else 100 * final(run, "test_error")


def area(run: Run) -> float:
    """Area under the training-loss curve per update (nats): the mean training loss over all updates.

    A line of the records is the mean over the updates since the line before it. A run that diverged has the loss of
    guessing; one without records NaN.
    """
    if has_diverged(run):
        return math.log(classes(run))
    steps, losses = loss_curve(run, "train", "loss")
    weights = np.diff(steps, prepend=0)
    return float((losses * weights).sum() / weights.sum()) if len(steps) else math.nan


def steps_to(run: Run, loss: float) -> float:
    """Updates until the recorded training loss is at most `loss`; NaN if it never is."""
    steps, losses = loss_curve(run, "train", "loss")
    reached = np.flatnonzero(losses <= loss)
    return float(steps[reached[0]]) if reached.size else math.nan


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
    return math.nan if has_diverged(run) else number(run.summary["final"].get(key))


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
