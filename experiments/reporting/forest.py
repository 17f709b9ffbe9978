"""One figure for all claims of a profile: their primary effects on one scale."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from experiments.analysis import plots  # chooses matplotlib's backend

import matplotlib.pyplot as plt  # isort: skip
from matplotlib.figure import Figure

from experiments.analysis.inference import CONTRADICTED, SUPPORTED, Effect, Verdict

CAPTION = (
    "Primary effects of each claim with 95 % intervals, in units of the smallest effect of interest. To the right: "
    "what the claim says. Within the band an effect is too small to matter. Of a claim with many primary effects the "
    "weakest and the strongest are shown."
)
COLOURS = {SUPPORTED: "#0072B2", CONTRADICTED: "#D55E00"}
MARKERS = {SUPPORTED: "o", CONTRADICTED: "s"}
OTHER = "#777777"
MANY = 6
LINEAR = 3
"""Up to so many units the axis is linear, then logarithmic: an effect may be a hundred times what matters."""


def claims_figure(claims: Sequence[tuple[str, Verdict]]) -> Figure | None:
    """A row per primary effect, grouped by claim, with its interval; None where no claim has an effect to show.

    Args:
        claims: title and verdict of each.
    """
    shown = [(title, [each for each in verdict.primary if is_drawn(each)]) for title, verdict in claims]
    shown = [(title, members) for title, members in shown if members]
    if not shown:
        return None
    lines: list[tuple[str, Effect | None]] = []
    for title, members in shown:
        lines.append((title, None))
        which = [""] * len(members)
        if len(members) > MANY:
            ranked = sorted(members, key=lambda each: _units(each, each.estimate))
            which = [f" (weakest of {len(members)})", f" (strongest of {len(members)})"]
            members = [ranked[0], ranked[-1]]
        texts = [f"{each.name}, {each.figure}{note}" for each, note in zip(members, which, strict=True)]
        lines += [
            (textwrap.shorten(text, 90, placeholder=" …"), each) for text, each in zip(texts, members, strict=True)
        ]
    with plots.style():
        figure, axes = plt.subplots(figsize=(6.4, 1.0 + 0.4 * len(lines)))
        axes.axvspan(-1, 1, color="#EBEBEB", linewidth=0)
        axes.axvline(0, color="#777777", linewidth=0.8)
        for row, (text, each) in enumerate(lines):
            # names stand above the intervals and not beside them: so the figure suits narrow screens
            weight = "normal" if each is not None else "bold"
            axes.text(0, row - 0.42, text, fontweight=weight, va="center", transform=axes.get_yaxis_transform())
            if each is not None:
                _draw(axes, row, each)
        axes.set_yticks([])
        axes.set_ylim(len(lines) - 0.5, -0.9)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        _scale(axes)
        axes.set_xlabel("effect / smallest effect of interest\n← against the claim     for the claim →")
    return figure


def is_drawn(each: Effect) -> bool:
    return math.isfinite(each.estimate) and each.smallest > 0


def _units(each: Effect, value: float) -> float:
    return each.favourable * value / each.smallest


def _draw(axes: Any, row: int, each: Effect) -> None:
    colour = COLOURS.get(each.verdict, OTHER)
    ends = sorted((_units(each, each.low), _units(each, each.high)))
    axes.plot(ends, [row, row], color=colour, linewidth=2, solid_capstyle="butt")
    axes.plot(_units(each, each.estimate), row, marker=MARKERS.get(each.verdict, "D"), color=colour, markersize=6)


def _scale(axes: Any) -> None:
    far = max(abs(end) for end in axes.get_xlim())
    if far > 2 * LINEAR:
        axes.set_xscale("symlog", linthresh=LINEAR, linscale=1.5)
        decades = [10.0**power for power in range(1, math.ceil(math.log10(far)) + 1) if 10.0**power <= far]
        ticks = [-value for value in reversed(decades)] + [-LINEAR, -1, 0, 1, LINEAR, *decades]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(plt.NullLocator())
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -1.5), max(high, 1.5))
