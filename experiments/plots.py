"""Drawing: one style for all figures. A base activation is dashed, its bipolar version solid, in one colour."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bipolar.runs import Run
from experiments.summaries import by_activation, layer_curve, loss_curve

# colours that people with the common colour deficiencies tell apart (Okabe and Ito)
COLOURS = {"relu": "#D55E00", "elu": "#0072B2", "leaky_relu": "#E69F00", "selu": "#009E73", "gelu": "#CC79A7",
           "silu": "#56B4E9", "tanh": "#000000", "identity": "#999999"}  # fmt: skip
LABELS = {"relu": "ReLU", "elu": "ELU", "leaky_relu": "leaky ReLU", "selu": "SELU", "gelu": "GELU", "silu": "SiLU",
          "tanh": "tanh", "identity": "identity"}  # fmt: skip

STYLE = {
    "figure.constrained_layout.use": True,
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

Curve = tuple[NDArray[Any], NDArray[Any]]


def base_of(name: str) -> tuple[str, bool]:
    """The base activation of a name, and whether the name is of its bipolar version."""
    if name in COLOURS:
        return name, False
    return (name[1:], True) if name[1:] in COLOURS else (name, False)


def label(name: str) -> str:
    base, is_bipolar = base_of(name)
    return ("B" if is_bipolar else "") + LABELS.get(base, base)


def style() -> AbstractContextManager[None]:
    return plt.rc_context(STYLE)


def panels(rows: int, columns: int) -> tuple[Figure, Any]:
    """Axes in rows and columns; to be called, and drawn on, inside `style()`."""
    return plt.subplots(rows, columns, figsize=(3.4 * columns, 2.8 * rows), squeeze=False)


def band(axes: Axes, name: str, curves: list[Curve]) -> None:
    """The mean over runs, and the range from the smallest to the largest of them as a band.

    The runs share their steps as far as they go: one that diverged ends earlier, and the mean with it.
    """
    length = min(len(x) for x, _ in curves)
    x = curves[0][0][:length]
    values = np.stack([y[:length] for _, y in curves])
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


def legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def layers(key: str, step: int | None = None) -> Callable[[Run], Curve]:
    """A curve over the layers, numbered from 1."""

    def curve(run: Run) -> Curve:
        values = layer_curve(run, key, step)
        return np.arange(1, len(values) + 1), values

    return curve


def training_figure(runs: list[Run]) -> Figure:
    """Loss and error over training; mean and variance of the activations by layer, at the start and at the end."""
    figure, axes = panels(2, 3)
    steps = "step (updates)"
    loss = lambda run: loss_curve(run, "train", "loss")
    error = lambda run: tuple(np.multiply(part, scale) for part, scale in
                              zip(loss_curve(run, "valid", "error"), (1, 100), strict=True))  # fmt: skip
    draw(axes[0, 0], runs, loss, "Training loss", steps, "cross-entropy (nats)", log=True)
    draw(axes[1, 0], runs, error, "Validation error", steps, "error (%)", log=True)
    for column, (when, step) in enumerate((("start", 0), ("end", None)), start=1):
        draw(axes[0, column], runs, layers("mean", step), f"Mean, {when} of training", "layer", "mean activation")
        draw(
            axes[1, column], runs, layers("variance", step), f"Variance, {when} of training", "layer",
            "variance of activation", log=True,
        )  # fmt: skip
    legend(figure, axes[0, 0])
    return figure
