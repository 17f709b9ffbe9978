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

What is measured is summed up in one flat tensor on the device; a copy of it is all that a measured step leaves behind,
and the figures are made of many such copies at once, when they are written. Small activations, for which the calls
cost more than the work, are gathered and measured together, all layers at once.

With torch.compile the hooks have to sit on the plain modules beforehand: they write into buffers that exist, so they
compile with the network. Otherwise they are on the modules during measured steps only, as even an idle hook costs a
small layer several percent. Either way they run under autocast and count every micro-batch and every time step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
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


SMALL = 2**16
"""Activations of up to so many elements are gathered and measured together."""

PART = 2**17
"""Elements that are looked at for zeros and for the largest at a time."""

OUTPUT, INPUT = 0, 1
"""Of an activation module: what it makes, and the pre-activation."""


def _rows(x: Tensor, dim: int) -> Tensor | None:
    """x as a matrix [elements of a channel, channels] where that is how it lies in memory."""
    if x.ndim > 2:
        x = x.movedim(dim, -1)
        return x.view(-1, x.shape[-1]) if x.is_contiguous() else None
    return x if dim % x.ndim == 1 and x.is_contiguous() else None


def _mean_and_squares(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Of each channel of x (float32): the mean, and the sum of squared deviations from it."""
    rows = None if torch.compiler.is_compiling() or x.device.type not in ("cpu", "cuda") else _rows(x, dim)
    if rows is not None:
        # five times as fast as the two passes below; it makes two as well
        mean, variance = torch.batch_norm_update_stats(rows, None, None, 0.0)
        return mean, variance * len(rows)
    dims = [d for d in range(x.ndim) if d != dim % x.ndim]
    # two passes: exact, and on a CPU many times faster than var_mean over any dimension but the last
    mean = x.mean(dims, keepdim=True)
    return mean.view(-1), (x - mean).square_().sum(dims)


def _nonzero_and_largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The number of elements (float32) that are not 0, and the largest magnitude."""
    if torch.compiler.is_compiling():
        return x.sign().square().sum(), x.abs().amax()
    # As one vector, and on a CPU in parts that stay in the cache: 20 times as fast as count_nonzero or (x != 0).sum().
    flat = x.as_strided((x.numel(),), (1,)) if _is_dense(x) else x.flatten()
    nonzero: list[Tensor] = []
    largest: list[Tensor] = []
    for part in flat.split(PART) if x.device.type == "cpu" else [flat]:
        sign = part.sign()
        nonzero.append(torch.dot(sign, sign))
        largest += part.aminmax()
    return torch.stack(nonzero).sum(), torch.stack(largest).abs().amax()


def _is_dense(x: Tensor) -> bool:
    """Whether the elements of x lie side by side, in whatever order."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


class _Group:
    """Layers with the same number of channels: their share of the flat tensor, and what is gathered of them.

    The views have a first dimension for `OUTPUT` and `INPUT`, and one for the layers.
    """

    def __init__(self, layers: list[int], channels: int) -> None:
        self.layers = layers
        self.shapes: dict[str, tuple[int, ...]] = {name: (2, len(layers)) for name in ("count", "zeros", "max_abs")}
        self.shapes |= {name: (2, len(layers), channels) for name in ("mean", "squares")}
        self.size = sum(math.prod(shape) for shape in self.shapes.values())

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Of the last dimension of `flat` [..., size]."""
        parts = flat.split([math.prod(shape) for shape in self.shapes.values()], dim=-1)
        return {
            name: part.view(*flat.shape[:-1], *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def use(self, flat: Tensor, tracks_emptiness: bool) -> None:
        sums = self.views(flat)
        self.count, self.mean, self.squares = sums["count"], sums["mean"], sums["squares"]
        self.zeros, self.max_abs = sums["zeros"], sums["max_abs"]
        self.tracks_emptiness = tracks_emptiness
        self.start_afresh()
        self.gathered: Tensor | None = None  # [2, elements, layers, channels]
        self.places: list[list[Tensor]] = []  # its views [elements, channels]

    def start_afresh(self) -> None:
        """To be called when the flat tensor has been zeroed."""
        self.empty = {(kind, place) for kind in (OUTPUT, INPUT) for place in range(len(self.layers))}
        self.waiting: set[tuple[int, int]] = set()  # of those that are gathered

    def add(self, kind: int, place: int, x: Tensor, dim: int) -> None:
        """Count what one layer's activation module made or was given."""
        values = x.float()
        mean, squares = _mean_and_squares(values, dim)
        at = (kind, place)
        self.merge(at, {at}, values.numel() // len(mean), mean, squares)
        if kind == OUTPUT:
            nonzero, largest = _nonzero_and_largest(values)
            self.zeros[at] += values.numel() - nonzero
            torch.maximum(self.max_abs[at], largest, out=self.max_abs[at])

    def merge(self, at: Any, slots: set[tuple[int, int]], added: int, mean: Tensor, squares: Tensor) -> None:
        """Count so many more elements of each channel in the places `at`, which are those of `slots`."""
        count = self.count[at]
        if self.tracks_emptiness and slots <= self.empty:
            self.empty -= slots
            self.mean[at], self.squares[at] = mean, squares
            count += added
            return
        weight = (added / (count + added)).unsqueeze(-1)
        delta = mean - self.mean[at]
        self.squares[at] += squares + delta.square() * (count.unsqueeze(-1) * weight)
        self.mean[at] += delta * weight
        count += added
        self.empty -= slots

    def gather(self, kind: int, place: int, rows: Tensor) -> None:
        """Keep a copy of a small [elements, channels] to be counted with the others."""
        slot = (kind, place)
        fits = self.gathered is not None and self.gathered.shape[1] == len(rows)
        if slot in self.waiting or not fits:
            self.count_gathered()
        if not fits:
            self.gathered = torch.empty(2, len(rows), *self.mean.shape[1:], device=rows.device)
            self.places = [list(each.unbind(1)) for each in self.gathered]
        self.places[kind][place].copy_(rows)
        self.waiting.add(slot)

    def count_gathered(self) -> None:
        waiting, self.waiting = self.waiting, set()
        if not waiting:
            return
        assert self.gathered is not None
        if len(waiting) < 2 * len(self.layers):
            for kind, place in sorted(waiting):
                self.add(kind, place, self.places[kind][place], 1)
            return
        _, elements, layers, channels = self.gathered.shape
        for kind, values in enumerate(self.gathered.flatten(2)):
            mean, squares = (each.view(layers, channels) for each in _mean_and_squares(values, 1))
            self.merge(kind, {slot for slot in waiting if slot[0] == kind}, elements, mean, squares)
        outputs = self.gathered[OUTPUT].flatten(1)
        largest = torch.maximum(outputs.amax(0), -outputs.amin(0)).view(layers, channels).amax(1)
        torch.maximum(self.max_abs[OUTPUT], largest, out=self.max_abs[OUTPUT])
        nonzero = outputs.sign().square_().sum(0).view(layers, channels).sum(1)
        self.zeros[OUTPUT] += elements * channels - nonzero

    def figures(self, flat: Tensor) -> Tensor:
        """All but the last field, [..., layers, FIELDS - 1], of what was in the flat tensor's share."""
        sums = self.views(flat)
        means = sums["mean"]
        mean = means.mean(-1)
        # law of total variance: every channel has the same count
        within = (sums["squares"] / sums["count"].unsqueeze(-1)).mean(-1)
        variance = within + (means - mean.unsqueeze(-1)).square().mean(-1)
        norm = means.square().mean(-1).sqrt()
        zero_fraction = sums["zeros"] / (sums["count"] * means.shape[-1])
        moments = torch.stack([mean, variance, norm], dim=-1)  # [..., 2, layers, 3]
        extremes = torch.stack([zero_fraction, sums["max_abs"]], dim=-1)
        return torch.cat([moments.select(-3, OUTPUT), extremes.select(-3, OUTPUT), moments.select(-3, INPUT)], dim=-1)


class ActivationStatistics:
    """Measures the activations of every layer of `model` that has an activation module.

    Args:
        model: a network (see `bipolar.networks`), not compiled yet.
        sample: a few prepared inputs, for one forward pass that finds the number of channels of each layer.
        dim: the channel dimension of the activations.
        always_hooked: needed where the model will be compiled. Otherwise hooks are on it while it is measured only.
    """

    def __init__(self, model: nn.Module, sample: Tensor, dim: int = 1, *, always_hooked: bool = True) -> None:
        layers = [layer for layer in layers_of(model) if layer.activation is not None]
        self.names = [layer.name for layer in layers]
        self.enabled = False
        self._linears = [layer.linear for layer in layers]
        self._modules = [layer.activation for layer in layers if layer.activation is not None]
        self._recurrent = model if isinstance(model, Recurrent) else None
        self._dim = dim if self._recurrent is None else -1
        self._always_hooked = always_hooked
        by_channels: dict[int, list[int]] = defaultdict(list)
        for index, channels in enumerate(_channels(model, self._modules, sample, self._dim)):
            by_channels[channels].append(index)
        self._groups = [_Group(members, channels) for channels, members in by_channels.items()]
        self._sizes = [group.size for group in self._groups]
        self._flat = torch.zeros(sum(self._sizes), device=sample.device)
        for group, flat in zip(self._groups, self._flat.split(self._sizes), strict=True):
            # Compiled hooks cannot keep track of what they have filled.
            group.use(flat, tracks_emptiness=not always_hooked)
        places = [(group, place, index) for group in self._groups for place, index in enumerate(group.layers)]
        self._places = {index: (group, place) for group, place, index in places}
        self._order = torch.tensor([index for *_, index in places], device=sample.device).argsort()
        self._removals: list[Callable[[], None]] = []
        if always_hooked:
            self._hook()

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        if self._recurrent is not None:
            # it computes many layers at once, so that their activation modules are not called
            observers = self._recurrent.observers
            observers.append(self._observe)
            self._removals.append(lambda: observers.remove(self._observe))
            return
        for index, module in enumerate(self._modules):
            # The pre-activation is measured before the activation runs: an in-place one overwrites it.
            handles = (
                module.register_forward_pre_hook(self._before(index)),
                module.register_forward_hook(self._after(index)),
            )
            self._removals += [handle.remove for handle in handles]

    def remove(self) -> None:
        """Take the hooks off the model."""
        while self._removals:
            self._removals.pop()()

    def _before(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self.enabled:
                self._add(INPUT, index, args[0])

        return hook

    def _after(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self.enabled:
                self._add(OUTPUT, index, output)

        return hook

    def _observe(self, layer: int, pre: Tensor, output: Tensor) -> None:
        if self.enabled:
            self._add(INPUT, layer, pre)
            self._add(OUTPUT, layer, output)

    def _add(self, kind: int, index: int, x: Tensor) -> None:
        group, place = self._places[index]
        x = x.detach()
        if x.numel() <= SMALL and not torch.compiler.is_compiling() and (rows := _rows(x, self._dim)) is not None:
            group.gather(kind, place, rows)
        else:
            group.add(kind, place, x, self._dim)

    @contextmanager
    def measuring(self, on: bool = True) -> Iterator[None]:
        """Count the forward passes inside."""
        if not self._always_hooked and on != bool(self._removals):
            self._hook() if on else self.remove()
        self.enabled = on
        try:
            yield
        finally:
            self.enabled = False

    # -- figures -----------------------------------------------------------------------------------------------------

    def take(self) -> Tensor:
        """What was measured since the last call: [layers, FIELDS], on the device. Starts afresh.

        Gradients are those that the weights have now; NaN where they have none.
        """
        return self.tables([self.snapshot()])[0]

    @torch.no_grad()
    def snapshot(self) -> Tensor:
        """The same as sums, of which `tables` makes figures."""
        for group in self._groups:
            group.count_gathered()
        result = torch.cat([self._flat, self._squared_gradient_norms()])
        self._flat.zero_()
        for group in self._groups:
            group.start_afresh()
        return result

    @torch.no_grad()
    def tables(self, snapshots: Sequence[Tensor]) -> Tensor:
        """[snapshots, layers, FIELDS], on the device."""
        *shares, squared_norms = torch.stack(list(snapshots)).split([*self._sizes, len(self.names)], dim=1)
        figures = [group.figures(share) for group, share in zip(self._groups, shares, strict=True)]
        ordered = torch.cat(figures, dim=1)[:, self._order]
        return torch.cat([ordered, squared_norms.sqrt().unsqueeze(-1)], dim=2)

    def _squared_gradient_norms(self) -> Tensor:
        """[layers]."""
        norms = []
        for linear in self._linears:
            gradient = gradient_of(linear)
            if gradient is None:
                norms.append(self._flat.new_full((), torch.nan))
            else:
                flat = gradient.float().flatten()
                norms.append(torch.dot(flat, flat))
        return torch.stack(norms)


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
