"""What the claims about training share: which runs are compared, by which figures, and how they are drawn.

Two groups of runs are compared each at its own learning rate, chosen by one rule (the smallest mean validation loss
over seeds, `summaries.chosen_rate`) from one grid for all. The figures and their smallest effects of interest are
fixed here, before the runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from bipolar.runs import Run
from experiments.analysis.inference import LOWER, Effect, effect, runs_needed
from experiments.analysis.plots import Curve, base_of, draw, forest_figure, label, layers, legend, panels, rate_panel
from experiments.analysis.summaries import (
    area,
    at_chosen_rate,
    by_seed,
    cell,
    chosen_rate,
    error,
    final,
    has_diverged,
    layer_curve,
    loss_curve,
    percent,
    significant,
    values_of,
    where,
)

AREA = "mean training loss"
ERROR = "held-out error"
SMALLEST_RATIO = 0.05
"""Of the mean training loss (the area under its curve per update): 5 %."""
SMALLEST_POINTS = 1.0
"""Of the held-out error: one percentage point."""
PAIRS = (("brelu", "relu"), ("belu", "elu"))
"""Bipolar activations and their bases."""


def area_effect(name: str, changed: Sequence[Run], base: Sequence[Run], **options: Any) -> Effect:
    """Ratio of mean training losses."""
    options = {"favourable": LOWER, **options}
    return effect(
        name, AREA, [area(run) for run in changed], [area(run) for run in base], smallest=SMALLEST_RATIO, ratio=True,
        **options,
    )  # fmt: skip


def error_effect(name: str, changed: Sequence[Run], base: Sequence[Run], **options: Any) -> Effect:
    """Difference of held-out errors in percentage points."""
    options = {"favourable": LOWER, **options}
    return effect(
        name, ERROR, [error(run) for run in changed], [error(run) for run in base], smallest=SMALLEST_POINTS,
        unit="pp", **options,
    )  # fmt: skip


def against_base(runs: Sequence[Run], suffix: str, makers: Sequence[Callable[..., Effect]]) -> list[Effect]:
    """Each bipolar activation against its base, independent seeds, each at its chosen learning rate."""
    found = []
    for bipolar, base in PAIRS:
        groups = [at_chosen_rate(where(runs, activation__name=name)) for name in (bipolar, base)]
        if all(groups):
            found += [make(f"{label(bipolar)} against {label(base)}{suffix}", *groups) for make in makers]
    return found


def twins(runs: Sequence[Run], suffix: str, makers: Sequence[Callable[..., Effect]]) -> list[Effect]:
    """Each bipolar network against its twin, paired by seed."""
    found = []
    for bipolar, base in PAIRS:
        members = where(runs, activation__name=bipolar)
        seeds = {run.seed for run in where(members, twin=False)} & {run.seed for run in where(members, twin=True)}
        pair = [by_seed(run for run in where(members, twin=twin) if run.seed in seeds) for twin in (False, True)]
        if seeds:
            name = f"{label(bipolar)} against its {label(base)} twin{suffix}"
            found += [make(name, *pair, paired=True) for make in makers]
    return found


def pilot_sentence(pilot: Sequence[Run], planned: int) -> str:
    """What the pilot said about the number of seeds, for the reason of a verdict; empty without a pilot."""
    import numpy as np

    if not pilot:
        return ""
    needs = []
    for name in dict.fromkeys(run.activation for run in pilot):
        members = at_chosen_rate(where(pilot, activation__name=name))
        if len(members) > 2:
            needs.append(runs_needed(np.log([area(run) for run in members]), np.log1p(SMALLEST_RATIO)))
    if not needs:
        return ""
    return (
        f"A pilot with {len({run.seed for run in pilot})} other seeds ({len(pilot)} runs) put the seeds that one "
        f"comparison needs to find a difference of {SMALLEST_RATIO:.0%} in the {AREA} (80 % power, without a "
        f"correction "
        f"for several) roughly at {min(needs)} to {max(needs)}, by activation; {planned} were run."
    )


# -- figures and tables ------------------------------------------------------------------------------------------------


def loss(run: Run) -> Curve:
    return loss_curve(run, "train", "loss")


def valid_error(run: Run) -> Curve:
    steps, values = loss_curve(run, "valid", "error")
    return steps, 100 * values


def chosen(runs: Sequence[Run]) -> list[Run]:
    """The runs of every activation at its chosen learning rate."""
    names = dict.fromkeys(run.activation for run in runs)
    return [run for name in names for run in at_chosen_rate(where(runs, activation__name=name))]


def curves_figure(groups: dict[str, list[Run]]) -> Figure:
    """A row of panels per group: training loss, validation error, and the layers' means and variances at the end."""
    figure, axes = panels(len(groups), 4)
    for row, (title, runs) in zip(axes, groups.items(), strict=True):
        draw(row[0], runs, loss, f"Training loss, {title}", "step (updates)", "cross-entropy (nats)")
        draw(row[1], runs, valid_error, f"Validation error, {title}", "step (updates)", "error (%)")
        ended = [run for run in runs if not has_diverged(run)]
        draw(row[2], ended, layers("mean"), f"Mean at the end, {title}", "layer", "mean activation")
        draw(row[3], ended, layers("variance"), f"Variance at the end, {title}", "layer", "variance", log=True)
    legend(figure, axes[0, 0])
    return figure


def rates_figure(
    groups: dict[str, list[Run]], held_out: Callable[[Run], float] = error, what: str = f"{ERROR} (%)"
) -> Figure:
    """Rate sensitivity: mean training loss and held-out error (or what else is held out) against the learning rate."""
    figure, axes = panels(2, len(groups))
    for column, (title, runs) in enumerate(groups.items()):
        rate_panel(axes[0, column], runs, area, title, f"{AREA} (nats)")
        rate_panel(axes[1, column], runs, held_out, title, what)
    legend(figure, axes[0, 0])
    return figure


def effects_figure(effects: Sequence[Effect]) -> Figure:
    kinds = dict.fromkeys(each.figure for each in effects)
    return forest_figure({kind.capitalize(): [each for each in effects if each.figure == kind] for kind in kinds})


def rows(
    groups: dict[str, list[Run]],
    what: str = ERROR,
    held_out: Callable[[Run], float] = lambda run: error(run) / 100,
    form: Callable[[float], str] = percent,
) -> list[dict[str, str]]:
    """A row per group and activation, at the chosen learning rate, with `held_out` in a column called `what`."""
    made = []
    for title, runs in groups.items():
        for name in dict.fromkeys(run.activation for run in runs):
            members = where(runs, activation__name=name)
            best, rate = at_chosen_rate(members), chosen_rate(members)
            grid = values_of(members, "optimizer.lr")
            at_end = len(grid) > 1 and rate in (min(grid), max(grid))
            made.append(
                {
                    "network": title,
                    "activation": label(name),
                    "runs": f"{len(best)} of {len(members)}",
                    "learning rate": f"{rate:g}" + (" (end of grid)" if at_end else ""),
                    "diverged there": str(sum(map(has_diverged, best))),
                    "diverged, all rates": str(sum(map(has_diverged, members))),
                    f"{AREA} (nats)": cell((area(run) for run in best), significant),
                    "final training loss": cell((final(run, "train_loss") for run in best), significant),
                    what: cell(map(held_out, best), form),
                    "|layer mean|, end": cell((abs_layer_mean(run) for run in best), significant),
                }
            )
    return made


def abs_layer_mean(run: Run) -> float:
    """The mean over layers of |mean activation| after training."""
    means = layer_curve(run, "mean", None)
    return float(abs(means).mean()) if means.size and not has_diverged(run) else float("nan")


def names(bipolar: str) -> tuple[str, str]:
    """The labels of a bipolar activation and of its base."""
    return label(bipolar), label(base_of(bipolar)[0])
