"""Tests of bipolar/errors.py: what is let through, and what the one line of a refusal says."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bipolar.errors import (
    ConfigError,
    DataError,
    check_bool,
    check_choice,
    check_float,
    check_int,
    nearest,
    prefixed,
)

NAMES = ["relu", "elu", "leaky_relu"]
NOT_NUMBERS = ["1", "", None, True, False, [1], 1j]

some_examples = settings(deadline=None, max_examples=100)


def refusal(check, *args, **options):
    """The message of the ConfigError that the check raises."""
    with pytest.raises(ConfigError) as caught:
        check(*args, **options)
    assert type(caught.value) is ConfigError
    return str(caught.value)


def test_kinds_of_errors():
    assert issubclass(DataError, ConfigError)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    ("value", "near"),
    [("rellu", "relu"), ("relu", "relu"), ("ReLU", "relu"), ("leakyrelu", "leaky_relu"), ("el", "elu")],
)
def test_nearest(value, near):
    assert nearest(value, NAMES) == f" (did you mean {near!r}?)"


@pytest.mark.parametrize("value", ["zebra", "", None, 3])
def test_nearest_to_nothing(value):
    assert nearest(value, NAMES) == ""


@pytest.mark.parametrize("value", NAMES)
@pytest.mark.parametrize("container", [list, tuple, iter], ids=["list", "tuple", "iterator"])
def test_allowed_choices_are_returned(value, container):
    assert check_choice("activation", value, container(NAMES)) == value


def test_a_wrong_choice_names_the_allowed_and_the_nearest():
    message = refusal(check_choice, "activation", "leaky", NAMES)
    assert message == (
        "activation='leaky' is not allowed; choose from relu, elu, leaky_relu (did you mean 'leaky_relu'?)"
    )


@pytest.mark.parametrize("value", [None, 3, True, ["relu"], "zebra", "re\nlu?"])
def test_a_wrong_choice_of_any_type_is_one_line(value):
    message = refusal(check_choice, "activation", value, NAMES)
    assert message.startswith(f"activation={value!r} is not allowed; choose from relu, elu, leaky_relu")
    assert "\n" not in message


@some_examples
@given(value=st.integers(), minimum=st.integers(-5, 5))
def test_integers(value, minimum):
    if value >= minimum:
        assert check_int("depth", value, minimum) is value
    else:
        message = refusal(check_int, "depth", value, minimum)
        assert message == f"depth={value} is not allowed; give an integer of at least {minimum}"


def test_integers_are_positive_by_default():
    assert check_int("depth", 1) == 1
    assert refusal(check_int, "depth", 0).endswith("at least 1")


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 2.0, math.inf, math.nan])
def test_integers_of_other_types(value):
    assert refusal(check_int, "depth", value) == f"depth={value!r} is not allowed; give an integer of at least 1"


@some_examples
@given(
    value=st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-3, 3), st.sampled_from([-2.0, 2.0])),
    low=st.sampled_from([-2.0, -math.inf]),
    high=st.sampled_from([2.0, math.inf]),
    open_low=st.booleans(),
    open_high=st.booleans(),
)
def test_floats(value, low, high, open_low, open_high):
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    arguments = ("p", value, low, high)
    options = {"open_low": open_low, "open_high": open_high}
    if above and below:
        result = check_float(*arguments, **options)
        assert type(result) is float
        assert result == value
    else:
        assert refusal(check_float, *arguments, **options).startswith(f"p={value!r} is not allowed; give a number in ")


@pytest.mark.parametrize("value", [*NOT_NUMBERS, math.nan, math.inf, -math.inf])
def test_floats_of_other_types_or_not_finite(value):
    message = refusal(check_float, "p", value, -math.inf)
    assert message.startswith(f"p={value!r} is not allowed; give a number in ")


@pytest.mark.parametrize(
    ("limits", "options", "interval"),
    [
        ((), {}, "[0, inf)"),
        ((), {"open_low": True}, "(0, inf)"),
        ((-math.inf,), {}, "(-inf, inf)"),
        ((-math.inf, 1), {}, "(-inf, 1]"),
        ((0, 1), {}, "[0, 1]"),
        ((0, 1), {"open_high": True}, "[0, 1)"),
        ((0, 1), {"open_low": True, "open_high": True}, "(0, 1)"),
        ((-0.5, 0.25), {"open_low": True}, "(-0.5, 0.25]"),
    ],
)
def test_a_wrong_float_names_the_interval(limits, options, interval):
    message = refusal(check_float, "p", "wrong", *limits, **options)
    assert message == f"p='wrong' is not allowed; give a number in {interval}"


@pytest.mark.parametrize("value", [True, False])
def test_bools(value):
    assert check_bool("flip", value) is value


@pytest.mark.parametrize("value", [0, 1, "true", "no", None, [], 1.0])
def test_bools_of_other_types(value):
    assert refusal(check_bool, "flip", value) == f"flip={value!r} is not allowed; give true or false"


def fail(error):
    with prefixed("network"):
        raise error


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("pool='avg' is not allowed", "network.pool='avg' is not allowed"),
        ("weight_decay=-1 is not allowed", "network.weight_decay=-1 is not allowed"),
        ("epochs and max_steps are both null", "network: epochs and max_steps are both null"),
        ("no such thing (pool=avg)", "network: no such thing (pool=avg)"),
    ],
)
def test_prefixed_names_the_option_as_the_user_knows_it(message, expected):
    cause = ConfigError(message)
    with pytest.raises(ConfigError) as caught:
        fail(cause)
    assert str(caught.value) == expected
    assert caught.value.__cause__ is cause


@pytest.mark.parametrize("error", [DataError("path=x: no such file"), TypeError("a=1"), KeyError("a"), ValueError("b")])
def test_prefixed_leaves_other_errors_alone(error):
    with pytest.raises(type(error)) as caught:
        fail(error)
    assert caught.value is error


def test_prefixed_does_nothing_without_an_error():
    with prefixed("network"):
        value = check_int("depth", 3)
    assert value == 3
