"""Element-wise activations, and what the wavefront needs of them: forward into a given tensor, backward from what was
kept.

For those of the paper, and wherever torch too can tell the slope from the output, the output is all that is kept. For
others it is the pre-activation, and the activation is computed once more on the way back.

What an exponential's last bit is depends on whether torch takes an element in a vector or by itself, which depends on
where it lies. So each activation and its bipolar version work on tensors of the same layout: the one must be exactly
the other in disguise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bipolar.activations import Bipolar
from bipolar.kernels import bounds_of, elu_parameters, is_relu, sign_of

ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid,
    nn.LogSigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Threshold, nn.Tanh, nn.Softsign, nn.Tanhshrink,
    nn.Hardshrink, nn.Softshrink, nn.Identity,
)  # fmt: skip
"""Activations that many cells can go through at once: functions of each element alone, without parameters."""

Activation = Callable[[Tensor], Tensor]
aten = torch.ops.aten


def is_elementwise(activation: nn.Module) -> bool:
    """Whether it is known to act on each element alone, or to be the bipolar version of such a function."""
    fn = activation.fn if isinstance(activation, Bipolar) else activation
    return type(fn) in ELEMENTWISE and not any(getattr(module, "inplace", False) for module in activation.modules())


class Elementwise:
    """Any activation; in terms of autograd.

    Args:
        activation: is given tensors [B, H, cells], without gaps in memory, and acts on each cell alone.
    """

    keeps_output = False
    """`backward` is given the output; otherwise the pre-activation."""

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def forward(self, pre: Tensor, out: Tensor) -> None:
        """Put the activation of `pre` [cells, B, H], which has no gaps and may be overwritten, into `out`."""
        out.copy_(self.activation(pre.permute(1, 2, 0)).permute(2, 0, 1))

    def backward(self, grad: Tensor, kept: Tensor, out: Tensor) -> None:
        """Put the gradient of the pre-activation into `out`, which may be `kept`."""
        with torch.enable_grad():
            at = kept.contiguous().permute(1, 2, 0).detach().requires_grad_()
            (result,) = torch.autograd.grad(self.activation(at), at, grad.contiguous().permute(1, 2, 0))
        out.copy_(result.permute(2, 0, 1))


class _ReLU(Elementwise):
    keeps_output = True

    def forward(self, pre: Tensor, out: Tensor) -> None:
        torch.clamp(pre, min=0, out=out)

    def backward(self, grad: Tensor, kept: Tensor, out: Tensor) -> None:
        aten.threshold_backward.grad_input(grad, kept, 0, grad_input=out)


@dataclass
class _BipolarReLU(Elementwise):
    pattern: str
    keeps_output = True

    def forward(self, pre: Tensor, out: Tensor) -> None:
        torch.clamp(pre, *bounds_of(pre, 2, self.pattern), out=out)

    def backward(self, grad: Tensor, kept: Tensor, out: Tensor) -> None:
        aten.hardshrink_backward.grad_input(grad, kept, 0.0, grad_input=out)  # grad where kept != 0


class _Tanh(Elementwise):
    keeps_output = True

    def forward(self, pre: Tensor, out: Tensor) -> None:
        out.copy_(pre.tanh_())

    def backward(self, grad: Tensor, kept: Tensor, out: Tensor) -> None:
        aten.tanh_backward.grad_input(grad, kept, grad_input=out)


@dataclass
class _ELU(Elementwise):
    alpha: float
    scale: float
    keeps_output = True

    def forward(self, pre: Tensor, out: Tensor) -> None:
        out.copy_(aten.elu_(pre, self.alpha, self.scale))

    def backward(self, grad: Tensor, kept: Tensor, out: Tensor) -> None:
        aten.elu_backward.grad_input(grad, self.alpha, self.scale, 1.0, True, kept, grad_input=out)


@dataclass
class _BipolarELU(_ELU):
    pattern: str

    def forward(self, pre: Tensor, out: Tensor) -> None:
        sign = sign_of(pre, 2, self.pattern)
        torch.mul(aten.elu_(pre.mul_(sign), self.alpha, self.scale), sign, out=out)

    def backward(self, grad: Tensor, kept: Tensor, out: Tensor) -> None:
        super().backward(grad, kept * sign_of(kept, 2, self.pattern), out)


def elementwise(activation: Activation) -> Elementwise:
    """How to compute `activation`, which treats dimension 1 of [B, H, cells] as its features."""
    is_bipolar = isinstance(activation, Bipolar)
    fn = activation.fn if isinstance(activation, Bipolar) else activation
    if is_relu(fn):
        return _BipolarReLU(activation.pattern) if isinstance(activation, Bipolar) else _ReLU(activation)
    if type(fn) is nn.Tanh and not is_bipolar:
        return _Tanh(activation)
    parameters = elu_parameters(fn)
    if parameters is not None and parameters[0] > 0:  # with another alpha, an output does not tell the slope
        return _BipolarELU(*parameters, activation.pattern) if isinstance(activation, Bipolar) else _ELU(*parameters)
    return Elementwise(activation)
