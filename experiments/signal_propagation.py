"""Mean and variance through a random deep network

Claims 1 and 2 of the paper: a bipolar activation moves the mean activation of a layer towards zero, and keeps the mean
and variance from exploding through depth. Nothing is trained: normal inputs go through a random multi-layer perceptron
with He weights (the gain of each activation by quadrature), and mean and variance are taken layer by layer.

For the claims: layer means nearer zero, and variances that change less with depth, for BReLU and BELU than for their
bases. Against: no difference. Note what the symmetry S f(S x) says beforehand: with weights symmetric about zero the
variance of the pre-activations has the same distribution for a base and its bipolar version.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from bipolar.runs import Run
from experiments.plots import draw, label, layers, legend, panels
from experiments.summaries import by_activation, cell, layer_curve, significant
from experiments.tables import Row, mean_size


def figure(runs: list[Run]) -> Figure:
    drawn, axes = panels(1, 3)
    draw(axes[0, 0], runs, layers("mean"), "Mean", "layer", "mean activation")
    draw(axes[0, 1], runs, layers("variance"), "Variance", "layer", "variance of activation", log=True)
    draw(
        axes[0, 2],
        runs,
        layers("pre_variance"),
        "Variance before the activation",
        "layer",
        "variance of pre-activation",
        log=True,
    )
    legend(drawn, axes[0, 0])
    return drawn


def table(runs: list[Run]) -> list[Row]:
    return [
        {
            "activation": label(name),
            "runs": str(len(members)),
            "|layer mean|": cell((mean_size(run, None) for run in members), significant),
            "channel mean norm": cell(
                (float(layer_curve(run, "channel_mean_norm").mean()) for run in members), significant
            ),
            "variance, first layer": cell((float(layer_curve(run, "variance")[0]) for run in members), significant),
            "variance, last layer": cell((float(layer_curve(run, "variance")[-1]) for run in members), significant),
        }
        for name, members in by_activation(runs).items()
    ]
