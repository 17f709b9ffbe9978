"""Effects, intervals and verdicts: against scipy and statsmodels, and by the rule that claims are decided with."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

from experiments.analysis.inference import (
    CONTRADICTED,
    HIGHER,
    LOWER,
    NO_DIFFERENCE,
    NOT_TESTED,
    SUPPORTED,
    Effect,
    effect,
    holm,
    is_open,
    judged,
    overall,
    runs_needed,
)

A, B = [1.0, 1.4, 0.9, 1.2, 1.3], [2.0, 1.8, 2.3, 2.6, 1.7]


def made(changed=A, base=B, **options) -> Effect:
    return effect("a against b", "loss", changed, base, **{"smallest": 0.2, "favourable": LOWER, **options})


def shifted(by: float, spread: float = 0.01, **options) -> Effect:
    """A made effect of a given size, known as well as `spread` says."""
    noise = spread * np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    return made(list(by + noise), list(noise[::-1]), **options)


def test_independent_groups_are_compared_as_welch_does():
    found, test = made(), stats.ttest_ind(A, B, equal_var=False)
    assert found.estimate == pytest.approx(np.mean(A) - np.mean(B))
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert found.p == pytest.approx(test.pvalue)
    assert found.n == (5, 5)
    assert found.design == "independent seeds"


def test_twins_are_compared_in_pairs():
    found, test = made(paired=True), stats.ttest_rel(A, B)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert found.p == pytest.approx(test.pvalue)
    assert found.design == "paired twins"


@pytest.mark.parametrize("paired", [False, True])
def test_bound_is_the_smallest_margin_that_the_equivalence_test_accepts(paired):
    found = made(paired=paired)
    test = ttost_paired if paired else lambda a, b, low, high: ttost_ind(a, b, low, high, usevar="unequal")
    a, b = np.array(A), np.array(B)
    assert test(a, b, -found.bound, found.bound)[0] == pytest.approx(0.05)
    assert made(paired=paired, smallest=found.bound * 1.01).equivalence_p < 0.05
    assert made(paired=paired, smallest=found.bound * 0.99).equivalence_p > 0.05


def test_ratio_compares_logarithms_and_reads_as_percent():
    found = made([0.9, 0.9001], [1.0, 1.0001], ratio=True, smallest=0.05)
    assert found.estimate == pytest.approx(math.log(0.9), abs=1e-4)
    assert found.smallest == pytest.approx(math.log(1.05))
    assert found.shown(found.estimate) == "-10.0 %"
    assert made(unit="pp").shown(-1.234) == "-1.23 pp"


def test_what_is_not_finite_is_left_out_and_counted():
    nan = math.nan
    assert made([*A, nan], [nan, math.inf, *B]).n == (5, 5)
    assert made([*A, nan], [nan, math.inf, *B]).p == made().p
    found = made([*A, nan], [nan, *B], paired=True)  # a partner goes with its twin
    assert found.n == (4, 4)
    assert found.estimate == pytest.approx(np.mean(np.array(A[1:]) - np.array(B[:4])))


@pytest.mark.parametrize(("changed", "base"), [([], []), ([1.0], [2.0]), ([1.0, 2.0], [3.0]), ([math.nan] * 3, B)])
def test_too_few_runs_are_no_test(changed, base):
    (found,) = judged([made(changed, base)])
    assert found.verdict == NOT_TESTED
    assert overall([found]) == NOT_TESTED


def test_equal_twins_differ_by_exactly_zero():
    (found,) = judged([made(A, A, paired=True)])
    assert found.is_exactly_zero
    assert found.interval() == "exactly 0"
    assert found.verdict == f"{NO_DIFFERENCE} (smaller than 0.2)"
    assert not made(A, [*A[:4], np.nextafter(A[4], 2)], paired=True).is_exactly_zero
    assert not made([1.0] * 3, [1.0] * 3).is_exactly_zero  # counts that end at the same ceiling, say


@settings(deadline=None, max_examples=10)  # statsmodels collects garbage at every call
@given(st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.01, 0.04, 1.0]), min_size=1, max_size=12))
def test_correction_for_several_is_holms(values):
    assert holm(values).tolist() == multipletests(values, method="holm")[1].tolist()


@pytest.mark.parametrize(
    ("by", "favourable", "verdict"),
    [
        (-1.0, LOWER, SUPPORTED), (1.0, LOWER, CONTRADICTED), (1.0, HIGHER, SUPPORTED), (-1.0, HIGHER, CONTRADICTED),
        # found without doubt, and too small to matter
        (-0.1, LOWER, f"{NO_DIFFERENCE} (smaller than 0.2)"),
        (0.0, HIGHER, f"{NO_DIFFERENCE} (smaller than 0.2)"),
    ],
)  # fmt: skip
def test_verdict_on_an_effect(by, favourable, verdict):
    (found,) = judged([shifted(by, favourable=favourable)])
    assert found.verdict == verdict
    assert overall([found]) == verdict
    assert not is_open(found)


def test_what_the_runs_cannot_tell_is_open_and_names_the_margin():
    (found,) = judged([shifted(0.1, spread=1.0)])
    assert found.verdict == f"{NO_DIFFERENCE} (smaller than {found.bound:.3g})"
    assert overall([found]) == f"{found.verdict}; open"
    assert found.bound > found.smallest
    assert is_open(found)


def test_corrections_are_holms_over_all_effects():
    effects = [made(), made(list(np.array(A) + 0.8)), made(list(np.array(A) + 0.5))]
    order = np.argsort([each.p for each in effects])
    found = judged(effects)
    smallest = found[order[0]]
    assert smallest.adjusted_p == pytest.approx(3 * smallest.p)
    assert found[order[1]].adjusted_p == pytest.approx(max(2 * found[order[1]].p, smallest.adjusted_p))
    alone = judged([effects[order[0]]])[0]
    assert alone.adjusted_p == pytest.approx(alone.p)


def test_effects_that_were_not_tested_take_no_part_in_the_correction():
    assert judged([made(), made([], [])])[0].adjusted_p == judged([made()])[0].adjusted_p


def verdicts(*names: str) -> list[Effect]:
    effects = {"s": shifted(-1.0), "c": shifted(1.0), "n": shifted(0.0), "o": shifted(0.1, spread=1.0)}
    return [judged([effects[name]])[0] for name in names]


@pytest.mark.parametrize(
    ("names", "verdict"),
    [
        ("ss", SUPPORTED),
        ("cn", f"{CONTRADICTED} in 1 of 2 comparisons"),
        ("cc", CONTRADICTED),
        ("nn", f"{NO_DIFFERENCE} (smaller than 0.2)"),
        ("ssn", f"{NO_DIFFERENCE} (smaller than 0.2) in 1 of 3 comparisons, supported in 2"),
        ("scn", f"{NO_DIFFERENCE} (smaller than 0.2) in 1 of 3 comparisons, supported in 1, contradicted in 1"),
        ("sc", f"{NO_DIFFERENCE} (in one direction: supported in 1 and contradicted in 1 of 2 comparisons)"),
        ("", NOT_TESTED),
    ],
)
def test_verdict_on_a_claim_says_what_its_effects_say(names, verdict):
    assert overall(verdicts(*names)) == verdict


def test_claim_with_an_open_effect_names_the_widest_margin_and_is_open():
    (is_undecided,) = verdicts("o")
    assert overall(verdicts("n", "o")) == f"{NO_DIFFERENCE} (smaller than {is_undecided.bound:.3g}); open"


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 0.3), st.floats(0.02, 0.5))
def test_runs_needed_are_just_enough(spread, smallest):
    sample = [1 - spread, 1.0, 1 + spread]  # standard deviation: spread
    needed = runs_needed(sample, smallest)
    power = lambda n: TTestIndPower().power(smallest / spread, n, 0.05)
    assert not power(needed) < 0.8  # NaN for effects of tens of standard deviations
    assert needed == 2 or power(needed - 1) < 0.8


def test_without_a_difference_one_is_rarely_found():
    chance = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        groups = chance.normal(size=(4, 5))
        effects = judged([made(groups[0], groups[1]), made(groups[2], groups[3])])
        found += any(each.verdict in (SUPPORTED, CONTRADICTED) for each in effects)
    assert found <= 20  # 5 % of 200 are 10; more than 20 has a probability below 0.002


def test_effect_of_known_size_lies_in_its_interval_as_often_as_it_says():
    chance = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        found = made(chance.normal(0.7, 1, size=6), chance.normal(0, 2, size=6))
        inside += found.low <= 0.7 <= found.high
    assert 180 <= inside <= 199


def test_record_of_an_effect_can_be_changed_but_the_effect_cannot():
    found = made()
    with pytest.raises(AttributeError):
        found.p = 0.0  # type: ignore[misc]
    assert replace(found, p=0.5).p == 0.5
