"""The residual network for small images (He et al., arXiv:1512.03385, section 4.2), with and without BatchNorm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from bipolar.errors import ConfigError, check_choice, check_int
from bipolar.networks import Layer, MakeActivation
from bipolar.networks.normalization import make_norm

NORMS = ("none", "batch")
SHORTCUTS = ("A", "B")


class PaddedShortcut(nn.Module):
    """Type A: every second row and column of x [N, C, H, W], with zeros for the maps that are new; no weights."""

    def __init__(self, new_maps: int) -> None:
        super().__init__()
        self.new_maps = new_maps

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_maps))

    def extra_repr(self) -> str:
        return f"new_maps={self.new_maps}"


class ResidualBlock(nn.Module):
    """f(a shortcut(x) + b conv2(f(conv1(x)))), with a normalization after each convolution or with a² + b² = 1."""

    def __init__(
        self,
        channels: int,
        width: int,
        stride: int,
        activation: MakeActivation,
        norm: str,
        shortcut: str,
        branch_weight: float,
    ) -> None:
        super().__init__()
        bias = norm == "none"  # a normalization has a shift of its own
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=bias)
        self.norm1 = make_norm(norm, width, spatial_dims=2)
        self.activation1 = activation()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.norm2 = make_norm(norm, width, spatial_dims=2)
        self.activation2 = activation()
        self.shortcut: nn.Module | None = None
        self.shortcut_norm: nn.Module | None = None
        if stride != 1 or channels != width:
            if shortcut == "A":
                self.shortcut = PaddedShortcut(width - channels)
            else:
                self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=bias)
                self.shortcut_norm = make_norm(norm, width, spatial_dims=2)
        self.branch_weight = branch_weight
        self.stream_weight = math.sqrt(1 - branch_weight**2) if branch_weight < 1 else 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        if self.norm1 is not None:
            y = self.norm1(y)
        y = self.conv2(self.activation1(y))
        if self.norm2 is not None:
            y = self.norm2(y)
        if self.shortcut is not None:
            x = self.shortcut(x)
        if self.shortcut_norm is not None:
            x = self.shortcut_norm(x)
        if self.branch_weight != 1:
            x, y = x * self.stream_weight, y * self.branch_weight
        return self.activation2(x + y)

    def layers(self, name: str) -> list[Layer]:
        projection = [Layer(f"{name}.shortcut", self.shortcut, None)] if isinstance(self.shortcut, nn.Conv2d) else []
        return [
            Layer(f"{name}.conv1", self.conv1, self.activation1),
            Layer(f"{name}.conv2", self.conv2, self.activation2),
            *projection,
        ]


class ResNet(nn.Module):
    """Images [N, C, H, W] to logits [N, classes]: three stages of `(depth - 2) / 6` residual blocks, of which the
    second and third halve the resolution and double the width; global average pooling and a linear output layer.

    With `norm=none` a block adds its branch with weight b = 1/sqrt(number of blocks) to the stream with weight
    sqrt(1 - b²), as the stream of the authors' recurrent network does (0.99 there). Where an initialization gives
    every branch the variance of the stream (`he` and `lsuv` do, up to what the activation does to the sum), the sum
    keeps that variance at any depth. With `norm=batch` both weights are 1, as published.

    Args:
        input_shape: (C, H, W) of one image.
        classes: number of classes.
        activation: makes the activation of each layer; it sees feature maps [N, C, H, W].
        depth: 6n + 2 layers with weights on the longest path: 8, 14, 20, 32, 44, 56, 110, ...
        width: feature maps of the first stage.
        norm: none or batch.
        shortcut: where the width changes: `A` (strided, zero-padded identity) or `B` (1 x 1 convolution).
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        activation: MakeActivation,
        depth: int = 20,
        width: int = 16,
        norm: str = "batch",
        shortcut: str = "A",
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ConfigError(f"a ResNet needs images [C, H, W]; this data set has samples of {tuple(input_shape)}")
        check_int("depth", depth, 8)
        check_int("width", width)
        if (depth - 2) % 6:
            near = 6 * max(1, round((depth - 2) / 6)) + 2
            raise ConfigError(f"depth={depth} is not allowed; give 6n + 2, such as {near} (the nearest), 20, 44 or 110")
        check_choice("norm", norm, NORMS)
        check_choice("shortcut", shortcut, SHORTCUTS)
        blocks_per_stage = (depth - 2) // 6
        branch_weight = 1.0 if norm == "batch" else 1 / math.sqrt(3 * blocks_per_stage)
        self.conv1 = nn.Conv2d(input_shape[0], width, 3, padding=1, bias=norm == "none")
        self.norm1 = make_norm(norm, width, spatial_dims=2)
        self.activation1 = activation()
        channels = width
        blocks: list[nn.Module] = []
        for stage in range(3):
            for index in range(blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                maps = width * 2**stage
                blocks.append(ResidualBlock(channels, maps, stride, activation, norm, shortcut, branch_weight))
                channels = maps
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.output = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.norm1 is not None:
            x = self.norm1(x)
        return self.output(self.flatten(self.pool(self.blocks(self.activation1(x)))))

    def layers(self) -> list[Layer]:
        result = [Layer("conv1", self.conv1, self.activation1)]
        for index, block in enumerate(self.blocks, start=1):
            assert isinstance(block, ResidualBlock)
            result += block.layers(f"block{index}")
        return [*result, Layer("output", self.output, None)]
