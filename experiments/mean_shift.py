"""Mean shift: one layer, and many

Claim 1 of the paper: a bipolar activation moves the mean activation of a layer towards zero, for zero-centred and for
shifted i.i.d. inputs. Inputs of mean m and standard deviation 1 go through one layer of activations, and through 32
random layers whose weights have the mean 1/width, so that each layer hands its mean on to the next.

For the claim: with m = 0 a layer mean nearer zero than the base activation's; with m ≠ 0 one nearer zero than m.
Against: the reverse. What is expected can be computed (`experiments/analysis/theory.py`): a layer of BReLU has the mean
m/2 whatever the inputs' distribution, since relu(x) - relu(-x) = x; BELU's lies between m/2 and m, 0.76 m near zero. A
base activation is no benchmark for m ≠ 0: ReLU maps inputs of mean -2 to a mean of almost zero by cutting them off."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from bipolar.runs import Run
from experiments.analysis.inference import LOWER, Effect, Verdict, effect, judged, overall
from experiments.analysis.plots import COLOURS, base_of, draw, label, layers, legend, panels, plain_powers
from experiments.analysis.summaries import (
    by_activation,
    by_seed,
    cell,
    in_parts,
    layer_curve,
    option,
    significant,
    values_of,
    where,
)
from experiments.analysis.theory import layer_moments, through_depth
from experiments.analysis.training import PAIRS

SMALLEST = 0.05
"""Smallest effect of interest, in standard deviations of the input."""
RULE = (
    "Primary are, for BReLU and BELU and each m of one layer: at m = 0 the size of the layer mean against the base's; "
    f"at m ≠ 0 its size against |m|, in the same run. Smallest effect of interest: {SMALLEST} standard deviations of "
    "the input."
)


def layer_mean(run: Run) -> float:
    return float(layer_curve(run, "mean")[0])


def verdict(runs: list[Run]) -> Verdict:
    one, deep = in_parts(runs, ""), in_parts(runs, "depth")
    primary, secondary = [], []
    for bipolar, base in PAIRS:
        for m in values_of(one, "dataset.mean"):
            at = by_seed(where(one, activation__name=bipolar, dataset__mean=m))
            sizes = [abs(layer_mean(run)) for run in at]
            of_base = [abs(layer_mean(run)) for run in by_seed(where(one, activation__name=base, dataset__mean=m))]
            against = effect(
                f"{label(bipolar)} against {label(base)}, m = {m:g}", "|layer mean|", sizes, of_base, smallest=SMALLEST,
                favourable=LOWER,
            )  # fmt: skip
            if m == 0:
                primary.append(against)
                continue
            secondary.append(against)
            inputs = [abs(float(layer_curve(run, "pre_mean")[0])) for run in at]
            primary.append(
                effect(
                    f"{label(bipolar)} against its input, m = {m:g}", "|layer mean|", sizes, inputs, smallest=SMALLEST,
                    favourable=LOWER, paired=True, design="same run",
                )
            )  # fmt: skip
    for bipolar, base in PAIRS if deep else ():
        for m in values_of(deep, "dataset.mean"):
            last = [
                [
                    abs(float(layer_curve(run, "mean")[-1]))
                    for run in where(deep, activation__name=name, dataset__mean=m)
                ]
                for name in (bipolar, base)
            ]
            depth = option(deep[0], "network.depth")
            name = f"{label(bipolar)} against {label(base)}, layer {depth}, m = {m:g}"
            secondary.append(effect(name, "|layer mean|", *last, smallest=SMALLEST, favourable=LOWER))
    primary, secondary = list(judged(primary)), list(judged(secondary))
    return Verdict(
        "A bipolar activation moves a layer's mean activation towards zero.",
        overall(primary),
        _reason(one, primary),
        RULE,
        tuple(primary),
        tuple(secondary),
    )


def _reason(one: list[Run], primary: list[Effect]) -> str:
    off = max(abs(layer_mean(run) - layer_moments(run.activation, option(run, "dataset.mean"), 1.0)[0]) for run in one)
    decided = sum(each.verdict == "supported" for each in primary)
    slopes = []
    for bipolar, _ in PAIRS:
        shifted = [run for run in where(one, activation__name=bipolar) if option(run, "dataset.mean") != 0]
        factors = [layer_mean(run) / float(layer_curve(run, "pre_mean")[0]) for run in shifted]
        if factors:
            slopes.append(f"{label(bipolar)} multiplies the mean by {min(factors):.2f} to {max(factors):.2f}")
    return (
        f"{decided} of {len(primary)} comparisons speak for it. {'; '.join(slopes)}. The closed form holds to "
        f"{off:.2g} in all {len(one)} runs of one layer."
    )


def figure(runs: list[Run]) -> Figure:
    """Left: mean of one layer of activations against the mean of its inputs; points are runs, lines the closed form. On
    the dotted line nothing would change. Right: mean activation by layer through random layers whose
    weights have the mean 1/width; bands reach from the smallest to the largest run, thin lines are the closed form for
    infinite width."""
    one, deep = in_parts(runs, ""), in_parts(runs, "depth")
    means = values_of(deep, "dataset.mean")
    drawn, axes = panels(1, 1 + len(means))
    m = np.array(sorted(values_of(one, "dataset.mean")))
    grid = np.linspace(m.min(), m.max(), 81) if m.size > 1 else m
    for name, members in by_activation(one).items():
        base, is_bipolar = base_of(name)
        line = [layer_moments(name, value, 1.0)[0] for value in grid]
        axes[0, 0].plot(
            grid, line, color=COLOURS[base], linestyle="-" if is_bipolar else "--", label=label(name), linewidth=1.2
        )
        axes[0, 0].plot(
            [option(run, "dataset.mean") for run in members], [layer_mean(run) for run in members], "o",
            color=COLOURS[base], markersize=3,
        )  # fmt: skip
    axes[0, 0].plot(grid, grid, ":", color="#444444", linewidth=0.8)
    axes[0, 0].set_title("One layer")
    axes[0, 0].set_xlabel("mean of the inputs")
    axes[0, 0].set_ylabel("mean activation")
    for place, value in zip(axes[0, 1:], means, strict=True):
        members = where(deep, dataset__mean=value)
        draw(place, members, layers("mean"), f"Through depth, inputs of mean {value:g}", "layer", "mean activation")
        for name in values_of(members, "activation.name"):
            depth = option(members[0], "network.depth")
            with np.errstate(over="ignore"):
                line = through_depth(name, value, depth)
            place.plot(np.arange(1, depth + 1), line, color=COLOURS[base_of(name)[0]], linewidth=0.5)
        place.set_yscale("symlog", linthresh=0.1)
        plain_powers(place.yaxis)
    legend(drawn, axes[0, 0])
    return drawn


def table(runs: list[Run]) -> list[dict[str, str]]:
    """Mean of one layer of activations for inputs of mean m and standard deviation 1: mean over runs ± half the width
    of its 95 % interval, and the closed form."""
    rows = []
    one = in_parts(runs, "")
    for m in values_of(one, "dataset.mean"):
        row = {"m": f"{m:g}"}
        for name, members in by_activation(where(one, dataset__mean=m)).items():
            row[label(name)] = cell((layer_mean(run) for run in members), significant)
            row[f"{label(name)}, closed form"] = f"{layer_moments(name, m, 1.0)[0]:.3f}"
        rows.append(row)
    return rows
