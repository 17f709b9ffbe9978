"""Deep vanilla recurrent networks

Claim 5 of the paper: deep vanilla RNNs learn better with a bipolar activation. Stacked recurrent layers without gates,
in residual blocks as in the authors' code, predict the next character of a text, at several depths and at every
learning rate of one grid. As in that code they start from its variant of LSUV; tanh, whose output cannot have the
variance of 1 that it asks for, from the textbook's.

For the claim: a lower mean training loss (the area under its curve) of BReLU and BELU than of their bases, each at its
chosen learning rate. Against: no difference, or the reverse. The symmetry S f(S x) says what can make a difference. All
layers, states and streams of this network have one pattern of signs, and the embedding is random, so that a bipolar
network *is* its base network: twins agree to the last bit, and from weights that are symmetric about zero (He's) only
chance can tell the two activations apart. What is left is the authors' LSUV: it subtracts the mean of a layer's
activations before it scales their variance to 1, and only the base activation has one. So it starts base networks from
larger weights, and that is the one thing that the claim can come from.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from bipolar.runs import Run
from experiments.analysis import training
from experiments.analysis.inference import LOWER, Effect, Verdict, effect, judged, overall
from experiments.analysis.plots import Curve, draw, heat_maps, label, layers, legend, panels
from experiments.analysis.summaries import (
    at_chosen_rate,
    cell,
    classes,
    final,
    has_diverged,
    in_parts,
    loss_curve,
    significant,
    values_of,
    where,
)

SMALLEST_BITS = 0.05
MARGIN = 0.1
"""A run has learned something of a text if it predicts it so many bits per character better than the frequencies of
single characters do."""
BITS = "held-out bits per character"
RULE = (
    f"Primary are BReLU against ReLU and BELU against ELU in the {training.AREA} at every depth, from the authors' "
    f"LSUV, independent seeds, each at its chosen learning rate. Smallest effect of interest: "
    f"{training.SMALLEST_RATIO:.0%}. Secondary: {BITS} (smallest effect of interest {SMALLEST_BITS} bits), bipolar "
    "activations against tanh, other initial weights, paired twins."
)
INITS = {"he": "He", "orthogonal": "orthogonal", "identity": "identity (IRNN)"}


def bits(run: Run) -> float:
    """Bits per character of the test part; those of guessing for a run that diverged."""
    return math.log2(classes(run)) if has_diverged(run) else final(run, "test_bits_per_character")


def learns(run: Run) -> bool:
    return bits(run) < run.environment["text"]["entropy"] - MARGIN


def bits_effect(name: str, changed: list[Run], base: list[Run], **options: bool) -> Effect:
    return effect(
        name, BITS, [bits(run) for run in changed], [bits(run) for run in base], smallest=SMALLEST_BITS,
        favourable=LOWER, unit="bits", **options,
    )  # fmt: skip


BOTH = [training.area_effect, bits_effect]


def depths(runs: list[Run], *parts: str) -> dict[str, list[Run]]:
    """Runs of some parts by depth."""
    members = in_parts(runs, *parts)
    found = sorted(values_of(members, "network.layers"))
    return {f"{depth} layers": where(members, network__layers=depth) for depth in found}


def by_init(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs from weights that look at no data, by initialization and depth."""
    found = {}
    for title, members in depths(runs, "he", "recurrent").items():
        for init in values_of(members, "init.name"):
            found[f"{title}, {INITS.get(init, init)}"] = where(members, init__name=init)
    return found


def effects(runs: list[Run]) -> tuple[tuple[Effect, ...], tuple[Effect, ...]]:
    primary: list[Effect] = []
    secondary: list[Effect] = []
    tanh = depths(runs, "tanh")
    for title, members in depths(runs, "").items():
        primary += training.against_base(members, f", {title}", [training.area_effect])
        secondary += training.against_base(members, f", {title}", [bits_effect])
        for bipolar, _ in training.PAIRS if title in tanh else ():
            rows = [at_chosen_rate(where(members, activation__name=bipolar)), at_chosen_rate(tanh[title])]
            secondary += [make(f"{label(bipolar)} against tanh, {title}", *rows) for make in BOTH]
    for title, members in by_init(runs).items():
        secondary += training.against_base(members, f", {title}", BOTH)
    for title, members in depths(runs, "text8").items():
        secondary += training.against_base(members, f", Text8, {title}", BOTH)
    for title, members in depths(runs, "twins").items():
        secondary += training.twins(members, f", {title}", BOTH)
    return judged(primary), judged(secondary)


def verdict(runs: list[Run]) -> Verdict:
    primary, secondary = effects(runs)
    paired = [each for each in secondary if each.design == "paired twins"]
    reason = "; ".join(f"{each.name}, {each.figure}: {each.interval()}" for each in primary) + ". "
    if paired:
        exact = sum(each.is_exactly_zero for each in paired)
        reason += f"Twins differ by exactly 0 in {exact} of {len(paired)} comparisons. "
    he = [each for each in secondary if each.name.endswith("He") and each.figure == training.AREA]
    if he:
        reason += "From He's weights: " + "; ".join(f"{each.name}: {each.interval()}" for each in he) + ". "
    reason += _what_learns(runs)
    reason += training.pilot_sentence(in_parts(runs, "pilot"), len({run.seed for run in in_parts(runs, "")}))
    return Verdict(
        "Deep vanilla RNNs learn better with bipolar activations.", overall(primary), reason, RULE, primary, secondary
    )


def _what_learns(runs: list[Run]) -> str:
    """At which depths each activation learns, in a sentence."""
    failed = []
    found = depths(runs, "", "tanh")
    for title, members in found.items():
        for name in values_of(members, "activation.name"):
            of = training.chosen(where(members, activation__name=name))
            lost = sum(not learns(run) for run in of)
            if lost:
                failed.append(f"{label(name)} at {title} in {lost} of {len(of)} runs")
    start = f"Better than the frequencies of characters by {MARGIN:g} bits at its chosen rate is"
    if not failed:
        return f"{start} every activation at every depth ({', '.join(found)}) with every seed. "
    return f"{start} every activation in every run but: {'; '.join(failed)}. "


def train_bits(run: Run) -> Curve:
    steps, values = loss_curve(run, "train", "loss")
    return steps, values / math.log(2)


def figure(runs: list[Run]) -> Figure:
    """Training loss in bits per character, and of each layer at the end of training the size of the mean activation,
    the variance, and the norm of the weights' gradient in the last measured update, by depth; every activation at its
    chosen learning rate. Dashed: base activations; solid: their bipolar versions. Lines are means over seeds, bands
    reach from the smallest to the largest run."""
    found = depths(runs, "", "tanh")
    drawn, axes = panels(len(found), 4)
    for row, (title, members) in zip(axes, found.items(), strict=True):
        chosen = training.chosen(members)
        draw(row[0], chosen, train_bits, f"Training loss, {title}", "step (updates)", "bits per character", log=True)
        ended = [run for run in chosen if not has_diverged(run)]
        mean = layers("mean")
        size = lambda run, mean=mean: (mean(run)[0], np.abs(mean(run)[1]))
        draw(row[1], ended, size, f"|Mean| at the end, {title}", "layer", "|mean activation|", log=True)
        draw(row[2], ended, layers("variance"), f"Variance at the end, {title}", "layer", "variance", log=True)
        draw(row[3], ended, last_gradient, f"Gradient, {title}", "layer", "norm of the weights' gradient", log=True)
    legend(drawn, axes[0, 0])
    return drawn


def last_gradient(run: Run) -> Curve:
    """Of every layer, at the last measured update (what is measured behind the last update has no gradient)."""
    step = max(row["step"] for row in run.activations if row.get("gradient_norm") is not None)
    return layers("gradient_norm", step)(run)


def rates(runs: list[Run]) -> Figure:
    """Mean training loss and held-out bits per character against the learning rate, by depth: means over seeds with
    95 % intervals; a cross marks a rate at which a run diverged."""
    return training.rates_figure(depths(runs, "", "tanh"), bits, BITS)


def forest(runs: list[Run]) -> Figure:
    """Effects of the bipolar activation with 95 % intervals, independent seeds and paired twins; the grey band is the
    smallest effect of interest."""
    primary, secondary = effects(runs)
    return training.effects_figure([*primary, *secondary])


def _by_layer(runs: list[Run], key: str, title: str, *, log: bool) -> Figure:
    found = depths(runs, "", "tanh")
    members = training.chosen(found[list(found)[-1]])
    groups = {label(name): where(members, activation__name=name) for name in values_of(members, "activation.name")}
    return heat_maps(groups, key, title, log=log)


def means(runs: list[Run]) -> Figure:
    """Mean activation of every layer over training, over all times of a sequence, in the deepest network, at each
    activation's chosen learning rate; mean over seeds. White is zero."""
    return _by_layer(runs, "mean", "mean activation", log=False)


def variances(runs: list[Run]) -> Figure:
    """Variance of every layer's activations over training, over all times of a sequence, in the deepest network, at
    each activation's chosen learning rate; mean over seeds, colours on a logarithmic scale."""
    return _by_layer(runs, "variance", "variance of activation", log=True)


more_figures = {"rates": rates, "effects": forest, "means": means, "variances": variances}


def table(runs: list[Run]) -> list[dict[str, str]]:
    """Every activation at the learning rate with its smallest mean validation loss: means over runs ± half the width of
    a 95 % interval (Student's t). |layer mean| is the mean over layers of the size of the mean activation; a run learns
    if it predicts the text clearly better than the frequencies of single characters do."""
    of_text8 = {f"Text8, {title}": members for title, members in depths(runs, "text8").items()}
    groups = {**depths(runs, "", "tanh"), **by_init(runs), **of_text8}
    rows = training.rows(groups, BITS, bits, significant)
    chosen = [
        at_chosen_rate(where(members, activation__name=name))
        for members in groups.values()
        for name in values_of(members, "activation.name")
    ]
    for row, of in zip(rows, chosen, strict=True):
        row["learn"] = f"{sum(map(learns, of))} of {len(of)}"
        row["gradient, first / last layer"] = cell((_gradient_ratio(run) for run in of), significant)
    return rows


def _gradient_ratio(run: Run) -> float:
    if has_diverged(run):
        return math.nan
    norms = last_gradient(run)[1]
    return float(norms[0] / norms[-1])
