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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bipolar.errors import check_choice

PATTERNS = ("interleaved", "halves")
"""`interleaved`: odd indices are flipped (the paper's formula). `halves`: the first half of the indices is flipped
(the authors' code). Both flip floor(n / 2) of n features."""


def flipped(features: int, pattern: str = "interleaved") -> slice:
    """The indices of the flipped features, as a slice."""
    check_choice("pattern", pattern, PATTERNS)
    return slice(1, None, 2) if pattern == "interleaved" else slice(0, features // 2)


def upright(features: int, pattern: str = "interleaved") -> slice:
    """The indices of the features that are not flipped, as a slice."""
    check_choice("pattern", pattern, PATTERNS)
    return slice(0, None, 2) if pattern == "interleaved" else slice(features // 2, None)


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


def _feature_dim(x: Tensor, dim: int, pattern: str) -> int:
    """`dim` counted from the front, after all that can be wrong with the arguments has been looked at."""
    check_choice("pattern", pattern, PATTERNS)
    if not x.is_floating_point():
        raise TypeError(f"a bipolar activation needs a floating-point tensor, not {x.dtype}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an integer, not {dim!r}")
    if not -x.ndim <= dim < x.ndim:
        raise IndexError(
            f"dim={dim} is not a dimension of a tensor of shape {tuple(x.shape)}; dim is the feature dimension"
        )
    return dim % x.ndim


def _along(x: Tensor, dim: int, index: slice) -> Tensor:
    return x[(slice(None),) * dim + (index,)]


def _broadcastable(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """View `values` [features] so that it broadcasts along dimension `dim` of x."""
    return values.view([-1 if d == dim else 1 for d in range(x.ndim)])


def _clamp_with_bounds(x: Tensor, dim: int, pattern: str) -> Tensor:
    features = x.shape[dim]
    low, high = x.new_zeros(features), x.new_full((features,), torch.inf)
    low[flipped(features, pattern)] = -torch.inf
    high[flipped(features, pattern)] = 0
    return torch.clamp(x, _broadcastable(low, x, dim), _broadcastable(high, x, dim))


def _clamp_slices(x: Tensor, dim: int, pattern: str) -> Tensor:
    features = x.shape[dim]
    up, down = upright(features, pattern), flipped(features, pattern)
    y = torch.empty_like(x)
    torch.clamp(_along(x, dim, up), min=0, out=_along(y, dim, up))
    torch.clamp(_along(x, dim, down), max=0, out=_along(y, dim, down))
    return y


class _TracedBipolarReLU(torch.autograd.Function):
    """clamp(x, min=0) on the upright features and clamp(x, max=0) on the flipped ones, for torch.compile to fuse.

    The backward pass needs the output alone, as ReLU's, and the next layer keeps that anyway (the compiler may choose
    to keep its mask). The gradient is grad * (y != 0), hence 0 at x = 0, as ReLU's in torch. No -0.0 is made from a
    positive number. Where x is NaN the output is NaN; the gradient there is not specified.
    """

    @staticmethod
    def forward(x: Tensor, dim: int, pattern: str) -> Tensor:
        return _clamp_with_bounds(x, dim, pattern)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return grads[0].masked_fill(y == 0, 0), None, None


class _BipolarReLU(torch.autograd.Function):
    """The same for eager execution: one vectorised pass each way, and all of torch.func.

    It is a class of its own because torch.compile traces neither a custom `jvp` nor hardshrink_backward with
    symbolic shapes.
    """

    @staticmethod
    def forward(x: Tensor, dim: int, pattern: str) -> Tensor:
        # Bounds that vary along the innermost dimension in memory are one vectorised pass; elsewhere strided slices
        # are, because there a bound is constant along the innermost dimension, which clamp does not vectorise.
        clamp = _clamp_with_bounds if x.stride(dim) == 1 else _clamp_slices
        return clamp(x, dim, pattern)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        # grad where y != 0, else 0, in one vectorised pass
        if grads[0].stride() != y.stride():
            # Of two layouts hardshrink_backward keeps the gradient's, ReLU the layer's (as `where` does here). Sums in
            # the layers in front depend on it in their last bits, and a mean's gradient is never channels_last.
            return torch.where(y != 0, grads[0], 0), None, None
        return torch.ops.aten.hardshrink_backward(grads[0], y, 0.0), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.hardshrink_backward(tangents[0], y, 0.0)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, dim: int, pattern: str) -> tuple[Tensor, int]:
        return _BipolarReLU.apply(x.movedim(in_dims[0], 0), dim + 1, pattern), 0


def _is_relu(fn: Callable[[Tensor], Tensor]) -> bool:
    return type(fn) is nn.ReLU or fn in (F.relu, torch.relu, torch.relu_, Tensor.relu)


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
    dim = _feature_dim(x, dim, pattern)
    if _is_relu(fn):
        function = _TracedBipolarReLU if torch.compiler.is_compiling() else _BipolarReLU
        return function.apply(x, dim, pattern)
    sign = _broadcastable(signs(x.shape[dim], pattern, dtype=x.dtype, device=x.device), x, dim)
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
    return torch.where(_broadcastable(even, x, 0), x.masked_fill(x < 0, 0), -F.relu(-x))


class BatchAxisReLU(nn.Module):
    """`batch_axis_relu` as a module: not the paper's function."""

    def forward(self, x: Tensor) -> Tensor:
        return batch_axis_relu(x)
