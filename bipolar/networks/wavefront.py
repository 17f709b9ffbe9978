"""The cells of a stack of recurrent layers, computed a diagonal at a time.

The cell of layer l at time t needs those at (l - 1, t) and (l, t - 1) only. So the cells of one anti-diagonal, l + t
constant, do not depend on each other: they are one batched matrix product in place of many small ones. Forward and
backward pass take layers + times - 1 such products, and the gradients of the weights are one product per layer over
all times. What is computed is defined by `cell_by_cell` below; `tests/test_rnn.py` holds the two against each other.

Memory: one activation per cell; where an output does not tell the slope (see `elementwise.py`), one pre-activation too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bipolar.networks.elementwise import Activation, Elementwise, elementwise

Observer = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Masks:
    """What is random in one pass through a stack of L layers over T times, drawn beforehand; None for none.

    inputs: bool [L - 1, T, B, H]: which inputs of the layers behind the first are kept, *latest time first*; what is
        kept is multiplied by `inputs_scale`.
    recurrent: [L, B, H]: factors of the previous states, the same at all times.
    skips: [blocks, T]: factors of the blocks' outputs, latest time first.
    """

    inputs: Tensor | None = None
    inputs_scale: float = 1.0
    recurrent: Tensor | None = None
    skips: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Masks:
        """With factors of this dtype."""
        recurrent = None if self.recurrent is None else self.recurrent.to(dtype)
        return replace(self, recurrent=recurrent, skips=None if self.skips is None else self.skips.to(dtype))


@dataclass(frozen=True)
class Wiring:
    """How the layers are joined: in blocks of `block_size` layers, each of which adds its output to a stream.

    Behind a block the stream s becomes a s + sqrt(1 - a^2) h, with a = `stream_factor` and the block's output h: of
    independent s and h of variance 1 it makes a stream of variance 1.
    """

    block_size: int
    stream_factor: float

    @property
    def branch_factor(self) -> float:
        return math.sqrt(1 - self.stream_factor**2)

    def embedding_share(self, blocks: int) -> float:
        """How much of the stream's second moment behind so many blocks is the embedding's; the rest is the blocks'."""
        return float(self.stream_factor ** (2 * blocks))


def cell_by_cell(
    inputs: Tensor,
    state: Tensor,
    cells: Sequence[Callable[[Tensor, Tensor], Tensor]],
    activations: Sequence[Activation],
    wiring: Wiring,
    masks: Masks,
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: h[l, t] = f(W_l x[l, t] + U_l h[l, t - 1] + b_l), cell after cell.

    Args:
        inputs: [T, B, H], what the first block reads.
        state: [L, B, H], the layers' activations before the first time.
        cells: of each layer, (x, h) -> pre-activation.
        activations: of each layer.
        observe: called with the layer's number, the pre-activation and the activation of each cell.

    Returns:
        The stream behind the last block [T, B, H], and the layers' activations at the last time [L, B, H].
    """
    times, states, outputs = len(inputs), list(state.unbind()), []
    for time in range(times):
        stream, column = inputs[time], times - 1 - time
        h = stream
        for layer, (cell, activation) in enumerate(zip(cells, activations, strict=True)):
            block, place = divmod(layer, wiring.block_size)
            x, previous = (stream if place == 0 else h), states[layer]
            if masks.inputs is not None and layer > 0:
                x = x * masks.inputs[layer - 1, column] * masks.inputs_scale
            if masks.recurrent is not None:
                previous = previous * masks.recurrent[layer]
            pre = cell(x, previous)
            h = states[layer] = activation(pre)
            if observe is not None:
                observe(layer, pre.detach(), h.detach())
            if place == wiring.block_size - 1:
                branch = h * wiring.branch_factor
                if masks.skips is not None:
                    branch = branch * masks.skips[block, column]
                stream = stream * wiring.stream_factor + branch
        outputs.append(stream)
    return torch.stack(outputs), torch.stack(states)


def wavefront(
    inputs: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: Activation,
    wiring: Wiring,
    masks: Masks,
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """`cell_by_cell`, a diagonal at a time.

    Args:
        weight: [L, H, 2 H], the matrices W (of the input) and U (of the state) of each layer side by side.
        bias: [L, H].
        activation: of all layers: without parameters; it is given tensors [B, H, cells], and acts on each cell alone.
        observe: called once for each layer, with all its times, latest first: [T, B, H].

    The result is differentiable once. Under autocast everything is computed in its dtype.
    """
    device = inputs.device.type
    is_mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_mixed else weight.dtype
    arguments = (inputs.to(dtype), state.to(dtype), weight.to(dtype), bias.to(dtype))
    masks = masks.to(dtype)
    with torch.autocast(device, enabled=False) if is_mixed else nullcontext():
        stream, final = _Wavefront.apply(*arguments, elementwise(activation), wiring, masks, observe)
    return stream, final


class _Grid:
    """Views of the cells of one diagonal in arrays [L, rows, B, H] that hold the latest time first.

    With time running backwards in memory, the next layer's cell of the same diagonal lies a fixed distance ahead, so
    that a diagonal is an ordinary strided tensor: nothing is skewed or padded.
    """

    def __init__(self, layers: int, times: int, diagonal: int) -> None:
        self.times, self.diagonal = times, diagonal
        self.first = max(0, diagonal - times + 1)
        self.last = min(layers - 1, diagonal)

    def __len__(self) -> int:
        return self.last - self.first + 1

    def row(self, layer: int) -> int:
        """Where the time of the diagonal's cell of `layer` stands."""
        return self.times - 1 - self.diagonal + layer

    def cells(self, array: Tensor, first: int, last: int, *, shift: int = 0, later: int = 0, step: int = 1) -> Tensor:
        """Of the layers first, first + step, ..., last: the entry (layer + shift, row + later), as [cells, B, H].

        With a step the array has one entry for every `step` layers: (layer // step + shift, row + later).
        """
        layer_stride, row_stride, *tail = array.stride()
        start = (first // step + shift) * layer_stride + (self.row(first) + later) * row_stride
        size = ((last - first) // step + 1, *array.shape[2:])
        return array.as_strided(size, (layer_stride + step * row_stride, *tail), array.storage_offset() + start)

    def at_place(self, place: int, block_size: int, high: int | None = None) -> tuple[int, int] | None:
        """The first and the last layer (up to `high`) that stand at `place` in their block; None where none does."""
        low, high = self.first, self.last if high is None else high
        first = low + (place - low) % block_size
        last = high - (high - place) % block_size
        return (first, last) if first <= last else None


class _Wavefront(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        state: Tensor,
        weight: Tensor,
        bias: Tensor,
        activation: Elementwise,
        wiring: Wiring,
        masks: Masks,
        observe: Observer | None,
    ) -> tuple[Tensor, Tensor]:
        times, batch, width = inputs.shape
        layers, size = len(weight), wiring.block_size
        blocks = layers // size
        if masks.inputs_scale != 1:  # the factor of the inputs that are kept goes into W: one multiplication a layer
            weight = weight.clone()
            weight[1:, :, :width] *= masks.inputs_scale
        keep = None if masks.inputs is None else masks.inputs.view(torch.uint8)  # a factor twice as fast as a bool
        h = inputs.new_empty(layers, times + 1, batch, width)  # the last row is the state before the first time
        h[:, times] = state
        pre = None
        if not activation.keeps_output or observe is not None:
            pre = inputs.new_empty(layers, times, batch, width)
        stream = inputs.new_empty(blocks + 1, times, batch, width)
        stream[0] = inputs.flip(0)
        # What the cells of a diagonal read, the layer below and the state side by side, and their pre-activations.
        x_and_h, z = inputs.new_empty(layers, batch, 2 * width), inputs.new_empty(layers, batch, width)
        for diagonal in range(layers + times - 1):
            grid = _Grid(layers, times, diagonal)
            low, high = grid.first, grid.last
            here = slice(low, high + 1)
            read, z_here, h_here = x_and_h[: len(grid)], z[: len(grid)], grid.cells(h, low, high)
            _gather_inputs(grid, h, stream, keep, size, read[:, :, :width])
            previous = grid.cells(h, low, high, later=1)
            if masks.recurrent is None:
                read[:, :, width:] = previous
            else:
                torch.mul(previous, masks.recurrent[here], out=read[:, :, width:])
            torch.baddbmm(bias[here, None], read, weight[here].mT, out=z_here)
            if pre is not None:
                grid.cells(pre, low, high).copy_(z_here)
            activation.forward(z_here, h_here)
            if ends := grid.at_place(size - 1, size):
                branch = h_here[ends[0] - low : ends[1] - low + 1 : size] * wiring.branch_factor
                if masks.skips is not None:
                    branch *= grid.cells(masks.skips, *ends, step=size)[:, None, None]
                before = grid.cells(stream, *ends, step=size)
                torch.add(branch, before, alpha=wiring.stream_factor, out=grid.cells(stream, *ends, shift=1, step=size))
        if observe is not None:
            assert pre is not None
            for layer in range(layers):
                observe(layer, pre[layer], h[layer, :times])
        ctx.save_for_backward(
            weight, h, None if activation.keeps_output else pre, stream, keep, masks.recurrent, masks.skips
        )
        ctx.activation, ctx.wiring, ctx.inputs_scale = activation, wiring, masks.inputs_scale
        return stream[blocks].flip(0), h[:, 0].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight, h, pre, stream, keep, recurrent, skips = ctx.saved_tensors
        wiring, activation = ctx.wiring, ctx.activation
        layers, rows, batch, width = h.shape
        times, size = rows - 1, wiring.block_size
        blocks = layers // size
        w, u = weight[:, :, :width], weight[:, :, width:]
        grad_stream = torch.empty_like(stream)
        grad_stream[blocks] = grads[0].flip(0)
        grad_final, grad_state = grads[1], torch.empty_like(h[:, 0])
        grad_h, grad_x = h.new_empty(layers, batch, width), h.new_empty(layers, batch, width)
        # The gradients of the pre-activations take the place of these, which a cell needs once.
        grad_pre = h.new_empty(layers, times, batch, width) if activation.keeps_output else pre
        for diagonal in range(layers + times - 2, -1, -1):
            grid = _Grid(layers, times, diagonal)
            low, high = grid.first, grid.last
            grad_here = grad_h[: len(grid)]
            # (l, t + 1) reads h[l, t] as its state. At the last time that is the state that is handed on.
            ahead = low
            if grid.row(low) == 0:
                grad_here[0] = grad_final[low]
                ahead = low + 1
            if ahead <= high:
                through = grad_here[ahead - low :]
                torch.bmm(grid.cells(grad_pre, ahead, high, later=-1), u[ahead : high + 1], out=through)
                if recurrent is not None:
                    through.mul_(recurrent[ahead : high + 1])
            # (l + 1, t) reads h[l, t], or the stream where a block begins.
            above = min(high, layers - 2)
            if low <= above:
                through = grad_x[: above - low + 1]
                torch.bmm(grid.cells(grad_pre, low, above, shift=1), w[low + 1 : above + 2], out=through)
                if keep is not None:
                    through.mul_(grid.cells(keep, low, above))
                if ends := grid.at_place(size - 1, size, above):
                    at = through[ends[0] - low : ends[1] - low + 1 : size]
                    grid.cells(grad_stream, *ends, shift=1, step=size).add_(at)
                    at.zero_()
                grad_here[: len(through)].add_(through)
            if ends := grid.at_place(size - 1, size):
                behind = grid.cells(grad_stream, *ends, shift=1, step=size)
                branch = behind * wiring.branch_factor
                if skips is not None:
                    branch *= grid.cells(skips, *ends, step=size)[:, None, None]
                grad_here[ends[0] - low : ends[1] - low + 1 : size].add_(branch)
                torch.mul(behind, wiring.stream_factor, out=grid.cells(grad_stream, *ends, step=size))
            kept = grid.cells(h if activation.keeps_output else pre, low, high)
            activation.backward(grad_here, kept, grid.cells(grad_pre, low, high))
        for layer in range(layers):
            torch.mm(grad_pre[layer, times - 1], u[layer], out=grad_state[layer])
        if recurrent is not None:
            grad_state *= recurrent
        grad_inputs = None
        if ctx.needs_input_grad[0]:
            grad_inputs = (grad_stream[0] + torch.matmul(grad_pre[0], w[0])).flip(0)
        grad_weight = _weight_gradients(grad_pre, h, stream, weight, keep, recurrent, size)
        grad_weight[1:, :, :width] *= ctx.inputs_scale
        return grad_inputs, grad_state, grad_weight, grad_pre.sum((1, 2)), None, None, None, None


def _gather_inputs(grid: _Grid, h: Tensor, stream: Tensor, keep: Tensor | None, block_size: int, x: Tensor) -> None:
    """Into `x` what the cells of the diagonal read: the layer below, or the stream where a block begins."""
    first = max(grid.first, 1)
    if grid.last >= 1:
        x[first - grid.first :] = grid.cells(h, first, grid.last, shift=-1)
    if starts := grid.at_place(0, block_size):
        x[starts[0] - grid.first : starts[1] - grid.first + 1 : block_size] = grid.cells(
            stream, *starts, step=block_size
        )
    if keep is not None and grid.last >= 1:
        x[first - grid.first :].mul_(grid.cells(keep, first, grid.last, shift=-1))


def _weight_gradients(
    grad_pre: Tensor,
    h: Tensor,
    stream: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    recurrent: Tensor | None,
    block_size: int,
) -> Tensor:
    """One product per matrix, over all times at once."""
    layers, times, _, width = grad_pre.shape
    grad = torch.empty_like(weight)
    for layer in range(layers):
        block, place = divmod(layer, block_size)
        x = stream[block] if place == 0 else h[layer - 1, :times]
        if keep is not None and layer > 0:
            x = x * keep[layer - 1]
        previous = h[layer, 1:]
        if recurrent is not None:
            previous = previous * recurrent[layer]
        gradient = grad_pre[layer].flatten(0, 1).T
        torch.mm(gradient, x.flatten(0, 1), out=grad[layer, :, :width])
        torch.mm(gradient, previous.flatten(0, 1), out=grad[layer, :, width:])
    return grad
