"""Stability: mean and variance through many random layers

Claim 2 of the paper: bipolar ReLU and ELU are less prone to an exploding mean and variance through depth. Normal inputs
go through hundreds of random layers without training, with weights of mean zero and of mean 1/width, from He's weights
(with the gain of each activation) and, where the profile has them, from layer-sequential unit variance (LSUV) as in the
textbook and as in the authors' code; SELU, made for this purpose, stands beside them.

For the claim: the second moment of a bipolar network's activations stays between 0.001 and 1,000 through more layers
than its base network's. Against: fewer, or as many. The symmetry S f(S x) says beforehand where a difference can come
from: with weights symmetric about zero, a bipolar network and its base have the same distribution of second moments, so
that the number of layers cannot differ but by chance (the authors' LSUV excepted: see docs/symmetry.md). With a mean in
the weights they differ: a base network's mean feeds on itself, a bipolar one's cancels."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from bipolar.runs import Run
from experiments.analysis.inference import HIGHER, Effect, Verdict, effect, judged, overall
from experiments.analysis.plots import draw, label, layers, legend, panels
from experiments.analysis.summaries import by_activation, cell, in_parts, layer_curve, significant, values_of, where
from experiments.analysis.training import PAIRS

LIMITS = (1e-3, 1e3)
SMALLEST = 50.0
"""Smallest effect of interest, in layers."""
RULE = (
    f"The figure is the number of layers through which mean² + variance stays between {LIMITS[0]:g} and {LIMITS[1]:g}. "
    "Primary are BReLU against ReLU and BELU against ELU from He's weights, with weights of mean zero and of mean "
    f"1/width. Smallest effect of interest: {SMALLEST:g} layers. Counts end at the depth of the network: where both "
    f"sides "
    "reach it, no more than that is known."
)


def second_moment(run: Run) -> np.ndarray:
    """mean² + variance of every layer; infinite where it overflowed."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = layer_curve(run, "mean") ** 2 + layer_curve(run, "variance")
    return np.where(np.isfinite(values), values, np.inf)


def stable_layers(run: Run) -> float:
    """Layers before the second moment first leaves `LIMITS`; all of them if it never does."""
    values = second_moment(run)
    outside = np.flatnonzero((values < LIMITS[0]) | (values > LIMITS[1]))
    return float(outside[0] if outside.size else values.size)


def fate(run: Run) -> str:
    last = second_moment(run)[-1]
    return "explodes" if last > LIMITS[1] else "vanishes" if last < LIMITS[0] else "settles"


def groups(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by initialization and mean of the weights."""
    found = {}
    for mean in sorted(values_of(runs, "init.weight_mean")):
        weights = "weights of mean 0" if mean == 0 else "weights of mean 1/width"
        found[f"He, {weights}"] = where(in_parts(runs, ""), init__weight_mean=mean)
        for variant in values_of(in_parts(runs, "lsuv"), "init.variant"):
            found[f"LSUV ({variant}), {weights}"] = where(
                in_parts(runs, "lsuv"), init__variant=variant, init__weight_mean=mean
            )
    return {title: members for title, members in found.items() if members}


def verdict(runs: list[Run]) -> Verdict:
    primary: list[Effect] = []
    secondary: list[Effect] = []
    for title, members in groups(runs).items():
        for bipolar, base in PAIRS:
            counts = [[stable_layers(run) for run in where(members, activation__name=name)] for name in (bipolar, base)]
            found = effect(
                f"{label(bipolar)} against {label(base)}: {title}", "layers within the limits", *counts,
                smallest=SMALLEST, favourable=HIGHER, unit="layers",
            )  # fmt: skip
            (primary if title.startswith("He") else secondary).append(found)
    primary, secondary = list(judged(primary)), list(judged(secondary))
    supported = [each.name for each in primary if each.verdict == "supported"]
    fates = []
    for title, members in groups(runs).items():
        if title.startswith("He"):
            each = {
                label(name): f"{np.median([stable_layers(run) for run in of]):.0f}"
                for name, of in by_activation(members).items()
            }
            fates.append(f"{title}: " + ", ".join(f"{name} {count}" for name, count in each.items()))
    reason = (
        f"It holds for {'; '.join(supported)}. " if supported else ""
    ) + f"Median number of layers within the limits, of {len(second_moment(runs[0]))}: {'. '.join(fates)}."
    if in_parts(runs, "pilot"):
        seeds = {part: len({run.seed for run in in_parts(runs, part)}) for part in ("pilot", "")}
        reason += (
            f" The first {seeds['pilot']} seeds were meant to decide; they were seen to leave a comparison open and "
            f"became the pilot, which has no say here. The {seeds['']} fresh seeds that decide are as many as time "
            "allowed, not the outcome of a calculation of power."
        )
    return Verdict(
        "Bipolar ReLU and ELU are less prone to an exploding mean and variance through depth.",
        overall(primary), reason, RULE, tuple(primary), tuple(secondary),
    )  # fmt: skip


def figure(runs: list[Run]) -> Figure:
    """Size of the mean activation (top) and variance (bottom) of every layer of an untrained network,
    by initialization. Dashed: base activations; solid: their bipolar versions. Lines are means over seeds, bands reach
    from the smallest to the largest run; a line ends where a run overflowed. Of more than 200 layers 200 are drawn,
    evenly spread from the first to the last; tables and verdict are made of all."""
    found = groups(runs)
    drawn, axes = panels(2, len(found))
    for column, (title, members) in enumerate(found.items()):
        mean = layers("mean")
        size = lambda run, mean=mean: (mean(run)[0], np.abs(mean(run)[1]))
        name, _, weights = title.partition(", ")
        draw(axes[0, column], members, size, f"|Mean|: {name},\n{weights}", "layer", "|mean activation|", log=True)
        draw(
            axes[1, column], members, layers("variance"), f"Variance: {name},\n{weights}", "layer", "variance", log=True
        )
    legend(drawn, axes[0, 0])
    return drawn


def table(runs: list[Run]) -> list[dict[str, str]]:
    """By initialization and activation: through how many layers the second moment stays within the limits (mean over
    runs ± half the width of its 95 % interval), and how many runs explode, vanish or settle by the last layer."""
    rows = []
    for title, members in groups(runs).items():
        for name, of in by_activation(members).items():
            fates = [fate(run) for run in of]
            last = [float(second_moment(run)[-1]) for run in of]
            finite = [value for value in last if 0 < value < math.inf]
            rows.append(
                {
                    "initialization": title,
                    "activation": label(name),
                    "runs": str(len(of)),
                    "layers within the limits": cell((stable_layers(run) for run in of), significant),
                    "second moment, last layer (geometric mean)": f"{np.exp(np.mean(np.log(finite))):.2g}"
                    if finite
                    else "–",
                    **{end: str(fates.count(end)) for end in ("explodes", "settles", "vanishes")},
                }
            )
    return rows
