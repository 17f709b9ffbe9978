"""Bipolar activation functions (Eidnes and Nøkland, arXiv:1709.04054, section 2).

For a base activation f and the index i of a unit (in a convolutional layer: of a feature map),

    bipolar(f)(x_i) =  f(x_i)   if i is even
                      -f(-x_i)  if i is odd

so that half of the units are flipped and the mean over a layer is pushed towards zero. With S the diagonal matrix of
the units' signs this is S f(S x). The index never runs over the batch: see `batch_axis_relu` for that misreading.

Everything here works with any rank, any number of features (odd ones too), any memory layout (which is kept), every
floating dtype, autocast, double backward, `torch.compile(fullgraph=True)`, `torch.func` and the meta device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bipolar import kernels
from bipolar.errors import check_choice

PATTERNS = kernels.PATTERNS


def flipped(features: int, pattern: str = "interleaved") -> slice:
    """The indices of the flipped features, as a slice."""
    return kernels.slices(features, pattern)[1]


def upright(features: int, pattern: str = "interleaved") -> slice:
    """The indices of the features that are not flipped, as a slice."""
    return kernels.slices(features, pattern)[0]


def signs(
    features: int,
    pattern: str = "interleaved",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The diagonal of S: a tensor [features] of +1, and -1 where a feature is flipped."""
    result = torch.ones(features, dtype=dtype, device=device)
    result[flipped(features, pattern)] = -1
    return result


def bipolar(fn: Callable[[Tensor], Tensor], x: Tensor, dim: int = 1, pattern: str = "interleaved") -> Tensor:
    """S fn(S x): the bipolar version of the element-wise function `fn` (arXiv:1709.04054, equation in section 2).

    Args:
        fn: the base activation: a function or module that acts on each element alone. It gets a tensor of its own,
            so an in-place one is safe.
        x: floating-point tensor of any shape and layout.
        dim: the feature dimension (a layer's units, or a convolution's feature maps).
        pattern: which features are flipped, see `PATTERNS`.

    Returns:
        A tensor like x: same shape, dtype and memory format. The gradient at 0 is the base function's in torch.

    Raises:
        ConfigError (a ValueError): unknown pattern. IndexError: x has no dimension `dim`. TypeError: x is not
        floating-point. ValueError: `fn` changes the shape.
    """
    if not x.is_floating_point():
        raise TypeError(f"a bipolar activation needs a floating-point tensor, not {x.dtype}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an integer, not {dim!r}")
    if not -x.ndim <= dim < x.ndim:
        raise IndexError(
            f"dim={dim} is not a dimension of a tensor of shape {tuple(x.shape)}; dim is the feature dimension"
        )
    dim %= x.ndim
    if kernels.is_relu(fn):
        return kernels.bipolar_relu(x, dim, pattern)
    if (parameters := kernels.elu_parameters(fn)) is not None:
        return kernels.bipolar_elu(x, dim, pattern, *parameters)
    sign = kernels.sign_of(x, dim, pattern)
    y = fn(x * sign)
    if y.shape != x.shape:
        raise ValueError(f"the base function made {tuple(y.shape)} of {tuple(x.shape)}; it must act element by element")
    return y * sign


class Bipolar(nn.Module):
    """The bipolar version of any element-wise activation, as a module: see `bipolar`."""

    def __init__(self, fn: Callable[[Tensor], Tensor], dim: int = 1, pattern: str = "interleaved") -> None:
        super().__init__()
        check_choice("pattern", pattern, PATTERNS)
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim must be an integer, not {dim!r}")
        self.fn = fn
        self.dim = dim
        self.pattern = pattern

    def forward(self, x: Tensor) -> Tensor:
        return bipolar(self.fn, x, self.dim, self.pattern)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, pattern={self.pattern!r}"


class BReLU(Bipolar):
    """Bipolar ReLU: max(x, 0) on upright features, min(x, 0) on flipped ones."""

    def __init__(self, dim: int = 1, pattern: str = "interleaved") -> None:
        super().__init__(nn.ReLU(), dim, pattern)


class BELU(Bipolar):
    """Bipolar ELU (Clevert et al., arXiv:1511.07289, for the base)."""

    def __init__(self, dim: int = 1, pattern: str = "interleaved", alpha: float = 1.0) -> None:
        super().__init__(nn.ELU(alpha), dim, pattern)


class BLeakyReLU(Bipolar):
    """Bipolar leaky ReLU."""

    def __init__(self, dim: int = 1, pattern: str = "interleaved", negative_slope: float = 0.01) -> None:
        super().__init__(nn.LeakyReLU(negative_slope), dim, pattern)


class BSELU(Bipolar):
    """Bipolar SELU (Klambauer et al., arXiv:1706.02515, for the base)."""

    def __init__(self, dim: int = 1, pattern: str = "interleaved") -> None:
        super().__init__(nn.SELU(), dim, pattern)


class BGELU(Bipolar):
    """Bipolar GELU (Hendrycks and Gimpel, arXiv:1606.08415, for the base)."""

    def __init__(self, dim: int = 1, pattern: str = "interleaved", approximate: str = "none") -> None:
        super().__init__(nn.GELU(check_choice("approximate", approximate, ("none", "tanh"))), dim, pattern)


class BSiLU(Bipolar):
    """Bipolar SiLU (also known as swish)."""

    def __init__(self, dim: int = 1, pattern: str = "interleaved") -> None:
        super().__init__(nn.SiLU(), dim, pattern)


def batch_axis_relu(x: Tensor) -> Tensor:
    """NOT the paper's function: ReLU flipped on the odd *rows of the batch* (dimension 0) instead of the odd features.

    This is what a widely copied PyTorch implementation computes. It is not a function of one sample: what a row
    becomes depends on its position in the batch, and with one row it is plain ReLU. It is here so that the reported
    failure can be reproduced. As in that implementation, the gradient at 0 is 1 on even rows and 0 on odd ones.
    """
    if x.ndim == 0:
        raise IndexError("batch_axis_relu needs a batch dimension")
    even = torch.arange(x.shape[0], device=x.device) % 2 == 0
    # masked_fill and not clamp: torch releases differ in clamp's gradient at its bound
    even = even.view(-1, *[1] * (x.ndim - 1))
    return torch.where(even, x.masked_fill(x < 0, 0), -F.relu(-x))


class BatchAxisReLU(nn.Module):
    """`batch_axis_relu` as a module: not the paper's function."""

    def forward(self, x: Tensor) -> Tensor:
        return batch_axis_relu(x)
