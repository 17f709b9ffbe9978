"""Bipolar activations instead of BatchNorm

Claim 3 of the paper: with proper initialization (LSUV) a bipolar activation alleviates the need for BatchNorm. The CNN
of claim 4 (max pooling, LSUV) is trained with BatchNorm and without, at every learning rate of one grid.

For the claim: without BatchNorm, BReLU and BELU come nearer than their bases to what the base reaches *with* BatchNorm.
Against: they do not. The fraction of BatchNorm's benefit that a bipolar activation recovers says how much of the need
it takes away: 100 % would be all of it.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from bipolar.runs import Run
from experiments.analysis import training
from experiments.analysis.inference import NOT_TESTED, Effect, Verdict, judged, overall
from experiments.analysis.plots import label
from experiments.analysis.summaries import area, at_chosen_rate, where

RULE = (
    f"Primary are BReLU against ReLU and BELU against ELU without BatchNorm, in the {training.AREA} (smallest effect "
    f"of interest {training.SMALLEST_RATIO:.0%}) and the {training.ERROR} ({training.SMALLEST_POINTS:g} percentage "
    "point). "
    "Not tested here if BatchNorm does not lower the mean training loss of both bases: then there is no need to "
    "alleviate. Without BatchNorm these are the runs of the claim about the CNN, so that the two verdicts are not "
    "independent. Secondary: both against the base with BatchNorm."
)
BOTH = [training.area_effect, training.error_effect]


def effects(runs: list[Run]) -> tuple[tuple[Effect, ...], tuple[Effect, ...]]:
    without = where(runs, network__norm="none")
    primary = training.against_base(without, ", without BatchNorm", BOTH)
    secondary: list[Effect] = []
    for bipolar, base in training.PAIRS:
        normalised = at_chosen_rate(where(runs, activation__name=base, network__norm="batch"))
        for name in (bipolar, base):
            plain = at_chosen_rate(where(without, activation__name=name))
            title = f"{label(name)} without against {label(base)} with BatchNorm"
            secondary += [make(title, plain, normalised) for make in BOTH]
    return judged(primary), judged(secondary)


def recovered(runs: list[Run], bipolar: str, base: str) -> tuple[float, float]:
    """BatchNorm's benefit for the base in log mean training loss, and the fraction of it that the bipolar one has."""
    groups = [
        where(runs, activation__name=name, network__norm=norm)
        for name, norm in ((base, "none"), (base, "batch"), (bipolar, "none"))
    ]
    none, batch, changed = (float(np.log(np.mean([area(run) for run in at_chosen_rate(group)]))) for group in groups)
    return none - batch, (none - changed) / (none - batch)


def verdict(runs: list[Run]) -> Verdict:
    primary, secondary = effects(runs)
    reason = "; ".join(f"{each.name}, {each.figure}: {each.interval()}" for each in primary) + "."
    needed = True
    for bipolar, base in training.PAIRS:
        benefit, fraction = recovered(runs, bipolar, base)
        needed &= benefit > 0
        if benefit > 0:
            reason += (
                f" BatchNorm lowers the {training.AREA} of {label(base)} by {-100 * np.expm1(-benefit):.1f} %; without "
                f"it {label(bipolar)} recovers {100 * fraction:.0f} % of that."
            )
        else:
            reason += (
                f" BatchNorm does not lower the {training.AREA} of {label(base)} here: there is no need to alleviate."
            )
    return Verdict(
        "With LSUV, bipolar activations alleviate the need for BatchNorm.",
        overall(primary) if needed else NOT_TESTED, reason, RULE, primary, secondary,
    )  # fmt: skip


def groups(runs: list[Run]) -> dict[str, list[Run]]:
    found = {
        "without BatchNorm": where(runs, network__norm="none"),
        "with BatchNorm": where(runs, network__norm="batch"),
    }
    return {title: members for title, members in found.items() if members}


def figure(runs: list[Run]) -> Figure:
    """Training loss, validation error, and the mean and variance of each layer's activations at the end of training,
    without and with BatchNorm; every activation at its chosen learning rate. Dashed: base activations; solid: their
    bipolar versions. Lines are means over seeds, bands reach from the smallest to the largest run."""
    return training.curves_figure({title: training.chosen(members) for title, members in groups(runs).items()})


def rates(runs: list[Run]) -> Figure:
    """Mean training loss and held-out error against the learning rate, without and with BatchNorm: means over seeds
    with 95 % intervals; a cross marks a rate at which a run diverged."""
    return training.rates_figure(groups(runs))


def forest(runs: list[Run]) -> Figure:
    """Effects with 95 % intervals: bipolar against base without BatchNorm, and each without against the base with it;
    the grey band is the smallest effect of interest."""
    primary, secondary = effects(runs)
    return training.effects_figure([*primary, *secondary])


more_figures = {"rates": rates, "effects": forest}


def table(runs: list[Run]) -> list[dict[str, str]]:
    """Every activation at the learning rate with its smallest mean validation loss: means over runs ± half the width of
    a 95 % interval (Student's t). |layer mean| is the mean over layers of the size of the mean activation."""
    return training.rows(groups(runs))
