"""Residual networks

The authors' ResNets replace every ReLU by BReLU, with BatchNorm and zero-padded shortcuts (type A), the first half of
the features being flipped. They report a lower test error on CIFAR-10, and a higher one on CIFAR-100. Here the same
design is trained and, where the profile has it, once more without BatchNorm, where a weighted sum keeps the variance of
the stream.

For the claim: a lower held-out error of BReLU than of ReLU, each at its chosen learning rate. Against: no difference,
or the reverse. The symmetry S f(S x) is broken in one kind of place: where the width changes, the shortcut joins two
patterns of halves that do not match. (The paper's own interleaved pattern would match, and the two networks would be
one.)"""

from __future__ import annotations

from matplotlib.figure import Figure

from bipolar.runs import Run
from experiments.analysis import training
from experiments.analysis.inference import Effect, Verdict, judged, overall
from experiments.analysis.summaries import option, values_of, where

RULE = (
    f"Primary is BReLU against ReLU with BatchNorm in the {training.ERROR}, at every depth (CIFAR-100, of which the "
    "claim does not speak, is secondary), independent seeds, each at its chosen learning rate. "
    f"Smallest effect of interest: {training.SMALLEST_POINTS:g} percentage point."
)


def networks(runs: list[Run]) -> dict[str, list[Run]]:
    found = {}
    for data in values_of(runs, "dataset.name"):
        for depth in values_of(runs, "network.depth"):
            for norm in values_of(runs, "network.norm"):
                members = where(runs, dataset__name=data, network__depth=depth, network__norm=norm)
                of_data = f", {data}" if len(values_of(runs, "dataset.name")) > 1 else ""
                title = f"ResNet-{depth}, {'BatchNorm' if norm == 'batch' else 'no normalization'}{of_data}"
                if members:
                    found[title] = members
    return found


def effects(runs: list[Run]) -> tuple[tuple[Effect, ...], tuple[Effect, ...]]:
    primary: list[Effect] = []
    secondary: list[Effect] = []
    for title, members in networks(runs).items():
        first = members[0]
        is_primary = option(first, "network.norm") == "batch" and option(first, "dataset.name") != "cifar100"
        (primary if is_primary else secondary).extend(
            training.against_base(members, f", {title}", [training.error_effect])
        )
        secondary += training.against_base(members, f", {title}", [training.area_effect])
    return judged(primary), judged(secondary)


def verdict(runs: list[Run]) -> Verdict:
    primary, secondary = effects(runs)
    reason = "; ".join(f"{each.name}, {each.figure}: {each.interval()}" for each in (*primary, *secondary)) + "."
    return Verdict(
        "In a residual network with BatchNorm the test error is lower with BReLU than with ReLU.",
        overall(primary), reason, RULE, primary, secondary,
    )  # fmt: skip


def figure(runs: list[Run]) -> Figure:
    """Training loss, validation error, and the mean and variance of each layer's activations at the end of training,
    with BatchNorm and without; every activation at its chosen learning rate. Dashed: ReLU; solid: BReLU. Lines are
    means over seeds, bands reach from the smallest to the largest run."""
    return training.curves_figure({title: training.chosen(members) for title, members in networks(runs).items()})


def rates(runs: list[Run]) -> Figure:
    """Mean training loss and held-out error against the learning rate: means over seeds with 95 % intervals; a cross
    marks a rate at which a run diverged."""
    return training.rates_figure(networks(runs))


more_figures = {"rates": rates}


def table(runs: list[Run]) -> list[dict[str, str]]:
    """Every activation at the learning rate with its smallest mean validation loss: means over runs ± half the width of
    a 95 % interval (Student's t). |layer mean| is the mean over layers of the size of the mean activation."""
    return training.rows(networks(runs))
