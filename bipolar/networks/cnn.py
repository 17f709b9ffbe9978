"""The plain convolutional chain: no BatchNorm, no shortcuts (the setting of the paper's claim 4)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from bipolar.activations import Bipolar
from bipolar.errors import ConfigError, check_choice, check_float, check_int
from bipolar.networks import Layer, MakeActivation, layer_of_block
from bipolar.networks.normalization import NORMS, make_norm
from bipolar.networks.pooling import BipolarMaxPool2d

POOLS = ("max", "average", "stride", "bipolar_max")


def _make_pool(pool: str, activation: nn.Module) -> nn.Module:
    if pool == "bipolar_max" and isinstance(activation, Bipolar):
        return BipolarMaxPool2d(2, ceil_mode=True, pattern=activation.pattern)
    return (nn.AvgPool2d if pool == "average" else nn.MaxPool2d)(2, ceil_mode=True)


class CNN(nn.Module):
    """Images [N, C, H, W] to logits [N, classes]: convolutions, global average pooling, a linear output layer.

    Wherever the width changes from one layer to the next, the resolution is halved (rounded up): by a pooling of
    2 x 2 between the two (`max`, `average`, `bipolar_max`) or by a stride of 2 in the second convolution (`stride`).
    `bipolar_max` takes the pattern of the activation; behind one that is not bipolar it is plain max pooling.

    Args:
        input_shape: (C, H, W) of one image.
        classes: number of classes.
        activation: makes the activation of each layer; it sees tensors [N, widths[i], H, W].
        widths: number of feature maps of each convolution, named `conv1`, `conv2`, ...
        kernel_size: odd; the padding keeps the resolution.
        pool: how the resolution is halved, see `POOLS`.
        norm: normalization between the convolution and the activation, see `NORMS`.
        dropout: probability of dropping a whole feature map, after the activation.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        activation: MakeActivation,
        widths: Sequence[int] = (32, 32, 64, 64, 128, 128),
        kernel_size: int = 3,
        pool: str = "max",
        norm: str = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ConfigError(f"a CNN needs images [C, H, W]; this data set has samples of shape {tuple(input_shape)}")
        if not isinstance(widths, (list, tuple)) or not widths:
            raise ConfigError(f"widths={widths!r} is not allowed; give a list of integers, such as [32,32,64,64]")
        for width in widths:
            check_int("widths", width)
        check_int("kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size={kernel_size} is not allowed; give an odd integer")
        check_choice("pool", pool, POOLS)
        check_choice("norm", norm, NORMS)
        check_float("dropout", dropout, 0, 1, open_high=True)

        channels = input_shape[0]
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for index, width in enumerate(widths):
            halves = index > 0 and width != widths[index - 1]
            block: OrderedDict[str, nn.Module] = OrderedDict()
            if halves and pool != "stride":
                block["pool"] = _make_pool(pool, activation())
            stride = 2 if halves and pool == "stride" else 1
            block["conv"] = nn.Conv2d(channels, width, kernel_size, stride, padding=kernel_size // 2)
            if (normalization := make_norm(norm, width, spatial_dims=2)) is not None:
                block["norm"] = normalization
            block["activation"] = activation()
            if dropout:
                block["dropout"] = nn.Dropout2d(dropout)
            blocks[f"conv{index + 1}"] = nn.Sequential(block)
            channels = width
        self.features = nn.Sequential(blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.output = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.flatten(self.pool(self.features(x))))

    def layers(self) -> list[Layer]:
        convolutions = [layer_of_block(name, block, "conv") for name, block in self.features.named_children()]
        return [*convolutions, Layer("output", self.output, None)]
