"""A widely copied misreading: flipping rows of the batch

A reader reported that in simple experiments the loss falls more slowly with BReLU. The implementation in question flips
the odd rows of the *batch* instead of the odd features. It is trained here beside BReLU and ReLU, on the same batches,
at every learning rate of one grid.

For the report: a higher mean training loss of the batch-axis version than of ReLU and BReLU. Against: no difference, or
a lower one. Why it should be so: an odd row goes through the network h = -relu(-(W h + b)). But for pooling, that is
the base network applied to the negated image with negated biases, and its output negated; max pooling turns into min
pooling there. One set of weights has to serve both functions, and which of the two an image meets depends on its place
in the batch; at evaluation too."""

from __future__ import annotations

from matplotlib.figure import Figure

from bipolar.runs import Run
from experiments.analysis import training
from experiments.analysis.inference import HIGHER, Effect, Verdict, judged, overall
from experiments.analysis.plots import label
from experiments.analysis.summaries import at_chosen_rate, where

RULE = (
    f"Primary are the batch-axis version against ReLU and against BReLU in the {training.AREA}, independent seeds, "
    f"each at its chosen learning rate. Smallest effect of interest: {training.SMALLEST_RATIO:.0%}."
)


def effects(runs: list[Run]) -> tuple[tuple[Effect, ...], tuple[Effect, ...]]:
    rows = at_chosen_rate(where(runs, activation__name="batch_axis_relu"))
    groups = {name: at_chosen_rate(where(runs, activation__name=name)) for name in ("relu", "brelu")}
    compared = {f"batch axis against {label(name)}": group for name, group in groups.items()}
    primary = [training.area_effect(name, rows, group, favourable=HIGHER) for name, group in compared.items()]
    secondary = [training.error_effect(name, rows, group, favourable=HIGHER) for name, group in compared.items()]
    return judged(primary), judged(secondary)


def verdict(runs: list[Run]) -> Verdict:
    primary, secondary = effects(runs)
    reason = "; ".join(f"{each.name}, {each.figure}: {each.interval()}" for each in (*primary, *secondary)) + "."
    return Verdict(
        "With the batch-axis implementation the loss falls more slowly (a reader's report).",
        overall(primary), reason, RULE, primary, secondary,
    )  # fmt: skip


def figure(runs: list[Run]) -> Figure:
    """Training loss, validation error, and the mean and variance of each layer's activations at the end of training,
    for ReLU, BReLU and the version that flips rows of the batch, each at its chosen learning rate. Lines are means over
    seeds, bands reach from the smallest to the largest run."""
    return training.curves_figure({"max pooling": training.chosen(runs)})


def rates(runs: list[Run]) -> Figure:
    """Mean training loss and held-out error against the learning rate: means over seeds with 95 % intervals; a cross
    marks a rate at which a run diverged."""
    return training.rates_figure({"max pooling": runs})


more_figures = {"rates": rates}


def table(runs: list[Run]) -> list[dict[str, str]]:
    """Every activation at the learning rate with its smallest mean validation loss: means over runs ± half the width of
    a 95 % interval (Student's t). |layer mean| is the mean over layers of the size of the mean activation."""
    return training.rows({"max pooling": runs})
