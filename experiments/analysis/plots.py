"""Drawing: one style for all figures. A base activation is dashed, its bipolar version solid, in one colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation
from numpy.typing import NDArray

from bipolar.runs import Run
from experiments.analysis.inference import Effect
from experiments.analysis.summaries import by_activation, has_diverged, layer_curve, mean_interval, values_of, where

# colours that people with the common colour deficiencies tell apart (Okabe and Ito)
COLOURS = {"relu": "#D55E00", "elu": "#0072B2", "leaky_relu": "#E69F00", "selu": "#009E73", "gelu": "#CC79A7",
           "silu": "#56B4E9", "tanh": "#000000", "identity": "#999999"}  # fmt: skip
LABELS = {"relu": "ReLU", "elu": "ELU", "leaky_relu": "leaky ReLU", "selu": "SELU", "gelu": "GELU", "silu": "SiLU",
          "tanh": "tanh", "identity": "identity"}  # fmt: skip

POOLS = {"max": "max pooling", "average": "average pooling", "stride": "strides", "bipolar_max": "bipolar max pooling"}
"""Ways of halving the resolution, in words."""

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "svg.hashsalt": "bipolar",  # the same figure gives the same file
    "svg.fonttype": "path",
}

MANY_POINTS = 200
"""Of a longer line so many are drawn: in a panel nobody can tell more apart, and they take time and space."""
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Curve = tuple[NDArray[Any], NDArray[Any]]


def base_of(name: str) -> tuple[str, bool]:
    """The base activation of a name, and whether the name is of its bipolar version."""
    if name in COLOURS:
        return name, False
    return (name[1:], True) if name[1:] in COLOURS else (name, False)


def label(name: str) -> str:
    base, is_bipolar = base_of(name)
    return ("B" if is_bipolar else "") + LABELS.get(base, base)


def style(*, layout: bool = True) -> AbstractContextManager[None]:
    """Within it figures look as they should; `layout`: and matplotlib finds the places of axes and legends."""
    return plt.rc_context({**STYLE, "figure.constrained_layout.use": layout})


def panels(rows: int, columns: int) -> tuple[Figure, Any]:
    """Axes in rows and columns; to be called, and drawn on, inside `style()`."""
    return plt.subplots(rows, columns, figsize=(3.4 * columns, 2.8 * rows), squeeze=False)


class Powers(LogFormatterSciNotation):
    """Powers of ten as plain text: as formulas, which matplotlib makes of them, they take much longer to draw."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        if not super().__call__(x, pos):
            return ""  # of minor ticks some have no label
        if x == 0:
            return "0"
        exponent = math.floor(math.log10(abs(x)) + 1e-9)
        power = "10" + str(exponent).translate(SUPERSCRIPTS)
        factor = f"{x / 10.0**exponent:.3g}"
        return self.fix_minus({"1": power, "-1": f"-{power}"}.get(factor, f"{factor}×{power}"))


def plain_powers(axis: Axis) -> None:
    """Label a logarithmic axis in plain text, in the places that matplotlib chooses."""
    axis.set_major_formatter(Powers())
    if isinstance(axis.get_minor_formatter(), LogFormatterSciNotation):
        axis.set_minor_formatter(Powers())


def band(axes: Axes, name: str, curves: list[Curve]) -> None:
    """The mean over runs, and the range from the smallest to the largest of them as a band.

    The runs share their steps as far as they go: one that diverged ends earlier, and the mean with it. Of more than
    `MANY_POINTS` points so many are drawn, evenly spread from the first to the last.
    """
    length = min(len(x) for x, _ in curves)
    drawn = np.linspace(0, length - 1, min(length, MANY_POINTS)).round().astype(int)
    x = curves[0][0][drawn]
    values = np.stack([y[drawn] for _, y in curves])
    base, is_bipolar = base_of(name)
    colour = COLOURS.get(base, "#444444")
    axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.plot(x, values.mean(0), color=colour, linestyle="-" if is_bipolar else "--", linewidth=1.4, label=label(name))


def draw(
    axes: Axes,
    runs: list[Run],
    curve: Callable[[Run], Curve],
    title: str,
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
) -> None:
    """One panel: a band per activation."""
    for name, members in by_activation(runs).items():
        band(axes, name, [curve(run) for run in members])
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if log and any((np.asarray(line.get_ydata()) > 0).any() for line in axes.lines):
        axes.set_yscale("log")
        plain_powers(axes.yaxis)


def rate_panel(axes: Axes, runs: list[Run], figure: Callable[[Run], float], title: str, y_label: str) -> None:
    """A figure of each run against its learning rate: mean over seeds with its 95 % interval.

    A cross marks a rate at which a run diverged.
    """
    for name, members in by_activation(runs).items():
        base, is_bipolar = base_of(name)
        rates = sorted(values_of(members, "optimizer.lr"))
        at = {rate: where(members, optimizer__lr=rate) for rate in rates}
        means, halves = np.array([mean_interval(figure(run) for run in at[rate]) for rate in rates]).T
        axes.errorbar(
            rates, means, np.nan_to_num(halves), color=COLOURS.get(base, "#444444"), label=label(name), capsize=2,
            linestyle="-" if is_bipolar else "--", linewidth=1.4, marker="o", markersize=3,
        )  # fmt: skip
        lost = [rate for rate in rates if any(has_diverged(run) for run in at[rate])]
        top = axes.get_xaxis_transform()
        axes.plot(lost, np.full(len(lost), 0.97), "x", color=COLOURS.get(base, "#444444"), transform=top)
    axes.set_xscale("log")
    plain_powers(axes.xaxis)
    axes.set_title(title)
    axes.set_xlabel("learning rate")
    axes.set_ylabel(y_label)


def forest(axes: Axes, effects: Sequence[Effect], title: str) -> None:
    """Effects of one kind with their 95 % intervals, one a line; grey: within the smallest effect of interest."""
    shown = [each for each in effects if np.isfinite(each.estimate)]
    scale = (lambda value: 100 * np.expm1(value)) if shown and shown[0].unit == "%" else (lambda value: value)
    for place, each in enumerate(shown):
        colour = {"supported": "#009E73", "contradicted": "#D55E00"}.get(each.verdict, "#444444")
        axes.plot([scale(each.low), scale(each.high)], [place, place], color=colour, linewidth=1.6)
        axes.plot(scale(each.estimate), place, "o", color=colour, markersize=4)
    if shown:
        axes.axvspan(scale(-shown[0].smallest), scale(shown[0].smallest), color="#888888", alpha=0.15, linewidth=0)
        axes.set_xlabel(f"{shown[0].figure} ({shown[0].unit or '1'})")
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [each.name for each in shown])
    axes.set_ylim(max(1, len(shown)) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_title(title)


def forest_figure(groups: dict[str, Sequence[Effect]]) -> Figure:
    """A panel of effects per group: circles are estimates, lines intervals, the grey band is the smallest effect of
    interest; green speaks for the claim, orange against it, by the rule."""
    kept = {title: effects for title, effects in groups.items() if effects} or {"no effects": []}
    rows = max(len(effects) for effects in kept.values())
    figure, axes = plt.subplots(1, len(kept), figsize=(5.4 * len(kept), 0.9 + 0.24 * rows), squeeze=False)
    for place, (title, effects) in zip(axes[0], kept.items(), strict=True):
        forest(place, effects, title)
    return figure


def heat_maps(groups: dict[str, list[Run]], key: str, title: str, *, log: bool = False) -> Figure:
    """One panel per group of runs: `key` of each layer over the measured steps, mean over the runs."""
    figure, axes = plt.subplots(1, len(groups), figsize=(2.6 * len(groups) + 0.8, 2.8), squeeze=False, sharey=True)
    tables, steps = {}, {}
    for name, runs in groups.items():
        measured = [sorted({row["step"] for row in run.activations}) for run in runs]
        steps[name] = max(measured, key=len)
        # one that diverged ends early
        whole = [run for run, at in zip(runs, measured, strict=True) if at == steps[name]]
        stacked = [[layer_curve(run, key, step) for step in steps[name]] for run in whole]
        tables[name] = np.nanmean(np.array(stacked, dtype=float), axis=0).T  # [layers, steps]
    everything = np.concatenate([table.ravel() for table in tables.values()])
    everything = everything[np.isfinite(everything) & ((everything > 0) | (not log))]
    low, high = (everything.min(), everything.max()) if everything.size else (0.5, 1.0)
    largest = max(abs(low), abs(high))
    norm = LogNorm(low, high) if log else Normalize(-largest, largest)
    for place, (name, table) in zip(axes[0], tables.items(), strict=True):
        image = place.imshow(
            table, aspect="auto", origin="lower", norm=norm, cmap="viridis" if log else "RdBu_r",
            interpolation="nearest", extent=(-0.5, table.shape[1] - 0.5, 0.5, table.shape[0] + 0.5),
        )  # fmt: skip
        ticks = np.unique(np.linspace(0, table.shape[1] - 1, 4).round().astype(int))
        place.set_xticks(ticks, [str(steps[name][tick]) for tick in ticks])
        place.set_title(name)
        place.set_xlabel("step (updates)")
        place.grid(visible=False)
    axes[0, 0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes[0].tolist(), label=title)
    if log:
        plain_powers(bar.ax.yaxis)
    return figure


def legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def layers(key: str, step: int | None = None) -> Callable[[Run], Curve]:
    """A curve over the layers, numbered from 1."""

    def curve(run: Run) -> Curve:
        values = layer_curve(run, key, step)
        return np.arange(1, len(values) + 1), values

    return curve
