"""Closed forms: the mean of a layer of activations for normally distributed inputs.

For x ~ N(m, v) and half of the units flipped, the mean over a bipolar layer is (E f(x) - E f(-x)) / 2. For ReLU
f(x) - f(-x) = x, so that BReLU's is m / 2, for inputs of *any* distribution with mean m: one layer halves the mean. For
ELU f(x) - f(-x) = x + sign(x)(1 - exp(-|x|)), so that BELU's lies between m / 2 and m; near m = 0 and for v = 1 it is
m (1 + E exp(-|x|)) / 2 = 0.76 m.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805

BASES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "relu": lambda x: np.maximum(x, 0),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "selu": lambda x: SELU_SCALE * np.where(x > 0, x, SELU_ALPHA * np.expm1(np.minimum(x, 0))),
}
"""Base activations, written out again on purpose: what they predict does not depend on the code that is tested."""


@cache
def _nodes() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of Gauss-Legendre quadrature: finding them takes much longer than using them."""
    return np.polynomial.legendre.leggauss(200)


def expectation(function: Callable[[NDArray[np.float64]], NDArray[np.float64]], mean: float, variance: float) -> float:
    """E function(x) for x ~ N(mean, variance), by Gauss-Legendre quadrature on each side of the kink at 0."""
    deviation = float(np.sqrt(variance))
    if deviation == 0:
        return float(function(np.array([mean]))[0])
    nodes, weights = _nodes()
    low, high = mean - 12 * deviation, mean + 12 * deviation
    total = 0.0
    for start, end in ((low, min(high, max(low, 0.0))), (max(low, min(high, 0.0)), high)):
        x = 0.5 * (end - start) * nodes + 0.5 * (end + start)
        density = np.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))
        total += 0.5 * (end - start) * float((weights * density * function(x)).sum())
    return total


def layer_moments(activation: str, mean: float, variance: float) -> tuple[float, float]:
    """Mean and second moment over a layer of `activation` (relu, brelu, elu, ...) for pre-activations N(mean,
    variance).

    Raises:
        KeyError: the closed form of this activation is not here.
    """
    is_bipolar = activation not in BASES
    f = BASES[activation[1:] if is_bipolar else activation]
    moments = [expectation(f, mean, variance), expectation(lambda x: f(x) ** 2, mean, variance)]
    if not is_bipolar:
        return moments[0], moments[1]
    flipped = [expectation(f, -mean, variance), expectation(lambda x: f(x) ** 2, -mean, variance)]
    return 0.5 * (moments[0] - flipped[0]), 0.5 * (moments[1] + flipped[1])


def through_depth(activation: str, mean: float, depth: int, weight_sum: float = 1.0) -> NDArray[np.float64]:
    """Mean of each layer's activation in a wide random network, first layer first.

    Inputs are N(mean, 1). The weights of a unit sum to `weight_sum` on average and have, as He's, the variance that
    would keep pre-activations without a mean at variance 1: 1 / n in the first layer, gain² / n in the others. A
    layer of mean m and second moment q then gives pre-activations of mean weight_sum m and variance gain² q.
    """
    gain_squared = 1 / layer_moments(activation, 0.0, 1.0)[1]
    pre_mean, pre_variance = weight_sum * mean, 1 + mean**2
    means = []
    for _ in range(depth):
        layer_mean, second = layer_moments(activation, pre_mean, pre_variance)
        means.append(layer_mean)
        pre_mean, pre_variance = weight_sum * layer_mean, gain_squared * second
    return np.array(means)
