"""Deep multi-layer perceptrons without normalization

The paper says that bipolar activations alleviate the need for normalization in deep networks. Deep multi-layer
perceptrons without any are trained from He's weights, at several depths.

For the claim: a lower mean training loss (the area under its curve) of BReLU and BELU than of their bases, each at its
chosen learning rate. Against: no difference, or the reverse. The symmetry S f(S x) predicts no difference but by
chance: this network is a chain of linear maps, whose weights start symmetric about zero. Where the profile has them,
paired twins test that prediction to the last bit."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from bipolar.runs import Run
from experiments.analysis import training
from experiments.analysis.inference import Effect, Verdict, judged, overall
from experiments.analysis.plots import heat_maps, label
from experiments.analysis.summaries import in_parts, values_of, where

RULE = (
    f"Primary are BReLU against ReLU and BELU against ELU in the {training.AREA} at every depth, independent seeds, "
    f"each at its chosen learning rate. Smallest effect of interest: {training.SMALLEST_RATIO:.0%}."
)


def depths(runs: list[Run], *parts: str) -> dict[str, list[Run]]:
    """Runs of some parts by depth."""
    members = in_parts(runs, *parts)
    return {f"{depth} layers": where(members, network__depth=depth) for depth in values_of(members, "network.depth")}


def effects(runs: list[Run]) -> tuple[tuple[Effect, ...], tuple[Effect, ...]]:
    primary: list[Effect] = []
    secondary: list[Effect] = []
    for title, members in depths(runs, "").items():
        primary += training.against_base(members, f", {title}", [training.area_effect])
        secondary += training.against_base(members, f", {title}", [training.error_effect])
    for title, members in depths(runs, "twins").items():
        secondary += training.twins(members, f", {title}", [training.area_effect])
    return judged(primary), judged(secondary)


def verdict(runs: list[Run]) -> Verdict:
    primary, secondary = effects(runs)
    paired = [each for each in secondary if each.design == "paired twins"]
    exact = sum(each.is_exactly_zero for each in paired)
    tested = [each for each in primary if math.isfinite(each.estimate)]
    largest = max(tested, key=lambda each: abs(each.estimate), default=None)
    reason = (
        (f"The largest difference, {training.AREA}: {largest.name}, {largest.interval()}. " if largest else "")
        + (f"Twins differ by exactly 0 in {exact} of {len(paired)} comparisons. " if paired else "")
        + training.pilot_sentence(in_parts(runs, "pilot"), len({run.seed for run in in_parts(runs, "")}))
    )
    return Verdict(
        "Deep networks without normalization train better with bipolar activations.",
        overall(primary), reason, RULE, primary, secondary,
    )  # fmt: skip


def figure(runs: list[Run]) -> Figure:
    """Training loss, validation error, and the mean and variance of each layer's activations at the end of training, by
    depth; every activation at its chosen learning rate. Dashed: base activations; solid: their bipolar versions. Lines
    are means over seeds, bands reach from the smallest to the largest run."""
    return training.curves_figure({title: training.chosen(members) for title, members in depths(runs, "").items()})


def rates(runs: list[Run]) -> Figure:
    """Mean training loss and held-out error against the learning rate, by depth: means over seeds with 95 % intervals;
    a cross marks a rate at which a run diverged."""
    return training.rates_figure(depths(runs, ""))


def forest(runs: list[Run]) -> Figure:
    """Effects of the bipolar activation with 95 % intervals, independent seeds and paired twins; the grey band is the
    smallest effect of interest."""
    primary, secondary = effects(runs)
    return training.effects_figure([*primary, *secondary])


def _by_layer(runs: list[Run], key: str, title: str, *, log: bool) -> Figure:
    found = depths(runs, "")
    members = training.chosen(found[list(found)[len(found) // 2]])
    groups = {label(name): where(members, activation__name=name) for name in values_of(members, "activation.name")}
    return heat_maps(groups, key, title, log=log)


def means(runs: list[Run]) -> Figure:
    """Mean activation of every layer over training, at a middle depth and each activation's chosen learning rate; mean
    over seeds. White is zero."""
    return _by_layer(runs, "mean", "mean activation", log=False)


def variances(runs: list[Run]) -> Figure:
    """Variance of every layer's activations over training, at a middle depth and each activation's chosen learning
    rate; mean over seeds, colours on a logarithmic scale."""
    return _by_layer(runs, "variance", "variance of activation", log=True)


more_figures = {"rates": rates, "effects": forest, "means": means, "variances": variances}


def table(runs: list[Run]) -> list[dict[str, str]]:
    """Every activation at the learning rate with its smallest mean validation loss: means over runs ± half the width of
    a 95 % interval (Student's t). |layer mean| is the mean over layers of the size of the mean activation."""
    return training.rows(depths(runs, ""))
