"""The sign-flip symmetry: when a bipolar network is exactly its base network in disguise.

With S the diagonal matrix of the signs of a layer's units, bipolar(f)(x) = S f(S x). In a chain of linear maps with
weights W and biases b, S can be moved into the weights:

    bipolar network (W_l, b_l)  =  base network (S_l W_l S_{l-1}, S_l b_l),   exactly, also in floating point.

`explain` tells layer by layer what keeps and what breaks this; `fold` makes the base network that computes the same
function, at the base network's cost; `unfold` goes the other way. docs/symmetry.md has the statement and its proof,
`bipolar/sign_analysis.py` how it is found out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bipolar.activations import Bipolar
from bipolar.networks.pooling import BipolarMaxPool2d
from bipolar.networks.rnn import RecurrentStack
from bipolar.sign_analysis import ACTIVATIONS, LINEAR, Row, SignAnalysis, SymmetryError, flipped_tensors

__all__ = ["Row", "SymmetryError", "explain", "fold", "unfold"]


def explain(model: nn.Module) -> list[Row]:
    """A row for every layer of `model`, in the order in which they run: whether it keeps the symmetry, and why.

    The network equals its base network exactly if every row keeps the symmetry.

    Raises:
        SymmetryError: torch.fx cannot trace the network.
    """
    return SignAnalysis(model).rows


def fold(model: nn.Module, *, strict: bool = True, example: Tensor | None = None) -> nn.Module:
    """The base network that computes the same function: every bipolar activation replaced by its base, weights flipped.

    Args:
        model: a network of this library, an nn.Sequential, or any module that torch.fx can trace. It is not changed.
            Activations of a linear layer's output are taken to be those of a matrix [N, features] where their `dim`
            is 1.
        strict: False makes the *twin* of any network: parts that break the symmetry are passed over, so that it
            starts from the sign-flipped weights without computing the same function.
        example: if given, inputs on which both networks are run in float64 and compared.

    Returns:
        A module of the same class. Its weights are copies; every bit of them but signs is that of the original.

    Raises:
        SymmetryError: a layer breaks the symmetry (says which and why), the network cannot be traced, or the two
        networks differ on `example`.
    """
    analysis = SignAnalysis(model)
    if strict:
        _refuse_what_breaks(analysis)
    twin = copy.deepcopy(model)
    _flip(twin, analysis)
    for name, module in list(twin.named_modules(remove_duplicate=False)):
        if isinstance(module, Bipolar) and name:
            _replace(twin, name, _base(module))
        elif isinstance(module, BipolarMaxPool2d) and name:
            _replace(twin, name, nn.MaxPool2d(module.kernel_size, module.stride, ceil_mode=module.ceil_mode))
    _compare(model, twin, example)
    return twin


def unfold(
    model: nn.Module,
    pattern: str = "interleaved",
    *,
    activations: Sequence[type[nn.Module]] | None = None,
    example: Tensor | None = None,
) -> nn.Module:
    """The bipolar network that computes the same function as the base network `model`: the inverse of `fold`.

    Every activation module becomes its bipolar version and max pooling between them sign-aware; the weights are
    flipped.

    Args:
        model, example: as for `fold`.
        pattern: which features are flipped.
        activations: the types of module to replace; None: all of torch's that are not odd functions.

    Raises:
        SymmetryError: as for `fold`.
    """
    replaced = tuple(activations) if activations is not None else ACTIVATIONS
    base = SignAnalysis(model)
    twin = copy.deepcopy(model)
    of_model = dict(model.named_modules(remove_duplicate=False))
    made: dict[int, Bipolar] = {}  # a module may be there under several names
    for name, module in list(twin.named_modules(remove_duplicate=False)):
        key = id(of_model[name])
        if key not in base.feature_dims:
            continue
        if isinstance(module, replaced):
            if key in base.overwriting:
                raise SymmetryError(f"{name} changes its input in place, which is read elsewhere too")
            made.setdefault(key, Bipolar(module, dim=base.feature_dims[key], pattern=pattern))
            _replace(twin, name, made[key])
        elif isinstance(module, nn.MaxPool2d):
            if module.padding != 0 or module.dilation != 1 or module.return_indices:
                raise SymmetryError(f"{name} is max pooling with padding, dilation or indices: no bipolar version")
            _replace(twin, name, BipolarMaxPool2d(module.kernel_size, module.stride, module.ceil_mode, pattern))
    analysis = SignAnalysis(twin)
    _refuse_what_breaks(analysis)
    _flip(twin, analysis)
    _compare(model, twin, example)
    return twin


def _base(module: Bipolar) -> nn.Module:
    """The base activation, not in place: its input was its own."""
    base = module.fn if isinstance(module.fn, nn.Module) else _Elementwise(module.fn)
    if getattr(base, "inplace", False):
        base.inplace = False  # type: ignore[assignment]
    return base


class _Elementwise(nn.Module):
    """A function as a module: the base activation of a `Bipolar` that was made from a plain function."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _refuse_what_breaks(analysis: SignAnalysis) -> None:
    broken = [row for row in analysis.rows if not row.keeps]
    if broken:
        more = f" (and {len(broken) - 1} more: see explain)" if len(broken) > 1 else ""
        raise SymmetryError(f"{broken[0].layer} ({broken[0].operation}) {broken[0].reason}{more}")


@torch.no_grad()
def _flip(model: nn.Module, analysis: SignAnalysis) -> None:
    """Flip signs of parameters and running means of `model` as the analysis found. Doing it twice undoes it."""
    done: set[int] = set()  # a tensor may be shared
    for use in analysis.uses.values():
        module = model.get_submodule(use.name)
        after = analysis.value(use.after)
        for tensor in flipped_tensors(module):
            if tensor is None or id(tensor) in done:
                continue
            done.add(id(tensor))
            sign = after
            if isinstance(module, LINEAR) and tensor is module.weight:
                before = analysis.value(use.before).repeat_interleave(use.repeat)
                groups = getattr(module, "groups", 1)
                rows = before.view(groups, -1).repeat_interleave(len(tensor) // groups, 0)  # [out, in / groups]
                sign = (after[:, None] * rows).view(*tensor.shape[:2], *[1] * (tensor.ndim - 2))
            elif isinstance(module, RecurrentStack) and tensor is module.weight:
                sign = after[:, None] * after.repeat(2)  # of the input and of the state
            tensor.mul_(sign.to(tensor))


@torch.no_grad()
def _compare(model: nn.Module, twin: nn.Module, example: Tensor | None) -> None:
    if example is None:
        return
    inputs = example.double() if example.is_floating_point() else example
    outputs = []
    for each in (model, twin):
        output = copy.deepcopy(each).double().eval()(inputs)
        outputs.append(output[0] if isinstance(output, tuple) else output)  # a recurrent network's state comes behind
    largest = float((outputs[0] - outputs[1]).abs().max())
    if not largest <= 1e-9 * max(1.0, float(outputs[0].abs().max())):
        raise SymmetryError(f"the twin's output differs from the network's by up to {largest:.3g} on the example")
