"""A plain convolutional network without BatchNorm

Claim 4 of the paper: in a convolutional network without BatchNorm a bipolar activation makes the training error drop
faster and the test error lower. A plain CNN is trained with each activation, with several ways of halving the
resolution and at every learning rate of one grid.

For the claim: a lower mean training loss (the area under its curve) and a lower held-out error of BReLU and BELU than
of their bases, each at its chosen learning rate. Against: no difference, or the reverse. Of all parts of this network
only max pooling breaks the symmetry S f(S x): with strides or average pooling, or with max pooling that knows the signs
(`bipolar_max`, S maxpool(S x)), the bipolar network is its base network in disguise, so that only chance can tell the
two apart. Where the profile has them, paired twins show what max pooling does with all else equal.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from bipolar.runs import Run
from experiments.analysis import training
from experiments.analysis.inference import Effect, Verdict, judged, overall
from experiments.analysis.plots import POOLS, heat_maps, label
from experiments.analysis.summaries import at_chosen_rate, cell, in_parts, steps_to, values_of, where

TARGET = 1.9
"""Training loss (nats) whose first time below is counted; fixed beforehand, on the pilot."""
RULE = (
    f"Primary are BReLU against ReLU and BELU against ELU in the {training.AREA} (smallest effect of interest "
    f"{training.SMALLEST_RATIO:.0%}) and the {training.ERROR} ({training.SMALLEST_POINTS:g} percentage point), in the "
    "network with max pooling, independent seeds, each activation at its chosen learning rate."
)
BOTH = [training.area_effect, training.error_effect]


def pools(runs: list[Run], *parts: str) -> dict[str, list[Run]]:
    """Runs of some parts by the way in which the resolution is halved."""
    members = in_parts(runs, *parts)
    return {POOLS[pool]: where(members, network__pool=pool) for pool in values_of(members, "network.pool")}


def effects(runs: list[Run]) -> tuple[tuple[Effect, ...], tuple[Effect, ...]]:
    groups = pools(runs, "", "pools")
    primary = training.against_base(groups["max pooling"], ", max pooling", BOTH)
    secondary: list[Effect] = []
    for title, members in groups.items():
        if title != "max pooling":
            secondary += training.against_base(members, f", {title}", BOTH)
    secondary += training.against_base(in_parts(runs, "he"), ", max pooling, He", BOTH)
    for bipolar, base in training.PAIRS:  # sign-aware max pooling behind a base activation is max pooling
        aware = at_chosen_rate(where(in_parts(runs, "bipolar_max"), activation__name=bipolar))
        plain = at_chosen_rate(where(groups["max pooling"], activation__name=base))
        if aware:
            name = f"{label(bipolar)}, bipolar max pooling, against {label(base)}, max pooling"
            secondary += [make(name, aware, plain) for make in BOTH]
    for title, members in pools(runs, "twins").items():
        secondary += training.twins(members, f", {title}", BOTH)
    return judged(primary), judged(secondary)


def verdict(runs: list[Run]) -> Verdict:
    primary, secondary = effects(runs)
    paired = [each for each in secondary if each.design == "paired twins" and each.figure == training.AREA]
    symmetric = [each for each in paired if "max pooling" not in each.name]
    broken = [each for each in paired if "max pooling" in each.name]
    exact = sum(each.is_exactly_zero for each in symmetric)
    reason = "; ".join(f"{each.name}, {each.figure}: {each.interval()}" for each in primary) + ". "
    if symmetric and broken:
        reason += f"Twins without max pooling differ by exactly 0 in {exact} of {len(symmetric)} comparisons"
        reason += "; with it: " + ", ".join(f"{each.name.split(',')[0]} {each.interval()}" for each in broken) + ". "
    reason += training.pilot_sentence(in_parts(runs, "pilot"), len({run.seed for run in in_parts(runs, "")}))
    return Verdict(
        "Without BatchNorm a CNN's training error drops faster, and its test error is lower, with bipolar activations.",
        overall(primary), reason, RULE, primary, secondary,
    )  # fmt: skip


def figure(runs: list[Run]) -> Figure:
    """Training loss, validation error, and the mean and variance of each layer's activations at the end of training, by
    the way in which the resolution is halved; every activation at its chosen learning rate. Dashed: base activations;
    solid: their bipolar versions. Lines are means over seeds, bands reach from the smallest to the largest run."""
    return training.curves_figure(
        {title: training.chosen(members) for title, members in pools(runs, "", "pools").items()}
    )


def rates(runs: list[Run]) -> Figure:
    """Mean training loss and held-out error against the learning rate, by the way in which the resolution is halved:
    means over seeds with 95 % intervals; a cross marks a rate at which a run diverged."""
    return training.rates_figure(pools(runs, "", "pools", "bipolar_max"))


def forest(runs: list[Run]) -> Figure:
    """Effects of the bipolar activation with 95 % intervals, independent seeds and paired twins; the grey band is the
    smallest effect of interest."""
    primary, secondary = effects(runs)
    return training.effects_figure([*primary, *secondary])


def _max_pooling(runs: list[Run]) -> dict[str, list[Run]]:
    members = training.chosen(pools(runs, "")["max pooling"])
    return {label(name): where(members, activation__name=name) for name in values_of(members, "activation.name")}


def means(runs: list[Run]) -> Figure:
    """Mean activation of every layer over training, in the network with max pooling, at each activation's chosen
    learning rate; mean over seeds. White is zero."""
    return heat_maps(_max_pooling(runs), "mean", "mean activation")


def variances(runs: list[Run]) -> Figure:
    """Variance of every layer's activations over training, in the network with max pooling, at each activation's chosen
    learning rate; mean over seeds, colours on a logarithmic scale."""
    return heat_maps(_max_pooling(runs), "variance", "variance of activation", log=True)


more_figures = {"rates": rates, "effects": forest, "means": means, "variances": variances}


def table(runs: list[Run]) -> list[dict[str, str]]:
    """Every activation at the learning rate with its smallest mean validation loss: means over runs ± half the width of
    a 95 % interval (Student's t). |layer mean| is the mean over layers of the size of the mean activation; the last
    column counts updates to a training loss fixed before the runs."""
    groups = pools(runs, "", "pools", "bipolar_max")
    if in_parts(runs, "he"):
        groups["max pooling, He"] = in_parts(runs, "he")
    rows = training.rows(groups)
    counts = [
        [steps_to(run, TARGET) for run in at_chosen_rate(where(members, activation__name=name))]
        for members in groups.values()
        for name in values_of(members, "activation.name")
    ]
    for row, steps in zip(rows, counts, strict=True):
        row[f"updates to {TARGET:g} nats"] = cell(steps, lambda value: f"{value:.0f}") if steps else "–"
    return rows
