"""Initial weights: He, Glorot, orthogonal, identity and LSUV, for any activation.

Every initialization is called as `init(model, inputs)` and returns a report, one row per layer. Biases are set to
zero. Normalization layers keep torch's defaults (scale 1, shift 0). Weights are drawn from torch's global generator.

A recurrent layer has two matrices, W of its input and U of its state, which share the variance half and half (the
authors' `mix` of 0.5): where a matrix alone would give pre-activations of variance 1, each gives 1/2.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bipolar.errors import ConfigError, check_choice, check_float, check_int
from bipolar.networks import Layer, Recurrent, layers_of
from bipolar.networks.rnn import Cell

Report = list[dict[str, Any]]


@torch.no_grad()
def second_moment(activation: Callable[[Tensor], Tensor]) -> float:
    """E[f(z)^2] for z ~ N(0, 1), by Gauss-Legendre quadrature on each side of 0, where activations have their kink.

    A bipolar activation is averaged over upright and flipped features, wherever its feature dimension is.
    """
    if isinstance(activation, nn.Module):
        activation = copy.deepcopy(activation).cpu().double()  # one with parameters has them in float32
    nodes, weights = np.polynomial.legendre.leggauss(64)
    reach = 12.0  # beyond it the normal density is below 1e-31
    half = 0.5 * reach * (nodes + 1)
    density = 0.5 * reach * weights * np.exp(-0.5 * half**2) / math.sqrt(2 * math.pi)
    total = 0.0
    for z, weight in zip([*half, *-half], [*density, *density], strict=True):
        # two features (and two samples) along every dimension: one upright, one flipped
        total += weight * float(activation(torch.full((2, 2, 2, 2), z, dtype=torch.float64)).square().mean())
    return total


def gain(activation: Callable[[Tensor], Tensor] | None) -> float:
    """The factor 1 / sqrt(E[f(z)^2]) that keeps the variance of pre-activations at 1 through a layer with `activation`.

    For ReLU this is He's sqrt(2) (arXiv:1502.01852, equation 10); torch's `calculate_gain` knows no ELU and no bipolar
    function. 1 for None (no activation).

    Raises:
        ConfigError: the activation is zero everywhere.
    """
    if activation is None:
        return 1.0
    moment = second_moment(activation)
    if not moment > 0:
        raise ConfigError(f"no initial variance suits {activation!r}: it is zero for normally distributed input")
    return 1 / math.sqrt(moment)


def fan_in(linear: nn.Module) -> int:
    """How many inputs one unit of the layer sums over."""
    return int(_weight(linear)[0].numel())


def _weight(linear: nn.Module) -> Tensor:
    weight = linear.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(linear).__name__} has no weight")
    return weight


def _gains(layers: list[Layer]) -> tuple[list[float], list[float]]:
    """For each layer the gain of what feeds it, and that of its own activation (which a recurrent layer reads as well).

    The first layer is fed by data of variance 1. With the gain of the activation in front (not behind) every
    pre-activation has variance 1, which is what the gain is computed for; it matters where f is not homogeneous, as
    ELU. A layer without an activation (a projection on a shortcut) passes on that of the layer before it. The stream of
    a recurrent network is made of an embedding of variance 1 and of activations.
    """
    gains, own = [1.0], []
    known: dict[bytes, float] = {}  # a thousand layers mostly have the same activation, and a gain takes milliseconds
    for layer in layers:
        if layer.activation is None:
            own.append(gains[-1])
        else:
            fingerprint = _fingerprint(layer.activation)
            if fingerprint not in known:
                known[fingerprint] = gain(layer.activation)
            own.append(known[fingerprint])
        share = layer.linear.embedding_share_behind if isinstance(layer.linear, Cell) else None
        gains.append(own[-1] if share is None else 1 / math.sqrt(share + (1 - share) / own[-1] ** 2))
    return gains[:-1], own


@torch.no_grad()
def _fingerprint(activation: nn.Module) -> bytes:
    """What the activation makes of a few fixed numbers: functions that agree there are taken to be the same.

    Neither its type nor its text would do: those do not tell two functions given as arguments apart.
    """
    probe = torch.randn(2, 2, 2, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = copy.deepcopy(activation).cpu().double()(3 * probe)
    return bytes(made.contiguous().numpy().tobytes())


def _finish(layer: Layer, weight_mean: float) -> dict[str, Any]:
    """Shift the weights, clear the bias, and report what the layer starts with."""
    weight = _weight(layer.linear)
    weight += weight_mean
    if isinstance(layer.linear.bias, Tensor):
        layer.linear.bias.zero_()
    return {"layer": layer.name, "weight_mean": float(weight.mean()), "weight_std": float(weight.std(correction=0))}


class _DrawnWeights:
    """Initializations that look at one layer at a time and at no data."""

    def __init__(self, weight_mean: float = 0.0) -> None:
        self.weight_mean = check_float("weight_mean", weight_mean, -math.inf)

    def draw(self, weight: Tensor, gain: float, fan_in: int) -> None:
        raise TypeError(f"{type(self).__name__} does not say how weights are drawn")

    def draw_recurrent(self, cell: Cell, gain: float, recurrent_gain: float) -> None:
        """The weights of a recurrent layer.

        Args:
            gain, recurrent_gain: those of the activations in front of its input and of its state.
        """
        share = math.sqrt(0.5)
        width = fan_in(cell) // 2
        self.draw(cell.input_weight, share * gain, width)
        self.draw(cell.recurrent_weight, share * recurrent_gain, width)

    @torch.no_grad()
    def __call__(self, model: nn.Module, inputs: Tensor | None = None) -> Report:
        layers = layers_of(model)
        report = []
        gains, recurrent_gains = _gains(layers)
        for layer, layer_gain, recurrent_gain in zip(layers, gains, recurrent_gains, strict=True):
            if isinstance(layer.linear, Cell):
                self.draw_recurrent(layer.linear, layer_gain, recurrent_gain)
            else:
                self.draw(_weight(layer.linear), layer_gain, fan_in(layer.linear))
            report.append(_finish(layer, self.weight_mean))
        return report


class He(_DrawnWeights):
    """Normal weights of variance gain^2 / fan_in (He et al., arXiv:1502.01852), with the gain of any activation."""

    def draw(self, weight: Tensor, gain: float, fan_in: int) -> None:
        nn.init.normal_(weight, std=gain / math.sqrt(fan_in))


class Glorot(_DrawnWeights):
    """Uniform weights of variance 2 / (fan_in + fan_out) (Glorot and Bengio, 2010), without a gain, as published."""

    def draw(self, weight: Tensor, gain: float, fan_in: int) -> None:
        nn.init.xavier_uniform_(weight)

    def draw_recurrent(self, cell: Cell, gain: float, recurrent_gain: float) -> None:
        nn.init.xavier_uniform_(cell.weight)  # as one matrix of both inputs


class Orthogonal(_DrawnWeights):
    """Orthogonal weights (Saxe et al., arXiv:1312.6120) times the gain."""

    def draw(self, weight: Tensor, gain: float, fan_in: int) -> None:
        nn.init.orthogonal_(weight, gain)


class Identity(_DrawnWeights):
    """The identity map (its first rows or columns where the layer is not square); a Dirac kernel for a convolution.

    Of a recurrent layer: the identity for its state (Le, Jaitly and Hinton, arXiv:1504.00941) and He's normal weights
    for its input, which in their networks of one layer are smaller.
    """

    def draw(self, weight: Tensor, gain: float, fan_in: int) -> None:
        if weight.ndim == 2:
            nn.init.eye_(weight)
        else:
            nn.init.dirac_(weight)

    def draw_recurrent(self, cell: Cell, gain: float, recurrent_gain: float) -> None:
        width = fan_in(cell) // 2
        nn.init.normal_(cell.input_weight, std=math.sqrt(0.5) * gain / math.sqrt(width))
        nn.init.eye_(cell.recurrent_weight)


LSUV_VARIANTS = ("textbook", "authors")


@dataclass(frozen=True)
class _Recipe:
    post_activation: bool
    tolerance: float
    max_iterations: int


_RECIPES = {"textbook": _Recipe(False, 0.1, 10), "authors": _Recipe(True, 0.001, 40)}


class LSUV:
    """Layer-sequential unit variance: scale each layer, first to last, until its output has variance 1 on real data.

    `textbook` (Mishkin and Matas, arXiv:1511.06422): orthonormal weights, then the variance of the *pre*-activation;
    tolerance 0.1, at most 10 rounds.

    `authors` (the code of arXiv:1709.04054): normal weights, then the variance of the *post*-activation over all of
    the layer's elements, the mean subtracted; tolerance 0.001, at most 40 rounds. A layer starts from the scale at
    which the layer before it ended (their layers have one fan-in; here it is std * sqrt(fan_in) that is carried over).
    The output layer has no activation, so there its plain output is measured.

    A recurrent network is measured in one time step from random characters and states N(0, 1), as by the authors; both
    matrices of a layer are scaled alike.

    Neither shifts a bias. Both need `inputs`, a batch as the network sees it in training; dropout is off while they
    run. The layers are normalised in one forward pass, each as the pass reaches it. The model's modes, hooks and
    buffers are left as they were found, and nothing random happens beyond drawing the weights.

    Args:
        variant: see above.
        tolerance, max_iterations: None for the variant's own.
        weight_mean: added to the weights as drawn, before they are scaled.

    Raises (when called):
        ConfigError: a layer's variance does not reach 1 (zero or not finite, or not within the rounds).
    """

    def __init__(
        self,
        variant: str = "textbook",
        tolerance: float | None = None,
        max_iterations: int | None = None,
        weight_mean: float = 0.0,
    ) -> None:
        recipe = _RECIPES[check_choice("variant", variant, LSUV_VARIANTS)]
        self.variant = variant
        self.post_activation = recipe.post_activation
        self.tolerance = recipe.tolerance if tolerance is None else check_float("tolerance", tolerance, open_low=True)
        self.max_iterations = (
            recipe.max_iterations if max_iterations is None else check_int("max_iterations", max_iterations)
        )
        self.weight_mean = check_float("weight_mean", weight_mean, -math.inf)

    @torch.no_grad()
    def __call__(self, model: nn.Module, inputs: Tensor) -> Report:
        layers = layers_of(model)
        for layer in layers:
            weight = _weight(layer.linear)
            if self.post_activation:
                nn.init.normal_(weight, std=1 / math.sqrt(fan_in(layer.linear)))
            else:
                nn.init.orthogonal_(weight)
            _finish(layer, self.weight_mean)

        report: Report = []
        handles = []
        for layer in layers:
            hook = self._hook_post_activation if self.post_activation and layer.activation else self._hook_linear
            handles += hook(layer, report)
        try:
            with _left_as_found(model, inputs.device):
                (model.probe if isinstance(model, Recurrent) else model)(inputs)
        finally:
            for handle in handles:
                handle.remove()
        missed = {layer.name for layer in layers} - {row["layer"] for row in report}
        if missed:
            raise ConfigError(f"LSUV did not reach {', '.join(sorted(missed))}: the forward pass does not use them")
        return report

    def _hook_linear(self, layer: Layer, report: Report) -> list[Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return self._normalise(layer, partial(module.forward, *args), output, report)

        return [layer.linear.register_forward_hook(hook)]

    def _hook_post_activation(self, layer: Layer, report: Report) -> list[Any]:
        seen: dict[str, Any] = {}

        def remember(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen.update(args=args, output=output)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if args[0] is not seen.get("output"):
                raise ConfigError(
                    f"LSUV of the authors scales a linear map by what comes out of the activation; in {layer.name} "
                    "another module lies between the two (use init.variant=textbook or network.norm=none)"
                )
            linear_args = seen.pop("args")
            seen.clear()
            return self._normalise(layer, lambda: module.forward(layer.linear.forward(*linear_args)), output, report)

        assert layer.activation is not None
        return [layer.linear.register_forward_hook(remember), layer.activation.register_forward_hook(hook)]

    def _normalise(self, layer: Layer, compute: Callable[[], Tensor], output: Tensor, report: Report) -> Tensor:
        weight = _weight(layer.linear)
        before = _variance(output)
        if self.post_activation and report:
            weight *= report[-1]["scale"] / _scale(layer.linear)
            output = compute()
        variance = _variance(output)
        rounds = 0
        while not (variance > 0 and abs(variance - 1) <= self.tolerance):  # NaN and 0 never pass
            if not (math.isfinite(variance) and variance > 0) or rounds == self.max_iterations:
                raise ConfigError(
                    f"LSUV cannot normalise {layer.name}: the variance of its output is {variance:.4g} after "
                    f"{rounds} rounds (wanted: 1 within {self.tolerance:g})"
                )
            weight /= math.sqrt(variance)
            output = compute()
            variance = _variance(output)
            rounds += 1
        report.append(
            {
                "layer": layer.name,
                "std_before": math.sqrt(before),
                "std_after": math.sqrt(variance),
                "rounds": rounds,
                "scale": _scale(layer.linear),
                "weight_mean": float(weight.mean()),
                "weight_std": float(weight.std(correction=0)),
            }
        )
        return output


def _variance(output: Tensor) -> float:
    return float(output.double().var(correction=0))


def _scale(linear: nn.Module) -> float:
    """The standard deviation of the weights in units of 1 / sqrt(fan_in)."""
    return float(_weight(linear).std(correction=0)) * math.sqrt(fan_in(linear))


@contextmanager
def _left_as_found(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Training mode without dropout inside; modes, buffers and random generators restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.train()
            for module in model.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training
            for buffer, value in buffers:
                buffer.copy_(value)
