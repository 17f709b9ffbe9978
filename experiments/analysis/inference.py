"""From figures of runs to effects with intervals and a verdict: one rule for all claims, fixed before the runs.

An *effect* is the mean difference of one figure between two groups of runs (of its logarithm, where a ratio is meant).
Its 95 % interval is Welch's for independent seeds and Student's for paired twins, by scipy. (Both sides use the same
list of seeds, and with it the same order of batches; Welch's test makes no use of that, which can only cost it power.)
Where learning rates are compared, every group of runs is taken at its own chosen rate: fewest diverged runs, then the
smallest mean validation loss. A run that diverged at the chosen rate counts with the loss and error of guessing.

The effects by which a claim is decided are its *primary* ones; each names, before the runs, the smallest effect of
interest and the direction that speaks for the claim. For each, in this order:

1. `no difference detected (smaller than X)`, X being the smallest effect of interest, if an equivalence test (two
   one-sided t tests, TOST) finds the effect to be within it: p < 0.05 after Holm's correction over the primary effects;
2. `supported` or `contradicted`, by its direction, if the t test finds it: p < 0.05 after the same correction;
3. `no difference detected (smaller than X)` else, X being the smallest margin for which the equivalence test would have
   p < 0.05 (uncorrected). The question is then open, and the verdict says so.

A claim is `supported` if all of its primary effects are, `contradicted` if one is contradicted and none supported (it
says how many), and otherwise it is `no difference detected`, with the largest X and the number of effects that say
otherwise. It is `not tested here` if one of its primary effects has fewer than two figures on a side.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUPPORTED = "supported"
CONTRADICTED = "contradicted"
NO_DIFFERENCE = "no difference detected"
NOT_TESTED = "not tested here"
VERDICTS = (SUPPORTED, CONTRADICTED, NO_DIFFERENCE, NOT_TESTED)

ALPHA = 0.05
LOWER, HIGHER = -1, 1
"""Which direction of an effect speaks for the claim."""


@dataclass(frozen=True)
class Effect:
    """The difference of one figure between two groups of runs."""

    name: str
    """What is compared, e.g. `BReLU against ReLU, max pooling`."""
    figure: str
    """Of what, e.g. `mean training loss`."""
    unit: str
    """`%` for a ratio (estimates are differences of logarithms); else the unit of the estimates."""
    estimate: float
    low: float
    high: float
    p: float
    smallest: float
    """The smallest effect of interest, of the same kind as the estimate."""
    equivalence_p: float
    """Of the test that the effect is within plus or minus `smallest`."""
    bound: float
    """The smallest margin within which that test would find it at 5 %."""
    favourable: int
    """`LOWER` or `HIGHER`: the direction that speaks for the claim."""
    n: tuple[int, int]
    design: str
    """`independent seeds`, `paired twins`, or what else the groups are."""
    adjusted_p: float = math.nan
    adjusted_equivalence_p: float = math.nan
    verdict: str = NOT_TESTED

    def shown(self, value: float, *, signed: bool = True) -> str:
        """A value of the effect's kind, as text with its unit."""
        sign = "+" if signed else ""
        if self.unit == "%":
            return f"{100 * math.expm1(value):{sign}.1f} %"
        return f"{value:{sign}.3g} {self.unit}".strip()

    @property
    def is_exactly_zero(self) -> bool:
        """Whether nothing differs in any pair: equal losses, to the last bit."""
        return self.estimate == self.low == self.high == 0 and self.design == "paired twins"

    def interval(self) -> str:
        """The estimate with its 95 % interval, as text."""
        if self.is_exactly_zero:
            return "exactly 0"
        return f"{self.shown(self.estimate)} [{self.shown(self.low)}, {self.shown(self.high)}]"


@dataclass(frozen=True)
class Verdict:
    """What the runs say about a claim."""

    claim: str
    """The claim, in one sentence."""
    verdict: str
    """`supported`, `contradicted`, `no difference detected (smaller than X)` or `not tested here`."""
    reason: str
    """Why, in one or a few sentences with the numbers."""
    rule: str
    """What decides this claim, beyond the rule that all claims share."""
    primary: tuple[Effect, ...] = ()
    secondary: tuple[Effect, ...] = ()

    def record(self) -> dict[str, Any]:
        return asdict(self)


def _finite(values: Sequence[float]) -> NDArray[Any]:
    array = np.asarray(values, dtype=float)
    return array[np.isfinite(array)]


def effect(
    name: str,
    figure: str,
    changed: Sequence[float],
    base: Sequence[float],
    *,
    smallest: float,
    favourable: int,
    unit: str = "",
    ratio: bool = False,
    paired: bool = False,
    design: str | None = None,
) -> Effect:
    """The effect of `changed` (bipolar, say) against `base`.

    Args:
        changed, base: one figure per run; pairs in the same order where `paired`. What is not finite (a run that
            diverged) is left out, with its partner where paired; `n` says how many are left.
        smallest: the smallest effect of interest; a ratio such as 0.05 (for 5 %) where `ratio`.
        favourable: `LOWER` or `HIGHER`.
        unit: of a difference.
        ratio: compare logarithms of positive figures and report a ratio in %.
        paired: the runs are twins; else they are independent.
        design: how the groups belong together, where it is neither.
    """
    from scipy import stats
    from statsmodels.stats import weightstats

    if ratio:
        with np.errstate(divide="ignore", invalid="ignore"):
            changed, base = np.log(np.asarray(changed, float)), np.log(np.asarray(base, float))  # type: ignore[assignment]
        unit, smallest = "%", math.log1p(smallest)
    if paired:
        both = np.isfinite(np.asarray(changed, float)) & np.isfinite(np.asarray(base, float))
        a, b = np.asarray(changed, float)[both], np.asarray(base, float)[both]
    else:
        a, b = _finite(changed), _finite(base)
    made = Effect(
        name=name, figure=figure, unit=unit, estimate=math.nan, low=math.nan, high=math.nan, p=math.nan,
        smallest=smallest, equivalence_p=math.nan, bound=math.nan, favourable=favourable, n=(len(a), len(b)),
        design=design or ("paired twins" if paired else "independent seeds"),
    )  # fmt: skip
    if min(len(a), len(b)) < 2:
        return made
    if (np.ptp(a - b) if paired else max(np.ptp(a), np.ptp(b))) == 0:  # nothing varies: the difference is exact
        exact = float(a[0] - b[0])
        return replace(
            made, estimate=exact, low=exact, high=exact, p=float(exact == 0), bound=abs(exact),
            equivalence_p=float(abs(exact) >= smallest),
        )  # fmt: skip
    with warnings.catch_warnings():
        # of lost precision where one side does not vary at all, as counts that end at the same ceiling
        warnings.simplefilter("ignore", RuntimeWarning)
        if paired:
            test = stats.ttest_rel(a, b)
            equivalence_p = weightstats.ttost_paired(a, b, -smallest, smallest)[0]
        else:
            test = stats.ttest_ind(a, b, equal_var=False)
            equivalence_p = weightstats.ttost_ind(a, b, -smallest, smallest, usevar="unequal")[0]
    wide, narrow = test.confidence_interval(1 - ALPHA), test.confidence_interval(1 - 2 * ALPHA)
    return replace(
        made,
        estimate=float(a.mean() - b.mean()),
        low=float(wide.low),
        high=float(wide.high),
        p=float(test.pvalue),
        equivalence_p=float(equivalence_p),
        bound=float(max(abs(narrow.low), abs(narrow.high))),
    )


def holm(values: Sequence[float]) -> NDArray[np.float64]:
    """p values after Holm's correction, in their order.

    As `statsmodels.stats.multitest.multipletests` has them to the last bit; that one collects garbage at every call,
    which takes a quarter of a second where hundreds of runs are in memory.
    """
    p = np.asarray(values, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def judged(effects: Sequence[Effect]) -> tuple[Effect, ...]:
    """The effects with p values corrected over all of them (Holm) and a verdict each."""
    tested = [index for index, each in enumerate(effects) if math.isfinite(each.p)]
    if not tested:
        return tuple(effects)
    adjusted = holm([effects[index].p for index in tested])
    equivalent = holm([effects[index].equivalence_p for index in tested])
    result = list(effects)
    for index, p, equivalence_p in zip(tested, adjusted, equivalent, strict=True):
        each = replace(effects[index], adjusted_p=float(p), adjusted_equivalence_p=float(equivalence_p))
        if equivalence_p < ALPHA:
            verdict = f"{NO_DIFFERENCE} (smaller than {each.shown(each.smallest, signed=False)})"
        elif p < ALPHA:
            verdict = SUPPORTED if each.estimate * each.favourable > 0 else CONTRADICTED
        else:
            verdict = f"{NO_DIFFERENCE} (smaller than {each.shown(each.bound, signed=False)})"
        result[index] = replace(each, verdict=verdict)
    return tuple(result)


def is_open(each: Effect) -> bool:
    """Whether no difference was detected, and none as large as the smallest effect of interest excluded."""
    return each.verdict.startswith(NO_DIFFERENCE) and not each.adjusted_equivalence_p < ALPHA


def overall(effects: Sequence[Effect]) -> str:
    """The verdict on a claim from those on its primary effects: see the rule at the top of this file."""
    verdicts = [each.verdict for each in effects]
    if not verdicts or NOT_TESTED in verdicts:
        return NOT_TESTED
    if all(verdict == SUPPORTED for verdict in verdicts):
        return SUPPORTED
    if CONTRADICTED in verdicts and SUPPORTED not in verdicts:
        count = verdicts.count(CONTRADICTED)
        return CONTRADICTED + (f" in {count} of {len(effects)} comparisons" if count < len(effects) else "")
    counted = [f"{word} in {verdicts.count(word)}" for word in (SUPPORTED, CONTRADICTED) if word in verdicts]
    without = [each for each in effects if each.verdict.startswith(NO_DIFFERENCE)]
    if not without:
        return f"{NO_DIFFERENCE} (in one direction: {' and '.join(counted)} of {len(effects)} comparisons)"
    margin = lambda each: each.bound if is_open(each) else each.smallest
    widest = max(without, key=margin)
    text = f"{NO_DIFFERENCE} (smaller than {widest.shown(margin(widest), signed=False)})"
    if counted:
        text += f" in {len(without)} of {len(effects)} comparisons, {', '.join(counted)}"
    return text + ("; open" if any(is_open(each) for each in without) else "")


def runs_needed(sample: Sequence[float], smallest: float, power: float = 0.8) -> int:
    """Seeds per group with which a Welch test finds an effect of `smallest`, given a pilot's spread between seeds."""
    from statsmodels.stats.power import TTestIndPower

    spread = float(_finite(sample).std(ddof=1))
    if not spread > 0:
        return 2
    analysis = TTestIndPower()
    # NaN: an effect so many standard deviations large that the power cannot be computed; it is 1 then
    lacks_power = lambda n: analysis.power(smallest / spread, n, ALPHA) < power
    return next(n for n in itertools.count(2) if not lacks_power(n))
