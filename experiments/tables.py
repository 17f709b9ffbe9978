"""Tables that several claims share."""

from __future__ import annotations

import math

import numpy as np

from bipolar.runs import Run
from experiments.plots import label
from experiments.summaries import by_activation, cell, final, layer_curve, percent, significant

Row = dict[str, str]


def mean_size(run: Run, step: int | None) -> float:
    """The mean over the layers of |mean activation of the layer|; NaN where it was not measured.

    The end (step None) of a run that diverged is none.
    """
    means = layer_curve(run, "mean", step)
    if means.size == 0 or (step is None and run.summary["status"] == "diverged"):
        return math.nan
    return float(np.abs(means).mean())


def training_table(runs: list[Run]) -> list[Row]:
    """A row per activation: losses and errors, and how far the layers' means are from zero at the start and end."""
    return [
        {
            "activation": label(name),
            "runs": str(len(members)),
            "diverged": str(sum(run.summary["status"] == "diverged" for run in members)),
            "training loss (nats)": cell((final(run, "train_loss") for run in members), significant),
            "validation error": cell((final(run, "valid_error") for run in members), percent),
            "test error": cell((final(run, "test_error") for run in members), percent),
            "|layer mean|, start": cell((mean_size(run, 0) for run in members), significant),
            "|layer mean|, end": cell((mean_size(run, None) for run in members), significant),
        }
        for name, members in by_activation(runs).items()
    ]
