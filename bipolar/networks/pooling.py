"""Max pooling that knows which feature maps are flipped."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bipolar.activations import PATTERNS, signs
from bipolar.errors import check_choice

Size = int | tuple[int, int]


class BipolarMaxPool2d(nn.Module):
    """S maxpool(S x) of feature maps x [N, C, H, W]: the largest value of an upright map, the smallest of a flipped.

    Plain max pooling is not odd: behind a bipolar activation it keeps the largest value everywhere, which in a flipped
    map is the one nearest zero. This one treats a flipped map as the base network treats its twin, so that it keeps
    the sign-flip symmetry (`bipolar/symmetry.py`). An idea of this project, not of the paper.

    Args:
        kernel_size, stride, ceil_mode: as `torch.nn.MaxPool2d`.
        pattern: which maps are flipped, as of the activation in front, see `bipolar.activations.PATTERNS`.
    """

    def __init__(
        self, kernel_size: Size, stride: Size | None = None, ceil_mode: bool = False, pattern: str = "interleaved"
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.ceil_mode = ceil_mode
        self.pattern = check_choice("pattern", pattern, PATTERNS)

    def forward(self, x: Tensor) -> Tensor:
        sign = signs(x.shape[1], self.pattern, dtype=x.dtype, device=x.device).view(-1, 1, 1)
        return F.max_pool2d(x * sign, self.kernel_size, self.stride, ceil_mode=self.ceil_mode) * sign

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, pattern={self.pattern!r}"
