"""The multi-layer perceptron: `depth` hidden layers of `width` units, then a linear output layer."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from bipolar.errors import check_choice, check_float, check_int
from bipolar.networks import Layer, MakeActivation, layer_of_block
from bipolar.networks.normalization import NORMS, make_norm


class MLP(nn.Module):
    """Input of any shape [N, ...] (flattened) to logits [N, classes].

    Args:
        input_shape: shape of one sample.
        classes: number of classes.
        activation: makes the activation of each hidden layer; it sees tensors [N, width].
        depth: number of hidden layers, named `layer1` ... `layer<depth>`.
        width: units of each hidden layer.
        norm: normalization between the linear map and the activation, see `NORMS`.
        dropout: probability of dropping a unit, after the activation.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        activation: MakeActivation,
        depth: int = 8,
        width: int = 128,
        norm: str = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_int("depth", depth)
        check_int("width", width)
        check_choice("norm", norm, NORMS)
        check_float("dropout", dropout, 0, 1, open_high=True)
        fan_in = math.prod(input_shape)
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for index in range(1, depth + 1):
            block: OrderedDict[str, nn.Module] = OrderedDict(linear=nn.Linear(fan_in, width))
            if (normalization := make_norm(norm, width, spatial_dims=0)) is not None:
                block["norm"] = normalization
            block["activation"] = activation()
            if dropout:
                block["dropout"] = nn.Dropout(dropout)
            blocks[f"layer{index}"] = nn.Sequential(block)
            fan_in = width
        self.flatten = nn.Flatten()
        self.hidden = nn.Sequential(blocks)
        self.output = nn.Linear(fan_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(self.flatten(x)))

    def layers(self) -> list[Layer]:
        hidden = [layer_of_block(name, block, "linear") for name, block in self.hidden.named_children()]
        return [*hidden, Layer("output", self.output, None)]
