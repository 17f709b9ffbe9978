"""The sign-flip symmetry: bipolar networks and their base twins

Ours, not the paper's: wherever nothing breaks the symmetry S f(S x), a bipolar network *is* its base network with other
signs. A bipolar network and the base network that starts from its sign-flipped weights are trained side by side on the
same batches. In a symmetric network their losses must agree to the last bit, at every step. What breaks the symmetry
must show, and how much of a difference it makes is the size of what a bipolar activation can change at all.

For the claim: all recorded losses of twins are equal in every symmetric network, and differ in every other. Against:
one network in which it is otherwise. What is symmetric was computed beforehand (`bipolar/symmetry.py`), not read off
the runs.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from omegaconf import OmegaConf

from bipolar.runs import Run
from experiments.analysis import training
from experiments.analysis.inference import CONTRADICTED, NOT_TESTED, SUPPORTED, Effect, Verdict, judged
from experiments.analysis.plots import COLOURS, POOLS, base_of, label, panels, plain_powers
from experiments.analysis.summaries import by_seed, loss_curve, option, significant, where

RULE = (
    "Supported if the largest difference between the recorded training losses of twins is exactly 0 in every symmetric "
    "network and above 0 for every seed in every other; contradicted otherwise."
)
Twins = list[tuple[Run, Run]]


def network(run: Run) -> str:
    """The network of a run in words."""
    pattern = option(run, "activation.pattern")
    if option(run, "network.name") == "resnet":
        return f"shortcut {option(run, 'network.shortcut')}, {pattern}"
    norm = {"none": "", "batch": "BatchNorm", "group": "GroupNorm", "layer": "LayerNorm"}[option(run, "network.norm")]
    return norm or POOLS[option(run, "network.pool")]


def is_symmetric(run: Run) -> bool:
    """Whether the network of this run has the symmetry, from its configuration alone."""
    return _is_symmetric(_but_for_twin(run))


@cache
def _is_symmetric(config: str) -> bool:
    import torch

    from bipolar import build
    from bipolar.symmetry import explain

    cfg = OmegaConf.create({**json.loads(config), "twin": False})
    shape = build.SHAPES.get(cfg.dataset.name, [3, 32, 32])
    with torch.device("meta"):
        return all(row.keeps for row in explain(build.network(cfg, shape, 10)))


def _but_for_twin(run: Run) -> str:
    """The configuration as text, without what tells twins apart."""
    return json.dumps({**run.options, "twin": None}, sort_keys=True)


def pairs(runs: list[Run]) -> dict[tuple[str, str], Twins]:
    """Twins, which have one configuration but for `twin`, by network and activation."""
    key = _but_for_twin
    partners = {key(run): run for run in where(runs, twin=True)}
    found: dict[tuple[str, str], Twins] = {}
    for run in by_seed(where(runs, twin=False)):
        if key(run) in partners:
            found.setdefault((network(run), run.activation), []).append((run, partners[key(run)]))
    order = list(dict.fromkeys((network(run), run.activation) for run in where(runs, twin=False)))
    return {key: found[key] for key in order if key in found}


def gap(twins: tuple[Run, Run]) -> NDArray[Any]:
    """The size of the difference between the training losses, line by line; infinite where one has a figure alone."""
    a, b = (loss_curve(run, "train", "loss")[1] for run in twins)
    if len(a) != len(b) or not len(a):
        return np.full(max(len(a), len(b), 1), np.inf)
    both_lost = np.isnan(a) & np.isnan(b)
    return np.where(both_lost, 0.0, np.nan_to_num(np.abs(a - b), nan=np.inf))


def effects(runs: list[Run]) -> tuple[tuple[Effect, ...], tuple[Effect, ...]]:
    """Those in symmetric networks, and those in others."""
    kept, broken = [], []
    for (title, activation), twins in pairs(runs).items():
        bipolar, base = training.names(activation)
        name = f"{bipolar} against its {base} twin, {title}"
        made = training.area_effect(name, *map(list, zip(*twins, strict=True)), paired=True)
        (kept if is_symmetric(twins[0][0]) else broken).append(made)
    return judged(kept), judged(broken)


def verdict(runs: list[Run]) -> Verdict:
    kept, broken, wrong = [], [], []
    for (title, activation), twins in pairs(runs).items():
        largest = [float(gap(pair).max()) for pair in twins]
        symmetric = is_symmetric(twins[0][0])
        (kept if symmetric else broken).append((title, largest))
        if not all((value == 0) == symmetric for value in largest):
            wrong.append(f"{label(activation)}, {title}")
    if not (kept and broken):
        return Verdict(_CLAIM, NOT_TESTED, "Symmetric and other networks are both needed.", RULE, *effects(runs))
    listed = lambda groups: ", ".join(dict.fromkeys(title for title, _ in groups))
    count = lambda groups: sum(len(largest) for _, largest in groups)
    reason = (
        f"{count(kept)} pairs of twins in symmetric networks ({listed(kept)}): the largest difference between two "
        f"losses is {max(max(largest) for _, largest in kept):g}. {count(broken)} pairs in others ({listed(broken)}): "
        f"the largest difference is at least {min(min(largest) for _, largest in broken):.2g} nats in each."
    )
    if wrong:
        reason += f" Not as predicted: {'; '.join(wrong)}."
    return Verdict(_CLAIM, CONTRADICTED if wrong else SUPPORTED, reason, RULE, *effects(runs))


_CLAIM = "In a symmetric network a bipolar activation changes nothing that training can see (ours)."


def figure(runs: list[Run]) -> Figure:
    """Size of the difference between the training losses of a bipolar network and its base twin over training, by
    network: mean over seeds. The axis is logarithmic but for its lowest part, which reaches down to 0; the titles say
    where the difference is exactly 0."""
    found = pairs(runs)
    titles = list(dict.fromkeys(title for title, _ in found))
    columns = 4
    drawn, axes = panels(-(-len(titles) // columns), columns)
    for place in axes.flat[len(titles) :]:
        place.set_visible(False)
    for title, place in zip(titles, axes.flat, strict=False):
        largest = 0.0
        for (other, activation), twins in found.items():
            if other != title:
                continue
            steps = loss_curve(twins[0][0], "train", "loss")[0]
            gaps = [gap(pair) for pair in twins]
            mean = np.mean([each[: min(map(len, gaps))] for each in gaps], axis=0)
            largest = max(largest, float(mean.max()))
            place.plot(
                steps[: len(mean)], mean, color=COLOURS[base_of(activation)[0]], marker=".", label=label(activation)
            )
        place.set_yscale("symlog", linthresh=1e-9)
        plain_powers(place.yaxis)
        place.set_ylim(-2e-10, 10)
        place.set_xlabel("step (updates)")
        place.set_ylabel("|difference of loss| (nats)")
        place.set_title(title if largest else f"{title}: exactly 0")
        if largest:
            place.legend()
    return drawn


def forest(runs: list[Run]) -> Figure:
    """Effect of the bipolar activation on the mean training loss, twins paired by seed, with 95 % intervals: what each
    breaking part makes of it, with the spread of initial weights removed. The grey band is the smallest effect of
    interest."""
    return training.effects_figure([each for group in effects(runs) for each in group])


more_figures = {"effects": forest}


def table(runs: list[Run]) -> list[dict[str, str]]:
    """By network and activation: whether the symmetry is kept, by computation from the network alone; the largest
    difference between the recorded training losses of twins over all seeds; and the effect on the mean training
    loss."""
    found = {each.name: each for group in effects(runs) for each in group}
    rows = []
    for (title, activation), twins in pairs(runs).items():
        bipolar, base = training.names(activation)
        each = found[f"{bipolar} against its {base} twin, {title}"]
        largest = max(float(gap(pair).max()) for pair in twins)
        rows.append(
            {
                "network": title,
                "activation": bipolar,
                "symmetric": "yes" if is_symmetric(twins[0][0]) else "no",
                "pairs": str(len(twins)),
                "largest difference of losses (nats)": significant(largest),
                "effect on the mean training loss": each.interval(),
            }
        )
    return rows
