"""Per-layer statistics of activations, taken in the training step without a host-device synchronisation.

For each layer, over the batch and all positions, both over the whole layer and per channel (feature):

    mean, variance       of the activation, over the whole layer
    channel_mean_norm    root mean square over the channels of each channel's mean: bipolarity moves `mean` to zero
                         and leaves this one alone
    zero_fraction        fraction of activations that are exactly 0
    max_abs              largest |activation|
    pre_mean, pre_variance, pre_channel_mean_norm   the same of the pre-activation, the activation's input
    gradient_norm        Euclidean norm of the gradient of the layer's weights, before clipping

A recurrent layer is measured over all its times.

Variances are those of a population (divided by the count). Everything is accumulated per channel in float32 as count,
mean and sum of squared deviations, and merged by Chan, Golub and LeVeque's rule (1979), which stays exact at a large
mean, where E[x^2] - E[x]^2 loses everything.

The hooks sit on the plain modules before compilation and write into buffers that exist beforehand, so they compile
with the network, run under autocast, and count every micro-batch (and every time step) while `enabled` is set: the
trainer sets it during a training step's forward passes only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bipolar.networks import Recurrent, layers_of
from bipolar.networks.rnn import Cell

FIELDS = (
    "mean",
    "variance",
    "channel_mean_norm",
    "zero_fraction",
    "max_abs",
    "pre_mean",
    "pre_variance",
    "pre_channel_mean_norm",
    "gradient_norm",
)


class _Moments:
    """Running per-channel moments of one tensor of one layer: views into the buffers of a group of layers."""

    def __init__(self, buffers: dict[str, Tensor], row: int, dim: int) -> None:
        self.dim = dim
        self.count, self.mean, self.squares = (buffers[name][row] for name in ("count", "mean", "squares"))
        self.zeros, self.max_abs = (buffers[name][row] for name in ("zeros", "max_abs"))

    def add(self, x: Tensor, *, extremes: bool) -> None:
        x = x.detach()
        dims = [d for d in range(x.ndim) if d != self.dim % x.ndim]
        added = x.numel() // x.shape[self.dim]
        values = x.float()
        # two passes: exact, and on a CPU many times faster than var_mean over any dimension but the last
        mean = values.mean(dims, keepdim=True)
        squares = (values - mean).square_().sum(dims)
        delta = mean.view(-1) - self.mean
        count = self.count + added
        self.squares += squares + delta.square() * (self.count * added / count)
        self.mean += delta * (added / count)
        self.count.copy_(count)
        if extremes:
            self.zeros += x.numel() - torch.count_nonzero(x)
            torch.maximum(self.max_abs, x.abs().amax().float(), out=self.max_abs)


class _Group:
    """The buffers of all layers with the same number of channels; first the activations, then the pre-activations."""

    def __init__(self, layers: list[int], channels: int, device: torch.device) -> None:
        self.layers = layers
        rows = 2 * len(layers)
        # The count is float32 too: a whole number up to 2^24 per channel exactly, far above batch x positions.
        self.buffers = {
            "count": torch.zeros(rows, 1, device=device),
            "mean": torch.zeros(rows, channels, device=device),
            "squares": torch.zeros(rows, channels, device=device),
            "zeros": torch.zeros(rows, dtype=torch.int64, device=device),
            "max_abs": torch.zeros(rows, device=device),
        }

    def moments(self, place: int, dim: int) -> tuple[_Moments, _Moments]:
        return _Moments(self.buffers, place, dim), _Moments(self.buffers, len(self.layers) + place, dim)

    def result(self) -> Tensor:
        """[layers, FIELDS] on the device."""
        half = len(self.layers)
        count, means = self.buffers["count"], self.buffers["mean"]
        mean = means.mean(1)
        # law of total variance: every channel has the same count
        variance = (self.buffers["squares"] / count).mean(1) + (means - mean[:, None]).square().mean(1)
        norm = means.square().mean(1).sqrt()
        elements = count[:half, 0] * means.shape[1]
        return torch.stack(
            [
                mean[:half],
                variance[:half],
                norm[:half],
                self.buffers["zeros"][:half] / elements,
                self.buffers["max_abs"][:half],
                mean[half:],
                variance[half:],
                norm[half:],
            ],
            dim=1,
        )

    def clear(self) -> None:
        for buffer in self.buffers.values():
            buffer.zero_()


class ActivationStatistics:
    """Measures the activations of every layer of `model` that has an activation module.

    Args:
        model: a network (see `bipolar.networks`), not compiled yet.
        sample: a few prepared inputs, for one forward pass that finds the number of channels of each layer.
        dim: the channel dimension of the activations.
    """

    def __init__(self, model: nn.Module, sample: Tensor, dim: int = 1) -> None:
        layers = [layer for layer in layers_of(model) if layer.activation is not None]
        self.names = [layer.name for layer in layers]
        self.enabled = False
        self._linears = [layer.linear for layer in layers]
        modules = [layer.activation for layer in layers if layer.activation is not None]
        recurrent = model if isinstance(model, Recurrent) else None
        if recurrent is not None:
            dim = -1
        by_channels: dict[int, list[int]] = defaultdict(list)
        for index, channels in enumerate(_channels(model, modules, sample, dim)):
            by_channels[channels].append(index)
        self._groups = [_Group(members, channels, sample.device) for channels, members in by_channels.items()]
        self._removals: list[Callable[[], None]] = []
        moments = {
            index: group.moments(place, dim) for group in self._groups for place, index in enumerate(group.layers)
        }
        if recurrent is not None:
            # it computes many layers at once, so that their activation modules are not called
            observer = self._observer(moments)
            recurrent.observers.append(observer)
            self._removals.append(lambda: recurrent.observers.remove(observer))
        else:
            for index, (after, before) in moments.items():
                # The pre-activation is measured before the activation runs: an in-place one overwrites it.
                handles = (
                    modules[index].register_forward_pre_hook(self._before(before)),
                    modules[index].register_forward_hook(self._after(after)),
                )
                self._removals += [handle.remove for handle in handles]
        order = [index for group in self._groups for index in group.layers]
        self._order = torch.tensor(order, device=sample.device).argsort()

    def _before(self, moments: _Moments) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self.enabled:
                with torch.no_grad():
                    moments.add(args[0], extremes=False)

        return hook

    def _after(self, moments: _Moments) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self.enabled:
                with torch.no_grad():
                    moments.add(output, extremes=True)

        return hook

    def _observer(self, moments: dict[int, tuple[_Moments, _Moments]]) -> Callable[[int, Tensor, Tensor], None]:
        def observer(layer: int, pre: Tensor, output: Tensor) -> None:
            if self.enabled:
                with torch.no_grad():
                    after, before = moments[layer]
                    before.add(pre, extremes=False)
                    after.add(output, extremes=True)

        return observer

    @contextmanager
    def measuring(self, on: bool = True) -> Iterator[None]:
        """Count the forward passes inside."""
        self.enabled = on
        try:
            yield
        finally:
            self.enabled = False

    @torch.no_grad()
    def take(self) -> Tensor:
        """What was measured since the last call: [layers, FIELDS], on the device. Starts afresh.

        Gradients are those that the weights have now; NaN where they have none.
        """
        moments = torch.cat([group.result() for group in self._groups])[self._order]
        result = torch.cat([moments, self._gradient_norms(moments)], dim=1)
        for group in self._groups:
            group.clear()
        return result

    def _gradient_norms(self, like: Tensor) -> Tensor:
        """[layers, 1]."""
        found = [gradient_of(linear) for linear in self._linears]
        nothing = like.new_full((1,), torch.nan)
        gradients = [nothing if gradient is None else gradient.float() for gradient in found]
        return torch.stack(torch._foreach_norm(gradients))[:, None]

    def remove(self) -> None:
        """Take the hooks off the model."""
        while self._removals:
            self._removals.pop()()


def gradient_of(linear: nn.Module) -> Tensor | None:
    """The gradient of a layer's weights."""
    gradient = linear.gradient if isinstance(linear, Cell) else linear.weight.grad
    return gradient if isinstance(gradient, Tensor) else None


@torch.no_grad()
def _channels(model: nn.Module, modules: list[nn.Module], sample: Tensor, dim: int) -> list[int]:
    if isinstance(model, Recurrent):
        return [int(layer.linear.bias.numel()) for layer in layers_of(model) if isinstance(layer.linear, Cell)]
    found: dict[nn.Module, int] = {}
    handles = [
        module.register_forward_hook(lambda module, args, output: found.update({module: output.shape[dim]}))
        for module in modules
    ]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # no dropout, and no batch statistics updated
    try:
        model(sample)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return [found[module] for module in modules]
