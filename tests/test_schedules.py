"""Tests of bipolar/schedules.py: every schedule is held against torch's own where torch has one."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from bipolar import build, sweep
from bipolar.errors import ConfigError
from bipolar.schedules import Constant, Cosine, Linear, Plateau, Step, parse_interval

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "scheduler"

some_examples = settings(deadline=None, max_examples=60)
every_schedule = pytest.mark.parametrize("schedule_class", [Constant, Cosine, Linear, Step, Plateau])
lengths = st.integers(1, 300)
fractions = st.floats(0, 1)


def factors(schedule, total):
    return [schedule.factor(step, total) for step in range(total + 1)]


def torch_factors(make, total):
    """The learning rates of a torch scheduler on a base rate of 1: before each of `total` updates, and in the end."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(total):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule_class", "options", "begin", "middle", "end"),
    [
        (Constant, {}, 1, 1, 1),
        (Cosine, {}, 1, 0.5, 0),
        (Cosine, {"final": 0.2}, 1, 0.6, 0.2),
        (Linear, {}, 1, 0.5, 0),
        (Linear, {"final": 0.2}, 1, 0.6, 0.2),
        (Linear, {"final": 1}, 1, 1, 1),
        (Step, {}, 1, 0.1, 0.01),
        (Step, {"milestones": [0.25, 0.5, 1], "gamma": 0.5}, 1, 0.25, 0.125),
        (Step, {"milestones": []}, 1, 1, 1),
        (Plateau, {}, 1, 1, 1),
    ],
)
@pytest.mark.parametrize("warmup", [0, 20])
def test_begin_middle_and_end_of_what_follows_the_warmup(schedule_class, options, begin, middle, end, warmup):
    schedule = schedule_class(**options, warmup_steps=warmup)
    values = [schedule.factor(warmup + step, warmup + 100) for step in (0, 50, 100)]
    assert values == pytest.approx([begin, middle, end], abs=1e-12)


@some_examples
@given(total=lengths, final=fractions)
def test_cosine_is_torchs(total, final):
    expected = torch_factors(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=total, eta_min=final), total)
    assert factors(Cosine(final), total) == pytest.approx(expected, abs=1e-9)


@some_examples
@given(total=lengths, final=fractions)
def test_linear_is_torchs(total, final):
    expected = torch_factors(lambda o: lr_scheduler.LinearLR(o, 1.0, final, total_iters=total), total)
    assert factors(Linear(final), total) == pytest.approx(expected, abs=1e-9)


@some_examples
@given(total=lengths, gamma=st.floats(0.01, 1), data=st.data())
def test_step_is_torchs(total, gamma, data):
    steps = data.draw(st.lists(st.integers(1, total), max_size=4))
    expected = torch_factors(lambda o: lr_scheduler.MultiStepLR(o, steps, gamma), total)
    assert factors(Step([step / total for step in steps], gamma), total) == pytest.approx(expected)


@pytest.mark.parametrize(("total", "first"), [(10, 4), (9, 3), (1, 1)])
def test_a_milestone_between_two_steps_counts_from_the_later_one(total, first):
    values = factors(Step(milestones=[1 / 3], gamma=0.1), total)
    assert values == pytest.approx([1.0] * first + [0.1] * (total + 1 - first))


def test_a_milestone_that_rounding_puts_above_its_step_counts_from_that_step():
    milestone = 0.1 + 0.2
    assert milestone > 3 / 10
    assert factors(Step(milestones=[milestone], gamma=0.1), 10)[2:4] == pytest.approx([1, 0.1])


@some_examples
@given(warmup=st.integers(2, 50), decay=st.integers(1, 100), final=fractions)
def test_warmup_is_torchs_linear_warmup_in_front(warmup, decay, final):
    def make(optimizer):
        rise = lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1)
        fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=decay, eta_min=final)
        return lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[warmup])

    expected = torch_factors(make, warmup + decay)
    assert factors(Cosine(final, warmup_steps=warmup), warmup + decay) == pytest.approx(expected, abs=1e-9)


@every_schedule
@pytest.mark.parametrize("total", [3, 4, 100])
def test_warmup_rises_linearly_to_1_however_long_training_is(schedule_class, total):
    schedule = schedule_class(warmup_steps=4)
    assert [schedule.factor(step, total) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("schedule", "end"), [(Cosine(0.1), 0.1), (Linear(0.1), 0.1), (Step(), 0.01)])
def test_beyond_the_end_the_last_factor_stays(schedule, end):
    assert [schedule.factor(step, 10) for step in (10, 11, 1000)] == pytest.approx([end] * 3)


@every_schedule
def test_training_of_no_steps(schedule_class):
    assert schedule_class().factor(0, 0) == 1


# --- plateau ----------------------------------------------------------------------------------------------------------

# few distinct values, so that ties and rises are common
losses_seen = st.lists(st.sampled_from([0.0, 0.5, 0.9, 1.0, 1.05, 2.0, math.inf, math.nan]), max_size=30)
plateaus = st.fixed_dictionaries(
    {
        "gamma": st.sampled_from([0.1, 0.5, 0.9]),
        "patience": st.integers(1, 4),
        "threshold": st.sampled_from([0.0, 0.1, 0.6]),
        "final": st.sampled_from([0.0, 0.01, 0.3]),
    }
)


def observed(schedule, losses):
    """The factor after each validation."""
    values = []
    for loss in losses:
        schedule.observe(loss)
        values.append(schedule.factor(5, 10))
    return values


@some_examples
@given(losses=losses_seen, options=plateaus)
def test_plateau_is_torchs(losses, options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    # torch's patience counts the validations that are let pass before the one that lowers the rate
    scheduler = lr_scheduler.ReduceLROnPlateau(
        optimizer,
        factor=options["gamma"],
        patience=options["patience"] - 1,
        threshold=options["threshold"],
        threshold_mode="abs",
        min_lr=options["final"],
        eps=0,
    )
    expected = []
    for loss in losses:
        scheduler.step(loss)
        expected.append(optimizer.param_groups[0]["lr"])
    assert observed(Plateau(**options), losses) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "losses", "expected"),
    [
        ({}, [3, 2, 1], [1, 1, 1]),
        ({}, [1, 1, 2, 0.5, 0.6], [1, 0.5, 0.25, 0.25, 0.125]),
        ({"patience": 2}, [1, 2, 2, 2, 2], [1, 1, 0.5, 0.5, 0.25]),
        ({"patience": 2}, [1, 2, 0.5, 2, 2], [1, 1, 1, 1, 0.5]),
        ({"threshold": 0.1}, [1, 0.95, 0.8], [1, 0.5, 0.5]),
        ({"gamma": 0.1, "final": 0.05}, [1, 1, 1, 1], [1, 0.1, 0.05, 0.05]),
    ],
)
def test_plateau_by_hand(options, losses, expected):
    assert observed(Plateau(**options), losses) == pytest.approx(expected)


@some_examples
@given(losses=losses_seen, options=plateaus, data=st.data())
def test_plateau_goes_on_from_its_state_dict(losses, options, data):
    stop = data.draw(st.integers(0, len(losses)))
    first, second = Plateau(**options), Plateau(**options)
    begin = observed(first, losses[:stop])
    second.load_state_dict(first.state_dict())
    assert begin + observed(second, losses[stop:]) == observed(Plateau(**options), losses)


@pytest.mark.parametrize("schedule", [Constant(), Cosine(), Linear(), Step()])
def test_other_schedules_do_not_look_at_the_loss(schedule):
    before = factors(schedule, 20)
    for loss in (1.0, 2.0, math.nan):
        schedule.observe(loss)
    schedule.load_state_dict(schedule.state_dict())
    assert factors(schedule, 20) == before


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_config_builds(name):
    schedule = build.schedule(sweep.compose([f"scheduler={name}", "scheduler.warmup_steps=2"]))
    values = factors(schedule, 12)
    assert values[:3] == [0.5, 1.0, 1.0]
    assert all(0 <= later <= earlier for earlier, later in itertools.pairwise(values[1:]))


@pytest.mark.parametrize(
    ("schedule_class", "options"),
    [
        (Constant, {"warmup_steps": -1}),
        (Constant, {"warmup_steps": 1.5}),
        (Cosine, {"final": 1.1}),
        (Cosine, {"final": -0.1}),
        (Linear, {"final": "low"}),
        (Linear, {"warmup_steps": None}),
        (Step, {"gamma": 0}),
        (Step, {"gamma": 1.5}),
        (Step, {"milestones": [0.5, 2]}),
        (Step, {"milestones": [-0.5]}),
        (Step, {"milestones": 0.5}),
        (Plateau, {"gamma": 1.0}),
        (Plateau, {"gamma": 0}),
        (Plateau, {"patience": 0}),
        (Plateau, {"threshold": -1}),
        (Plateau, {"final": 2}),
    ],
)
def test_wrong_options(schedule_class, options):
    (name,) = options
    with pytest.raises(ConfigError, match=rf"^{name}=.* is not allowed; give "):
        schedule_class(**options)


# --- intervals --------------------------------------------------------------------------------------------------------


@some_examples
@given(every=st.integers(1, 50), step=st.integers(0, 10_000))
def test_every_n_steps(every, step):
    assert parse_interval("log_every", every)(step) == (step in range(0, 10_001, every))


def test_interval_0_is_never():
    is_due = parse_interval("log_every", 0)
    assert not any(map(is_due, range(1000)))


def test_logarithmic_interval():
    is_due = parse_interval("log_every", "log")
    due = [step for step in range(100_001) if is_due(step)]
    assert due == sorted({0} | {round(10 ** (k / 10)) for k in range(51)})
    assert due[:12] == [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20]
    for decade in (10, 100, 1000, 10_000):
        assert sum(decade <= step < 10 * decade for step in due) == 10


@pytest.mark.parametrize("value", [-1, 2.0, True, None, [5], "10", "logs", "", "LOG"])
def test_wrong_intervals(value):
    with pytest.raises(ConfigError, match=r"^log_every=.* is not allowed; give (an integer|a number of steps)"):
        parse_interval("log_every", value)
