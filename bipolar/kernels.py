"""How bipolar ReLU and ELU are computed: what `bipolar.activations.bipolar` calls for those two bases.

S f(S x) as written is three passes over memory forward and three backward. ReLU's version is a clamp, one pass each
way. ELU's needs no signs backward, S (g * f'(S x)) S being g * f'(S x) to the last bit, and goes forward in blocks that
stay in the cache. Both give exactly what the definition gives: a bipolar network must be its base network in
disguise to the last bit wherever it is that in theory. docs/performance.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter

SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


def slices(features: int, pattern: str) -> tuple[slice, slice]:
    """The features that are not flipped, and those that are."""
    if pattern == "interleaved":
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
    if x.device.type == "cpu" and type(x) in (Tensor, Parameter) and not is_traced():
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
    """clamp(x, min=0) on the upright features and clamp(x, max=0) on the flipped ones.

    The backward pass needs the output alone, as ReLU's, and the next layer keeps that anyway (torch.compile may choose
    to keep its mask). The gradient is grad * (y != 0), hence 0 at x = 0, as ReLU's in torch. No -0.0 is made from a
    positive number. Where x is NaN the output is NaN; the gradient there is not specified.
    """
    if torch.compiler.is_compiling():
        function: type[torch.autograd.Function] = _CompiledReLU
    else:
        function = _TransformedReLU if is_traced() else _EagerReLU
    return function.apply(x, dim, pattern)


def _clamp(x: Tensor, dim: int, pattern: str) -> Tensor:
    # Bounds that vary along the innermost dimension in memory are one vectorised pass; elsewhere strided slices
    # are, because there a bound is constant along the innermost dimension, which clamp does not vectorise.
    return _clamp_with_bounds(x, dim, pattern) if x.stride(dim) == 1 else _clamp_slices(x, dim, pattern)


def _clamp_with_bounds(x: Tensor, dim: int, pattern: str) -> Tensor:
    return torch.clamp(x, *bounds_of(x, dim, pattern))


def _clamp_slices(x: Tensor, dim: int, pattern: str) -> Tensor:
    up, down = (((slice(None),) * dim + (part,)) for part in slices(x.shape[dim], pattern))
    y = torch.empty_like(x)
    torch.clamp(x[up], min=0, out=y[up])
    torch.clamp(x[down], max=0, out=y[down])
    return y


class _CompiledReLU(torch.autograd.Function):
    """For torch.compile, which traces neither a custom `jvp` nor hardshrink_backward with symbolic shapes."""

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


class _EagerReLU(torch.autograd.Function):
    """One vectorised pass each way."""

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


class _TransformedReLU(_EagerReLU):
    """The same for torch.func, which wants the context apart; outside of it that costs 70 microseconds a call."""

    @staticmethod
    def forward(x: Tensor, dim: int, pattern: str) -> Tensor:  # type: ignore[override]
        return _clamp(x, dim, pattern)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, dim: int, pattern: str) -> tuple[Tensor, int]:
        return _TransformedReLU.apply(x.movedim(in_dims[0], 0), dim + 1, pattern), 0


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
        return torch.ops.aten.elu(x * sign, alpha, scale) * sign
    return _EagerELU.apply(x, sign, dim, alpha, scale)


LARGE = 2**17
"""Elements from which on the passes over memory that `_EagerELU` saves are more than what a call of it costs."""
BLOCK = 2**18
"""Elements of a block at least: what a block reads and writes stays in the caches of the cores."""
HUGE = 2**21
"""Elements from which on blocks are worth their while."""
VECTOR, GRAIN = 64, 2**15
"""At most so many elements are taken at once by torch; and it starts a thread for so many."""


def blocks(x: Tensor, dim: int) -> list[tuple[int, int, int]]:
    """How to go over x in blocks, as arguments of `narrow`: none where it is best done as a whole.

    An exponential's last bit depends on whether an element is taken in a vector or by itself at the end of a thread's
    share. So there are blocks only where nothing is left over, in a block or in the whole.
    """
    if x.numel() < HUGE or x.device.type != "cpu":
        return []
    threads = torch.get_num_threads()
    outer = max(range(x.ndim), key=lambda d: (x.stride(d), x.shape[d]))
    length = x.shape[outer]
    row = x.numel() // length
    is_dense = x.stride(outer) == row and torch.empty_like(x, device="meta").stride() == x.stride()
    if not is_dense or outer == dim or length % threads or row % VECTOR:
        return []
    rows = -(-max(BLOCK, GRAIN * threads) // (row * threads)) * threads
    starts = range(0, length - rows + 1, rows)
    ends = [*starts[1:], length]
    return [(outer, start, end - start) for start, end in zip(starts, ends, strict=True)]


class _EagerELU(torch.autograd.Function):
    """With one multiplication in place of two on the way back, in place, and in blocks. As ELU, it keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sign: Tensor, dim: int, alpha: float, scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        ctx.sign, ctx.dim, ctx.alpha, ctx.scale = sign, dim, alpha, scale
        parts = blocks(x, dim)
        if not parts:
            return torch.ops.aten.elu_(x * sign, alpha, scale).mul_(sign)
        y = torch.empty_like(x)
        for part in parts:
            here = y.narrow(*part)
            torch.mul(x.narrow(*part), sign, out=here)
            torch.ops.aten.elu_(here, alpha, scale).mul_(sign)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        return _EagerELU.times_slope(ctx, grads[0], x), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        return _EagerELU.times_slope(ctx, tangents[0], x)

    @staticmethod
    def times_slope(ctx: Any, factor: Tensor, x: Tensor) -> Tensor:
        """Where the layouts differ, and for a second derivative, as a whole."""
        sign, constants = ctx.sign, (ctx.alpha, ctx.scale, 1.0, False)
        parts = [] if torch.is_grad_enabled() or factor.stride() != x.stride() else blocks(x, ctx.dim)
        if not parts:
            return torch.ops.aten.elu_backward(factor, *constants, x * sign)
        result = torch.empty_like(x)
        signed = torch.empty_like(x.narrow(*parts[-1]))  # the last block is the longest
        for part in parts:
            here = torch.mul(x.narrow(*part), sign, out=signed.narrow(part[0], 0, part[2]))
            torch.ops.aten.elu_backward.grad_input(
                factor.narrow(*part), *constants, here, grad_input=result.narrow(*part)
            )
        return result
