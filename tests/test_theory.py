"""The closed forms: against numerical integration by scipy, and against the activations themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from bipolar import BELU, BSELU, BReLU
from experiments.analysis.theory import BASES, expectation, layer_moments, through_depth

MODULES = {
    "relu": torch.nn.ReLU(), "brelu": BReLU(), "elu": torch.nn.ELU(), "belu": BELU(), "selu": torch.nn.SELU(),
    "bselu": BSELU(),
}  # fmt: skip
NORMAL = torch.from_numpy(stats.norm.ppf((np.arange(50_000) + 0.5) / 50_000))
"""Quantiles of the standard normal distribution."""
MOMENTS = [(0.0, 1.0), (1.0, 1.0), (-2.0, 1.0), (0.3, 4.0), (5.0, 0.01)]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(("mean", "variance"), MOMENTS)
def test_expectation_is_the_integral(name, mean, variance):
    deviation = math.sqrt(variance)
    density = stats.norm(mean, deviation).pdf
    reach = (mean - 12 * deviation, mean + 12 * deviation)
    by_scipy, _ = integrate.quad(
        lambda x: density(x) * float(BASES[name](np.array(x))), *reach, points=[0, mean], limit=200
    )
    assert expectation(BASES[name], mean, variance) == pytest.approx(by_scipy, abs=1e-7)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("mean", "variance"), MOMENTS)
def test_moments_are_those_of_the_activation(name, mean, variance):
    x = mean + math.sqrt(variance) * NORMAL
    y = MODULES[name](x[:, None].expand(-1, 2).contiguous())  # one upright feature and one flipped
    expected = float(y.mean()), float(y.square().mean())
    assert layer_moments(name, mean, variance) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("mean", [-2.0, -0.1, 0.0, 0.7, 30.0])
def test_brelu_halves_the_mean(mean):
    assert layer_moments("brelu", mean, 1.0)[0] == pytest.approx(mean / 2, abs=1e-9)
    assert layer_moments("brelu", mean, 9.0)[0] == pytest.approx(mean / 2, abs=1e-9)


@pytest.mark.parametrize("mean", [0.01, 0.5, 3.0])
def test_belu_lies_between_half_the_mean_and_all_of_it(mean):
    found = layer_moments("belu", mean, 1.0)[0]
    assert mean / 2 < found < mean
    assert layer_moments("belu", -mean, 1.0)[0] == pytest.approx(-found)


def test_belu_contracts_small_means_as_its_docstring_says():
    slope = layer_moments("belu", 1e-4, 1.0)[0] / 1e-4
    assert slope == pytest.approx(0.5 * (1 + 2 * math.exp(0.5) * stats.norm.cdf(-1)), abs=1e-6)
    assert round(slope, 2) == 0.76


def test_through_depth_brelu_halves_again_and_again():
    assert through_depth("brelu", 1.0, 10) == pytest.approx(0.5 ** np.arange(1, 11))


def test_through_depth_relu_grows_without_end_and_without_a_weight_mean_stays():
    growing = through_depth("relu", 1.0, 30)
    assert (np.diff(growing) > 0).all()
    assert growing[-1] > 1000
    steady = through_depth("relu", 0.0, 30, weight_sum=0.0)
    assert steady == pytest.approx(np.full(30, 1 / math.sqrt(2 * math.pi)))


def test_unknown_activation_has_no_closed_form():
    with pytest.raises(KeyError):
        layer_moments("bgelu", 0.0, 1.0)
