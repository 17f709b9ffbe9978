"""The deep vanilla RNN of the paper's claim 5: stacked recurrent layers without gates, in residual blocks.

As in the authors' code: h[l, t] = f(W_l x[l, t] + U_l h[l, t - 1] + b_l); a stream runs past blocks of 4 layers, each
of which reads it and adds its output to it; dropout between layers, a recurrent dropout whose mask all times share, and
blocks that are skipped at random. Where their code is not known to this project, what was chosen is said below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from bipolar.activations import BatchAxisReLU, Bipolar
from bipolar.errors import ConfigError, check_bool, check_choice, check_float, check_int
from bipolar.networks import Layer, MakeActivation
from bipolar.networks.elementwise import Activation, is_elementwise
from bipolar.networks.wavefront import Masks, Observer, Wiring, cell_by_cell, wavefront

EMBEDDINGS = ("fixed", "learned")
SKIPS = ("step", "sequence")
ENGINES = ("auto", "wavefront", "loop")


class Cell(nn.Module):
    """One layer of a `RecurrentStack`: W x + U h + b. Its tensors are views of the stack's."""

    def __init__(self, stack: RecurrentStack, index: int) -> None:
        super().__init__()
        self._stack = (stack,)  # in a tuple, or it would be a submodule of its own submodule
        self.index = index

    @property
    def weight(self) -> Tensor:
        """[H, 2 H]: W and U side by side."""
        return self._stack[0].weight[self.index]

    @property
    def input_weight(self) -> Tensor:
        """W [H, H]."""
        return self.weight[:, : self._stack[0].width]

    @property
    def recurrent_weight(self) -> Tensor:
        """U [H, H]."""
        return self.weight[:, self._stack[0].width :]

    @property
    def bias(self) -> Tensor:
        """[H]."""
        return self._stack[0].bias[self.index]

    @property
    def embedding_share_behind(self) -> float | None:
        """Of the stream that is read behind this layer, see `Wiring`; None where the layer itself is read."""
        blocks, place = divmod(self.index + 1, self._stack[0].wiring.block_size)
        return self._stack[0].wiring.embedding_share(blocks) if place == 0 else None

    @property
    def gradient(self) -> Tensor | None:
        """Of `weight`."""
        gradient = self._stack[0].weight.grad
        return None if gradient is None else gradient[self.index]

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return _cell(self.input_weight, self.recurrent_weight, self.bias, x, h)


def _cell(w: Tensor, u: Tensor, bias: Tensor, x: Tensor, h: Tensor) -> Tensor:
    return F.linear(x, w, bias) + F.linear(h, u)


class RecurrentStack(nn.Module):
    """All the recurrent layers: [B, T, H] and a state [L, B, H] to [B, T, H] and the next state.

    Args: see `RNN`. The weights of all layers are one parameter `weight` [L, H, 2 H], the biases `bias` [L, H].
    """

    def __init__(
        self,
        depth: int,
        width: int,
        activation: MakeActivation,
        block_size: int,
        stream_factor: float,
        skip: float,
        skip_per: str,
        dropout: float,
        recurrent_dropout: float,
        engine: str,
    ) -> None:
        super().__init__()
        self.depth, self.width = depth, width
        self.wiring = Wiring(block_size, stream_factor)
        self.skip, self.skip_per = skip, skip_per
        self.dropout, self.recurrent_dropout = dropout, recurrent_dropout
        self.engine = engine
        self.weight = nn.Parameter(torch.randn(depth, width, 2 * width) / math.sqrt(2 * width))
        self.bias = nn.Parameter(torch.zeros(depth, width))
        self.activations = nn.ModuleList([activation() for _ in range(depth)])
        self.cells = nn.ModuleList([Cell(self, index) for index in range(depth)])
        for each in self.activations:
            if isinstance(each, Bipolar) and each.dim not in (1, -1):
                raise ConfigError(f"it needs activation.dim=1, the features of a layer's [N, units], not {each.dim}")
        self.observers: list[Observer] = []
        """Called in every forward pass with a layer's number, its pre-activations and its activations [..., H]: once a
        layer, or once a cell."""
        if engine == "wavefront" and self._common_activation() is None:
            raise ConfigError(
                f"engine=wavefront is not possible with {type(self.activations[0]).__name__}: it is for element-wise "
                "activations of torch, and their bipolar versions, that have no parameters, draw no numbers and do not "
                "work in place; choose auto or loop"
            )

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`state`: the activations of all layers before the first time; None: zeros."""
        x = x.transpose(0, 1)
        if state is None:
            state = x.new_zeros(self.depth, x.shape[1], self.width)
        masks = self.draw_masks(x) if self.training else Masks()
        activation = None if self.engine == "loop" else self._common_activation()
        if activation is None:
            # Views of each layer's tensors are made once: through a view made in every cell, the backward pass would
            # add up gradients as large as all layers together.
            w, u = (part.unbind() for part in self.weight.split(self.width, dim=2))
            cells = [partial(_cell, *tensors) for tensors in zip(w, u, self.bias.unbind(), strict=True)]
            output, state = cell_by_cell(x, state, cells, list(self.activations), self.wiring, masks, self._observer())
        else:
            output, state = _wavefront(
                x, state, self.weight, self.bias, activation, self.wiring, masks, self._observer()
            )
        return output.transpose(0, 1), state

    def _observer(self) -> Observer | None:
        if not self.observers:
            return None

        def observe(layer: int, pre: Tensor, output: Tensor) -> None:
            for observer in self.observers:
                observer(layer, pre, output)

        return observe

    def _common_activation(self) -> Activation | None:
        """The activation of all layers, for tensors [B, H, cells]; None where each layer must use its own on [B, H]."""
        first = self.activations[0]
        # The batch comes first there too, so that BatchAxisReLU means the same.
        if not isinstance(first, BatchAxisReLU) and not is_elementwise(first):
            return None
        if any(type(each) is not type(first) or repr(each) != repr(first) for each in self.activations):
            return None
        return Bipolar(first.fn, 1, first.pattern) if isinstance(first, Bipolar) else first

    def draw_masks(self, x: Tensor) -> Masks:
        """What is random in one pass over x [T, B, H], from torch's global generator."""
        times, batch, width = x.shape
        inputs = recurrent = skips = None
        if self.dropout:
            inputs = torch.empty(self.depth - 1, times, batch, width, dtype=torch.bool, device=x.device)
            for layer in inputs:
                _draw_kept(layer, self.dropout)
        if self.recurrent_dropout:
            kept = 1 - self.recurrent_dropout
            recurrent = x.new_empty(self.depth, batch, width).bernoulli_(kept).div_(kept)
        if self.skip:
            kept = 1 - self.skip
            blocks = self.depth // self.wiring.block_size
            draws = x.new_empty(blocks, times if self.skip_per == "step" else 1).bernoulli_(kept).div_(kept)
            skips = draws.expand(blocks, times).contiguous()
        return Masks(inputs, 1 / (1 - self.dropout), recurrent, skips)

    def extra_repr(self) -> str:
        return f"depth={self.depth}, width={self.width}, {self.wiring}"


def _draw_kept(mask: Tensor, dropped: float) -> None:
    """Make each element of a bool tensor true but with probability `dropped`.

    On a CPU from 16 random bits each, which is three times as fast as `bernoulli_`; the probability is then that to
    within 2^-17; those that are too near 0 or 1 for that are drawn by `bernoulli_`.
    """
    threshold = round(dropped * 2**16)
    if mask.device.type != "cpu" or not 2**6 <= threshold <= 2**16 - 2**6:
        mask.bernoulli_(1 - dropped)
        return
    bits = torch.empty(-(-mask.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    torch.ge(bits.view(torch.int16)[: mask.numel()], threshold - 2**15, out=mask.view(-1))


# Its loops over diagonals are for eager execution: torch.compile compiles what is around it. torch.compiler.disable is
# this too, but imports the compiler at once, which takes two seconds; and eager calls need neither.
_uncompiled_wavefront = _disable_dynamo(wavefront)


def _wavefront(*args: Any) -> tuple[Tensor, Tensor]:
    return _uncompiled_wavefront(*args) if torch.compiler.is_compiling() else wavefront(*args)


class RNN(nn.Module):
    """Characters [B, T] (integers) and a state to logits [B, T, classes] and the next state.

    The embedding is as wide as the layers. It is drawn from N(0, 1) and by default stays as drawn, as theirs does.
    Behind each block the stream s becomes a s + sqrt(1 - a^2) h, which keeps its variance (they scale a block's last
    weights in its place). While training, a block is skipped for all samples at once, its layers' states going on; what
    is not skipped is divided by the probability of that, as dropout does, so that evaluation needs no change.

    Args:
        input_shape: shape of a sample; its length does not matter.
        classes: number of characters.
        activation: makes the activation of each layer; it sees tensors [N, hidden_size].
        layers: recurrent layers, named `layer1` ... ; a multiple of `block_size`.
        hidden_size: units of each.
        block_size: layers of a block.
        stream_factor: a above. 0: plain stacked layers without a stream.
        skip: probability of skipping a block in training.
        skip_per: `step`: drawn anew for every time step, as in the authors' code; `sequence`: once a sequence.
        dropout: probability of dropping an input of a layer behind the first (a new mask for every time).
        recurrent_dropout: probability of dropping a unit's previous state (one mask for all times of a sequence).
        embedding: `fixed` or `learned`.
        tied: the output layer shares the (learned) embedding's weights; the embedding is then scaled by
            sqrt(hidden_size), so that both have unit variance to work with.
        engine: `wavefront` (a diagonal of cells at a time), `loop` (cell by cell, the definition) or `auto`: the first
            wherever the activation allows it.
    """

    feature_dim = -1

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        activation: MakeActivation,
        layers: int = 8,
        hidden_size: int = 128,
        block_size: int = 4,
        stream_factor: float = 0.99,
        skip: float = 0.025,
        skip_per: str = "step",
        dropout: float = 0.05,
        recurrent_dropout: float = 0.025,
        embedding: str = "fixed",
        tied: bool = False,
        engine: str = "auto",
    ) -> None:
        super().__init__()
        check_int("layers", layers)
        check_int("hidden_size", hidden_size)
        check_int("block_size", block_size)
        if layers % block_size:
            near = [size for size in (layers // block_size * block_size, -(-layers // block_size) * block_size) if size]
            raise ConfigError(
                f"layers={layers} is not allowed; give a multiple of block_size={block_size}, such as "
                + " or ".join(map(str, near))
            )
        check_float("stream_factor", stream_factor, 0, 1, open_high=True)
        for name, value in (("skip", skip), ("dropout", dropout), ("recurrent_dropout", recurrent_dropout)):
            check_float(name, value, 0, 1, open_high=True)
        check_choice("skip_per", skip_per, SKIPS)
        check_choice("embedding", embedding, EMBEDDINGS)
        check_choice("engine", engine, ENGINES)
        if check_bool("tied", tied) and embedding != "learned":
            raise ConfigError("tied=true needs embedding=learned: an output layer that cannot learn is of no use")
        self.embedding = nn.Embedding(classes, hidden_size)
        self.embedding.weight.requires_grad_(embedding == "learned")
        self.embedding_scale = math.sqrt(hidden_size) if tied else 1.0
        self.stack = RecurrentStack(
            layers, hidden_size, activation, block_size, stream_factor, skip, skip_per, dropout, recurrent_dropout,
            engine,
        )  # fmt: skip
        self.output = nn.Linear(hidden_size, classes)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`state`: see `RecurrentStack`."""
        x = self.embedding(tokens)
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        x, state = self.stack(x, state)
        return self.output(x), state

    def initial_state(self, tokens: Tensor) -> Tensor:
        """What a forward pass starts from where it is given no state: zeros [L, B, H]."""
        return self.stack.weight.new_zeros(self.stack.depth, len(tokens), self.stack.width)

    def layers(self) -> list[Layer]:
        stack = self.stack
        cells = [
            Layer(f"layer{index}", cell, activation)
            for index, (cell, activation) in enumerate(zip(stack.cells, stack.activations, strict=True), start=1)
        ]
        return [*cells, Layer("output", self.output, None)]

    @property
    def observers(self) -> list[Observer]:
        return self.stack.observers

    def probe(self, tokens: Tensor) -> Tensor:
        """One time step for initializations that look at data, as the authors' LSUV: random characters, states N(0, 1).

        It runs module by module, so that forward hooks on cells and activations fire.
        """
        batch = len(tokens)
        x = self.embedding(torch.randint_like(tokens[:, 0], self.embedding.num_embeddings)) * self.embedding_scale
        stack = self.stack
        state = torch.randn(stack.depth, batch, stack.width, dtype=x.dtype, device=x.device)
        stream, _ = cell_by_cell(
            x.view(1, batch, -1), state, list(stack.cells), list(stack.activations), stack.wiring, Masks()
        )
        return self.output(stream[0])
