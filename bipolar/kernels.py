"""How bipolar ReLU and ELU are computed: what `bipolar.activations.bipolar` calls for those two bases.

S f(S x) as written is three passes over memory forward and three backward. ReLU's version is a clamp, one pass each
way. ELU's needs no signs backward, S (g * f'(S x)) S being g * f'(S x) to the last bit. Small tensors are bound by the
calls, of which they get as few as can be. All give exactly what the definition gives: a bipolar network must be its
base network in disguise to the last bit wherever it is that in theory. docs/performance.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bipolar.errors import check_choice

PATTERNS = ("interleaved", "halves")
"""`interleaved`: odd indices are flipped (the paper's formula). `halves`: the first half of the indices is flipped
(the authors' code). Both flip floor(n / 2) of n features."""

SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946

LARGE = 2**17
"""Elements from which on passes over memory cost more than the 30 microseconds of a `torch.autograd.Function`."""


def slices(features: int, pattern: str) -> tuple[slice, slice]:
    """The features that are not flipped, and those that are."""
    if check_choice("pattern", pattern, PATTERNS) == "interleaved":
        return slice(0, None, 2), slice(1, None, 2)
    return slice(features // 2, None), slice(0, features // 2)


def is_traced() -> bool:
    """Whether torch.compile or a transform of torch.func is at work."""
    # The second is private to torch, but what its own autograd.Function.apply asks.
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


# -- constants along the features --------------------------------------------------------------------------------------

Make = Callable[[int, int, int, str, torch.dtype, Any], tuple[Tensor, ...]]


def _along_features(
    features: int, ndim: int, dim: int, pattern: str, dtype: torch.dtype, device: Any, *values: float
) -> Tensor:
    """One value for upright features and one for flipped ones, along dimension `dim` of `ndim`."""
    upright, flipped = values
    result = torch.full((features,), upright, dtype=dtype, device=device)
    result[slices(features, pattern)[1]] = flipped
    return result.view([-1 if d == dim else 1 for d in range(ndim)])


def _make_sign(*kind: Any) -> tuple[Tensor, ...]:
    return (_along_features(*kind, 1.0, -1.0),)


def _make_bounds(*kind: Any) -> tuple[Tensor, ...]:
    return _along_features(*kind, 0.0, -torch.inf), _along_features(*kind, torch.inf, 0.0)


def _constants(make: Make, x: Tensor, dim: int, pattern: str) -> tuple[Tensor, ...]:
    if x.is_cpu and type(x) is Tensor and not is_traced():
        return _kept(make, x.shape[dim], x.ndim, dim, pattern, x.dtype)
    return make(x.shape[dim], x.ndim, dim, pattern, x.dtype, x.device)


@lru_cache(maxsize=256)
def _kept(make: Make, features: int, ndim: int, dim: int, pattern: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    # To make them takes as long as a small activation itself. Only plain tensors on the CPU are kept: what is made
    # while a transform, a fake mode or a graph's capture is at work belongs to that.
    with torch.inference_mode(False):
        return make(features, ndim, dim, pattern, dtype, "cpu")


def sign_of(x: Tensor, dim: int, pattern: str) -> Tensor:
    """The diagonal of S, to be multiplied with x."""
    return _constants(_make_sign, x, dim, pattern)[0]


def bounds_of(x: Tensor, dim: int, pattern: str) -> tuple[Tensor, ...]:
    """The least and the largest value that bipolar ReLU lets through."""
    return _constants(_make_bounds, x, dim, pattern)


# -- ReLU --------------------------------------------------------------------------------------------------------------


def is_relu(fn: Callable[[Tensor], Tensor]) -> bool:
    return type(fn) is nn.ReLU or fn in (F.relu, torch.relu, torch.relu_, Tensor.relu)


def bipolar_relu(x: Tensor, dim: int, pattern: str) -> Tensor:
    """max(x, 0) on the upright features and min(x, 0) on the flipped ones.

    The gradient is grad where the output is not 0, hence 0 at x = 0, as ReLU's in torch. No -0.0 is made from a
    positive number. Where x is NaN the output is NaN; the gradient there is not specified.
    """
    if x.numel() < LARGE or is_traced():
        # x where S x > 0, else 0: torch's own function for ReLU's gradient, which it can differentiate in turn
        return _relu_gradient(x, x.detach() * sign_of(x, dim, pattern), 0.0)
    return _BipolarReLU.apply(x, dim, pattern)


_relu_gradient = torch.ops.aten.threshold_backward.default


class _BipolarReLU(torch.autograd.Function):
    """As a clamp: one vectorised pass each way. It keeps the output alone, which the next layer keeps anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, pattern: str) -> Tensor:
        y = _clamp(x, dim, pattern)
        ctx.save_for_backward(y)
        ctx.save_for_forward(y)
        return y

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


def _clamp(x: Tensor, dim: int, pattern: str) -> Tensor:
    # Bounds that vary along the innermost dimension in memory are one vectorised pass; elsewhere strided slices
    # are, because there a bound is constant along the innermost dimension, which clamp does not vectorise.
    if x.stride(dim) == 1:
        return torch.clamp(x, *bounds_of(x, dim, pattern))
    up, down = (((slice(None),) * dim + (part,)) for part in slices(x.shape[dim], pattern))
    y = torch.empty_like(x)
    torch.clamp(x[up], min=0, out=y[up])
    torch.clamp(x[down], max=0, out=y[down])
    return y


# -- ELU ---------------------------------------------------------------------------------------------------------------


def elu_parameters(fn: Callable[[Tensor], Tensor]) -> tuple[float, float] | None:
    """alpha and scale of ELU and SELU; None of all others."""
    if type(fn) is nn.ELU and isinstance(fn.alpha, (int, float)):  # what is no number, torch shall refuse
        return float(fn.alpha), 1.0
    if fn is F.elu:
        return 1.0, 1.0
    if type(fn) is nn.SELU or fn in (F.selu, torch.selu):
        return SELU_ALPHA, SELU_SCALE
    return None


def bipolar_elu(x: Tensor, dim: int, pattern: str, alpha: float, scale: float) -> Tensor:
    """S elu(S x), with elu(t) = scale t where t > 0 and scale alpha (exp(t) - 1) elsewhere."""
    sign = sign_of(x, dim, pattern)
    if x.numel() < LARGE or is_traced():
        return _elu(x * sign, alpha, scale) * sign
    y: Tensor = _BipolarELU.apply(x, sign, alpha, scale)[0]
    return y


_elu = torch.ops.aten.elu.default
_elu_gradient = torch.ops.aten.elu_backward.default


class _BipolarELU(torch.autograd.Function):
    """S elu(S x) and S x. The latter is kept where ELU keeps x, so that the way back costs what ELU's does.

    It is an output so that second derivatives, which depend on it, find their way to x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sign: Tensor, alpha: float, scale: float) -> tuple[Tensor, Tensor]:
        signed = x * sign
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(signed)
        ctx.save_for_forward(signed)
        ctx.sign, ctx.constants = sign, (alpha, scale, 1.0, False)
        return _elu(signed, alpha, scale).mul_(sign), signed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (signed,) = ctx.saved_tensors
        grad, grad_of_signed = grads
        result = None if grad is None else _elu_gradient(grad, *ctx.constants, signed)
        if grad_of_signed is not None:
            part = grad_of_signed * ctx.sign
            result = part if result is None else result + part
        return result, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        (signed,) = ctx.saved_tensors
        return _elu_gradient(tangents[0], *ctx.constants, signed), tangents[0] * ctx.sign
