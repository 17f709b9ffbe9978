"""Which signs the features of a network can have: what `bipolar.symmetry` knows, it knows from here.

The network is traced by torch.fx, and every tensor in it gets one sign per feature, which starts as an unknown. A
linear map leaves the signs of its output free; a bipolar activation fixes them; normalization per feature, average
pooling and whatever else commutes with a change of sign pass them on; a sum asks its terms to agree; and what is not
known to commute asks for signs that are all +. The network is symmetric where all these demands can be met, and where
two of them clash, one of the two is named: not the bipolar activations, of which the network is made.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bipolar.activations import BatchAxisReLU, Bipolar, batch_axis_relu, bipolar, signs
from bipolar.networks.pooling import BipolarMaxPool2d
from bipolar.networks.rnn import RecurrentStack


class SymmetryError(ValueError):
    """The network has no twin that computes the same function, or cannot be traced: says which layer, and why."""


class Row(NamedTuple):
    """What one layer does to the symmetry."""

    layer: str
    operation: str
    keeps: bool
    reason: str


ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Sigmoid, nn.LogSigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Threshold,
)  # fmt: skip
"""Element-wise functions of torch that are not odd."""

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
MAX_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
ODD: dict[type[nn.Module], str] = {
    nn.Identity: "does nothing",
    **dict.fromkeys((nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink), "is an odd function"),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), "is zero or a factor for each element"),
    **dict.fromkeys(
        (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        "is linear in each feature map",
    ),
}
"""Modules that commute with a change of sign of any feature."""

ODD_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((torch.tanh, F.tanh, "tanh", operator.neg, torch.neg, "neg", F.softsign), "is an odd function"),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), "is zero or a factor for each element"),
    **dict.fromkeys(
        (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
        "is linear in each feature map",
    ),
    **dict.fromkeys(("contiguous", "clone", "detach", "float", "double", "half", "bfloat16"), "copies"),
}
MAX_POOL_FUNCTIONS = (
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
    torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
)  # fmt: skip
ACTIVATION_FUNCTIONS = (
    F.relu, torch.relu, torch.relu_, "relu", "relu_", F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish,
    F.softplus, F.hardswish, F.sigmoid, torch.sigmoid, "sigmoid",
)  # fmt: skip
MULTIPLICATIONS = (operator.mul, torch.mul, "mul", "mul_", operator.truediv, torch.div, "div")
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_", operator.sub, torch.sub, "sub")
MEANS = (torch.mean, "mean", torch.sum, "sum")
FLATTENINGS = (torch.flatten, "flatten")
VIEWS = ("view", "reshape", torch.reshape)
NOT_TENSORS = ("size", "dim", "shape", getattr, operator.floordiv)


class _Tracer(fx.Tracer):
    """Keeps whole what this file knows as one operation."""

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        known = (Bipolar, BipolarMaxPool2d, BatchAxisReLU, RecurrentStack)
        return isinstance(module, known) or super().is_leaf_module(module, module_qualified_name)

    def create_arg(self, a: Any) -> Any:
        # fx refuses functions, as in bipolar(torch.relu, x), and modules that the network does not know
        if isinstance(a, (types.FunctionType, types.BuiltinFunctionType)):
            return a.__name__
        if isinstance(a, nn.Module) and all(a is not module for module in self.root.modules()):
            return type(a).__name__
        return super().create_arg(a)


def _trace(model: nn.Module) -> fx.Graph:
    try:
        return _Tracer(autowrap_functions=(bipolar, batch_axis_relu)).trace(model)
    except Exception as error:  # torch.fx raises many kinds, a user's forward pass any
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SymmetryError(f"{type(model).__name__} cannot be traced by torch.fx: {reason}") from error


class _Signs:
    """Unknown signs, of which some are found to be equal and some to be known (union-find)."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._value: list[int] = []

    def new(self, count: int) -> list[int]:
        first = len(self._parent)
        self._parent += range(first, first + count)
        self._value += [0] * count
        return list(range(first, first + count))

    def _root(self, unknown: int) -> int:
        while self._parent[unknown] != unknown:
            self._parent[unknown] = self._parent[self._parent[unknown]]
            unknown = self._parent[unknown]
        return unknown

    def value(self, unknown: int) -> int:
        """+1, -1, or 0 where it is not known."""
        return self._value[self._root(unknown)]

    def fix(self, unknown: int, value: int) -> bool:
        """Demand a value. False (and nothing changes) if it has the other one."""
        root = self._root(unknown)
        if self._value[root] not in (0, value):
            return False
        self._value[root] = value
        return True

    def join(self, a: int, b: int) -> bool:
        """Demand that two are equal. False (and nothing changes) if they are known not to be."""
        a, b = self._root(a), self._root(b)
        if a == b:
            return True
        if self._value[a] and self._value[b] and self._value[a] != self._value[b]:
            return False
        self._value[b] = self._value[a] or self._value[b]
        self._parent[a] = b
        return True


@dataclass(frozen=True)
class _Features:
    """What is known of a tensor: an unknown sign for each feature.

    `dims` are the names of the feature dimension: 1 and -3 for images [N, C, H, W]. What a linear map puts out is taken
    to be a matrix. Flattened, each sign stands for several values in a row.
    """

    unknowns: list[int]
    dims: tuple[int, int] = (1, -1)
    flattened: bool = False

    @property
    def are_maps(self) -> bool:
        """Whether they are feature maps: dimension 1 is theirs without a doubt."""
        return self.dims != (1, -1) and not self.flattened

    def shape_is_like(self, other: _Features) -> bool:
        """Whether an element-wise operation brings feature i of the two together."""
        return self.dims == other.dims if self.are_maps or other.are_maps else True


@dataclass
class _Use:
    """A module with parameters to be flipped, and the unknown signs of its input and output."""

    name: str
    before: list[int]
    after: list[int]
    repeat: int = 1


class _Demand(NamedTuple):
    """Something asked of the signs, to be looked at in order of priority, so that the part to blame is the one named.

    Bipolar activations come first (they are what the network is made of), then sums and other agreements, then parts
    that are not odd.
    """

    priority: int
    meet: Callable[[], bool]
    row: int
    reason: str


class SignAnalysis:
    """The signs of every tensor of a network, and a row per layer. Conflicts are recorded and passed over."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self.signs = _Signs()
        self.rows: list[Row] = []
        self.uses: dict[int, _Use] = {}
        self.feature_dims: dict[int, int] = {}
        """Of each module's input (by the module's id), where that has features: 1 for maps, -1 for what a linear map
        puts out."""
        self.overwriting: set[int] = set()
        """Modules (by id) that change their input in place, which is read elsewhere too."""
        self._tensors: dict[int, list[int]] = {}
        self._demands: list[_Demand] = []
        self._handed_on: set[fx.Node] = set()
        """States that recurrent layers hand out where they are handed one in."""
        # For each node: what is known of its signs, None for "all +, of any number", or _NO_TENSOR
        self._known: dict[fx.Node, Any] = {}
        for node in _trace(model).nodes:
            self._known[node] = getattr(self, f"_{node.op}")(node)
        broken: dict[int, str] = {}
        for demand in sorted(self._demands, key=lambda demand: demand.priority):  # stable: else in order of running
            if not demand.meet():
                broken.setdefault(demand.row, demand.reason)
        self.rows = [
            row._replace(keeps=False, reason=broken[index]) if index in broken else row
            for index, row in enumerate(self.rows)
        ]

    def value(self, unknowns: list[int]) -> Tensor:
        """The signs as a tensor of +1 and -1; what nothing was demanded of is +."""
        return torch.tensor([self.signs.value(unknown) or 1 for unknown in unknowns], device="cpu")

    # Demands. Each is met for every feature for which it can be, also where it fails for others.

    def _demand(self, priority: int, met: Callable[[], list[bool]], reason: str, row: int | None = None) -> None:
        self._demands.append(_Demand(priority, lambda: all(met()), len(self.rows) if row is None else row, reason))

    def _ask_for(self, features: _Features | None, values: list[int], priority: int, reason: str) -> None:
        if features is not None:
            unknowns = features.unknowns
            self._demand(
                priority, lambda: [self.signs.fix(*pair) for pair in zip(unknowns, values, strict=True)], reason
            )

    def _ask_for_plus(self, features: _Features | None, reason: str) -> None:
        if features is not None:
            self._ask_for(features, [1] * len(features.unknowns), 3, reason)

    def _ask_to_agree(self, a: list[int], b: list[int], priority: int, reason: str) -> None:
        self._demand(priority, lambda: [self.signs.join(*pair) for pair in zip(a, b, strict=True)], reason)

    def _row(self, node: fx.Node, operation: str, reason: str) -> None:
        # what is not a module is named by the module in whose forward pass it stands
        inside = [path for path in node.meta.get("nn_module_stack", {}) if path]
        layer = str(node.target) if node.op == "call_module" else (inside[-1] if inside else "(the network itself)")
        self.rows.append(Row(layer, operation, True, reason))

    # The kinds of node that a traced network has

    def _placeholder(self, node: fx.Node) -> Any:
        return None

    def _get_attr(self, node: fx.Node) -> Any:
        tensor = operator.attrgetter(str(node.target))(self._model)
        if isinstance(tensor, Tensor):
            self._row(node, "parameter", "is left as it is")
            self._share(tensor, [], row=len(self.rows) - 1)
        return None

    def _output(self, node: fx.Node) -> Any:
        # a state that comes in from outside and is handed out again keeps the signs of its network
        sources = [source for source in node.all_input_nodes if source not in self._handed_on]
        for source in sources:
            self._ask_for_plus(self._tensor(source), "the output has flipped features")
        if any(isinstance(self._tensor(source), _Features) for source in sources):
            self._row(node, "output", "no feature of it is flipped")
        return None

    def _call_module(self, node: fx.Node) -> Any:
        module = self._modules[str(node.target)]
        source = self._first(node)
        if source is not None and not source.flattened:
            dim = 1 if source.are_maps else -1
            self.feature_dims[id(module)] = max(dim, self.feature_dims.get(id(module), dim))  # 1 suits matrices too
        if getattr(module, "inplace", False) and any(len(each.users) > 1 for each in node.all_input_nodes):
            self.overwriting.add(id(module))
        result = self._module(node, module, source)
        flipped = {id(tensor) for tensor in flipped_tensors(module)} if id(module) in self.uses else set()
        for parameter in module.parameters():
            if id(parameter) not in flipped:
                self._share(parameter, [], row=len(self.rows) - 1)
        return result

    def _module(self, node: fx.Node, module: nn.Module, source: _Features | None) -> Any:
        # a weight that is computed, by a parametrization or a hook, is not there to be flipped
        if isinstance(module, LINEAR) and isinstance(module._parameters.get("weight"), Tensor):
            return self._linear(node, module, source)
        if isinstance(module, nn.Embedding):
            return self._embedding(node, module)
        if isinstance(module, RecurrentStack):
            return self._recurrent(node, module, source)
        if isinstance(module, Bipolar):
            return self._bipolar(node, module, source)
        if isinstance(module, BipolarMaxPool2d):
            if source is None or not _is_over_positions(source, "2d"):
                self._demand(0, lambda: [False], "does not act on feature maps that a convolution made")
            else:
                values = signs(len(source.unknowns), module.pattern, device="cpu").int().tolist()
                reason = f"its pattern ({module.pattern}) is not that of the feature maps it gets"
                self._ask_for(source, values, 1, reason)
            self._row(node, "bipolar max pooling", "takes the minimum of flipped maps: S maxpool(S x)")
            return source
        if isinstance(module, BatchAxisReLU):
            return self._batch_axis(node, source)
        if isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS)):
            return self._norm_per_feature(node, module, source)
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            return self._group_norm(node, module, source)
        if isinstance(module, getattr(nn, "RMSNorm", ())):
            self._row(node, "RMS normalization", "divides by a size, which has no sign")
            return source
        if isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
            return self._flatten(node, source)
        if isinstance(module, nn.ChannelShuffle) and source is not None and source.are_maps:
            self._row(node, "channel shuffle", "moves the signs with the features")
            order = torch.arange(len(source.unknowns), device="cpu").view(module.groups, -1).T.flatten().tolist()
            return replace(source, unknowns=[source.unknowns[index] for index in order])
        for kind, reason in ODD.items():
            if type(module) is kind:
                return self._odd(node, kind.__name__, reason, source)
        if isinstance(module, nn.Hardtanh) and type(module) is nn.Hardtanh and module.min_val == -module.max_val:
            self._row(node, "Hardtanh", "is an odd function")
            return source
        if isinstance(module, MAX_POOLS):
            return self._max_pooling(node, source)
        if isinstance(module, ACTIVATIONS):
            return self._activation(node, type(module).__name__, source)
        return self._unknown(node, type(module).__name__)

    def _call_function(self, node: fx.Node) -> Any:
        return self._call(node)

    def _call_method(self, node: fx.Node) -> Any:
        return self._call(node)

    def _call(self, node: fx.Node) -> Any:
        target: Any = node.target
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        if all(self._known[source] is _NO_TENSOR for source in node.all_input_nodes) or target in NOT_TENSORS:
            return _NO_TENSOR
        source = self._first(node)
        if target in (bipolar, batch_axis_relu):
            what = "is called as a function" if target is bipolar else "flips rows of the batch"
            advice = "; write it as a module, as in Bipolar(nn.ReLU()), to have it folded" if target is bipolar else ""
            self._demand(0, lambda: [False], what + advice)
            self._row(node, name, "")
            return source
        if target in ODD_FUNCTIONS:
            return self._odd(node, name, ODD_FUNCTIONS[target], source)
        if target in MAX_POOL_FUNCTIONS:
            return self._max_pooling(node, source)
        if target in ACTIVATION_FUNCTIONS:
            return self._activation(node, name, source)
        if target == "to" and not any(_is_not_floating(each) for each in (*node.args, *node.kwargs.values())):
            self._row(node, name, "copies")
            return source
        is_plain = not node.kwargs  # not torch.div(..., rounding_mode="floor")
        if target in MULTIPLICATIONS and is_plain and any(isinstance(factor, (int, float)) for factor in node.args):
            # a number says how large, and flips all features or none
            self._row(node, "factor", "is the same number for every feature")
            return self._tensor(node.all_input_nodes[0])
        if target in ADDITIONS and len(node.args) == 2 and all(isinstance(term, fx.Node) for term in node.args):
            return self._sum(node)
        if (
            target in FLATTENINGS
            and _argument(node, 1, "start_dim", 0) == 1
            and _argument(node, 2, "end_dim", -1) == -1
        ):
            return self._flatten(node, source)
        if target in VIEWS and _is_flattening(node):
            return self._flatten(node, source)
        if target in MEANS and source is not None and _leaves(source, _argument(node, 1, "dim", None)):
            self._row(node, name, "is linear in each feature")
            return source if _argument(node, 2, "keepdim", False) else _Features(source.unknowns)
        if target is operator.getitem and isinstance(pair := self._known[node.all_input_nodes[0]], tuple):
            index = int(str(node.args[1]))
            if index == 1 and node.all_input_nodes[0] in self._handed_on:
                self._handed_on.add(node)
            return pair[index]
        if target is operator.getitem and source is not None:
            return self._slice(node, source)
        if target is F.pad and source is not None:
            return self._pad(node, source)
        if target in (torch.cat, torch.concat):
            return self._concatenation(node)
        return self._unknown(node, name)

    # One method for each kind of operation that has more to say

    def _tensor(self, node: fx.Node) -> _Features | None:
        known = self._known[node]
        return known if isinstance(known, _Features) else None

    def _first(self, node: fx.Node) -> _Features | None:
        first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        return self._tensor(first) if isinstance(first, fx.Node) else None

    def _use(self, node: fx.Node, module: nn.Module, before: list[int], after: list[int], repeat: int = 1) -> None:
        """Record a module whose parameters are flipped; one that is used twice must be flipped alike."""
        self.uses.setdefault(id(module), _Use(str(node.target), before, after, repeat))
        weight, *shifts = flipped_tensors(module) if isinstance(module, LINEAR) else [None, *flipped_tensors(module)]
        if weight is not None:
            self._share(weight, before + after)
        for shift in shifts:
            if shift is not None:
                self._share(shift, after)

    def _share(self, tensor: Tensor, unknowns: list[int], row: int | None = None) -> None:
        """Record the signs that flip a parameter (none: it is left as it is); one in two places must be flipped alike.

        `row` is that of the place, where it is not the next.
        """
        earlier = self._tensors.setdefault(id(tensor), unknowns)
        reason = "its weights are shared with another place, which has other signs"
        if not earlier or not unknowns:
            both = earlier + unknowns
            if both:
                self._demand(1, lambda: [self.signs.fix(unknown, 1) for unknown in both], reason, row)
        elif len(earlier) != len(unknowns):
            self._demand(1, lambda: [False], reason, row)
        elif earlier != unknowns:
            self._ask_to_agree(earlier, unknowns, 1, reason)

    def _linear(self, node: fx.Node, module: nn.Module, source: _Features | None) -> _Features:
        is_conv = not isinstance(module, nn.Linear)
        weight = module.weight
        assert isinstance(weight, Tensor)
        inputs = weight.shape[1] * getattr(module, "groups", 1)
        if source is None:
            source = _Features(self._plus(inputs), _dims(module))
        repeat, rest = divmod(inputs, len(source.unknowns))
        if is_conv:
            fits = source.are_maps and source.dims == _dims(module) and repeat == 1 and not rest
        else:
            fits = not source.are_maps and (repeat == 1 or source.flattened) and not rest
        after = self.signs.new(weight.shape[0])
        if fits:
            self._use(node, module, source.unknowns, after, repeat)
            what = "convolution" if is_conv else "linear map"
            self._row(node, what, "takes the signs of its input and output into its weights")
        else:
            self._ask_for_plus(source, "its inputs are not the features in front of it")
            self._use(node, module, self._plus(inputs), after)
            self._row(node, type(module).__name__, "no feature in front of it is flipped")
        return _Features(after, _dims(module))

    def _embedding(self, node: fx.Node, module: nn.Embedding) -> _Features:
        after = self.signs.new(module.embedding_dim)
        self.uses.setdefault(id(module), _Use(str(node.target), [], after))
        # in the order in which an output layer that shares it names its inputs and outputs
        self._share(module.weight, after + self._plus(module.num_embeddings))
        self._row(node, "embedding", "takes the signs of its features into its weights")
        return _Features(after)

    def _recurrent(self, node: fx.Node, module: RecurrentStack, source: _Features | None) -> Any:
        """All layers, states and streams of a stack have one pattern of signs, that of the embedding in front of it."""
        features = _Features(self.signs.new(module.width))
        reason = "reads a stream whose features are flipped in another pattern than its layers"
        if source is None or len(source.unknowns) != module.width:
            self._ask_for_plus(source, reason)
            self._ask_to_agree(features.unknowns, self._plus(module.width), 1, reason)
        else:
            self._ask_to_agree(features.unknowns, source.unknowns, 1, reason)
        self._state(node, features)
        kinds: dict[str, nn.Module] = {}
        for activation in module.activations:
            self.feature_dims[id(activation)] = 1
            if isinstance(activation, Bipolar):
                kinds[f"{type(activation).__name__} {activation.pattern}"] = activation
            else:
                kinds[type(activation).__name__] = activation
        for name, activation in kinds.items():
            if isinstance(activation, Bipolar):
                values = signs(module.width, activation.pattern, device="cpu").int().tolist()
                self._ask_for(features, values, 0, f"has layers of different patterns: {', '.join(kinds)}")
            elif isinstance(activation, BatchAxisReLU):
                self._demand(0, lambda: [False], "flips rows of the batch: it is not a function of one sample")
            elif type(activation) not in ODD:
                self._ask_for_plus(features, f"{name} is not known to be odd, and its input has flipped features")
        self.uses.setdefault(id(module), _Use(str(node.target), features.unknowns, features.unknowns))
        self._share(module.weight, features.unknowns)
        self._share(module.bias, features.unknowns)
        self._row(
            node, f"{module.depth} recurrent layers", f"is S f(S x) in every layer and stream: {', '.join(kinds)}"
        )
        return features, features

    def _state(self, node: fx.Node, features: _Features) -> None:
        """Look at the state that recurrent layers start from: zeros have no sign, what comes from outside is theirs."""
        state = _argument(node, 1, "state", None)
        if state is None:
            return
        reason = "starts from a state that does not have the signs of its layers"
        known = self._tensor(state)
        if known is not None and len(known.unknowns) == len(features.unknowns):
            self._ask_to_agree(features.unknowns, known.unknowns, 1, reason)
        elif state.op == "placeholder":
            self._handed_on.add(node)
        elif not (state.op == "get_attr" and not operator.attrgetter(str(state.target))(self._model).any()):
            self._ask_for_plus(features, reason)

    def _plus(self, count: int) -> list[int]:
        unknowns = self.signs.new(count)
        for unknown in unknowns:
            self.signs.fix(unknown, 1)
        return unknowns

    def _bipolar(self, node: fx.Node, module: Bipolar, source: _Features | None) -> _Features | None:
        fits = source is not None and not source.flattened and module.dim in source.dims
        if source is None:
            reason = "acts on something whose signs no linear map in front can take in, such as the network's input"
            self._demand(0, lambda: [False], reason)
        elif not fits:
            self._demand(0, lambda: [False], f"its dim={module.dim} is not the feature dimension")
        else:
            values = signs(len(source.unknowns), module.pattern, device="cpu").int().tolist()
            reason = f"its pattern ({module.pattern}) is not that of the features it gets"
            self._ask_for(source, values, 0, reason)
        self._row(node, type(module).__name__, f"is S f(S x), the pattern of S being {module.pattern}")
        return source

    def _max_pooling(self, node: fx.Node, source: _Features | None) -> _Features | None:
        self._ask_for_plus(source, "is not odd: of a flipped map it keeps the value nearest zero")
        self._row(node, "max pooling", "no map in front of it is flipped")
        return source

    def _activation(self, node: fx.Node, name: str, source: _Features | None) -> _Features | None:
        self._ask_for_plus(source, "is not an odd function, and its input has flipped features")
        self._row(node, name, "no feature in front of it is flipped")
        return source

    def _batch_axis(self, node: fx.Node, source: _Features | None) -> _Features | None:
        self._demand(0, lambda: [False], "flips rows of the batch: it is not a function of one sample")
        self._row(node, "BatchAxisReLU", "")
        return source

    def _odd(self, node: fx.Node, name: str, reason: str, source: _Features | None) -> _Features | None:
        if source is not None and "pool" in name.lower() and not _is_over_positions(source, name):
            self._ask_for_plus(source, "averages over features, of which some are flipped")
        self._row(node, name, reason)
        return source

    def _norm_per_feature(self, node: fx.Node, module: nn.Module, source: _Features | None) -> _Features | None:
        is_batch = isinstance(module, BATCH_NORMS)
        features = int(module.num_features)  # type: ignore[arg-type]
        what = "batch normalization" if is_batch else "instance normalization"
        if source is not None and is_batch and source.flattened and features % len(source.unknowns) == 0:
            repeat = features // len(source.unknowns)
            source = replace(source, unknowns=[unknown for unknown in source.unknowns for _ in range(repeat)])
        fits = source is not None and features == len(source.unknowns)
        if source is not None and fits and (is_batch or _is_over_positions(source, type(module).__name__)):
            self._use(node, module, source.unknowns, source.unknowns)
        else:
            self._ask_for_plus(source, "does not normalise each feature that it gets for itself")
            plus = self._plus(features)
            self._use(node, module, plus, plus)
        self._row(node, what, "is odd in each feature, its shift and running mean being flipped with it")
        return source

    def _group_norm(self, node: fx.Node, module: nn.Module, source: _Features | None) -> _Features | None:
        is_layer = isinstance(module, nn.LayerNorm)
        name = "layer normalization" if is_layer else "group normalization"
        features = int(module.normalized_shape[-1] if is_layer else module.num_channels)  # type: ignore
        if source is None or source.flattened or (is_layer and source.are_maps) or len(source.unknowns) != features:
            self._ask_for_plus(source, "normalises over more, or less, than the features")
            plus = self._plus(features)
            self._use(node, module, plus, plus)
        else:
            size = features if is_layer else features // int(module.num_groups)  # type: ignore[arg-type]
            first = [source.unknowns[index - index % size] for index in range(features)]
            reason = "takes one mean over features that are flipped and features that are not"
            self._ask_to_agree(first, source.unknowns, 2, reason)
            self._use(node, module, source.unknowns, source.unknowns)
        self._row(node, name, "the features of each group have the same sign")
        return source

    def _flatten(self, node: fx.Node, source: _Features | None) -> _Features | None:
        self._row(node, "flatten", "keeps each feature's values together")
        return None if source is None else _Features(source.unknowns, flattened=source.flattened or source.are_maps)

    def _sum(self, node: fx.Node) -> _Features | None:
        terms = [self._tensor(term) for term in node.args if isinstance(term, fx.Node)]
        known = [term for term in terms if term is not None]
        reason = "adds streams whose features are flipped in different patterns"
        if not known:
            return None
        first = known[0]
        alike = [t for t in known if len(t.unknowns) == len(first.unknowns) and t.shape_is_like(first)]
        if len(alike) < len(terms):
            # a constant, an input of the network, or a sum that broadcasts
            for term in known:
                self._ask_for_plus(term, "adds something that is not flipped to features that are")
            self._row(node, "sum", "no feature of it is flipped")
            return known[0]
        result = replace(known[0], unknowns=self.signs.new(len(known[0].unknowns)))
        for term in known:
            self._ask_to_agree(result.unknowns, term.unknowns, 1, reason)
        self._row(node, "sum", "all that is added has the same signs")
        return result

    def _slice(self, node: Any, source: _Features) -> Any:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if source.are_maps and all(isinstance(part, slice) for part in index):
            taken = index[1] if len(index) > 1 else slice(None)
            if not any(isinstance(bound, fx.Node) for bound in (taken.start, taken.stop, taken.step)):
                self._row(node, "slice", "takes a part of each feature, or of the features")
                return replace(source, unknowns=source.unknowns[taken])
        return self._unknown(node, "indexing")

    def _pad(self, node: fx.Node, source: _Features) -> Any:
        pad = _argument(node, 1, "pad", None)
        mode, value = _argument(node, 2, "mode", "constant"), _argument(node, 3, "value", None)
        plain = isinstance(pad, (tuple, list)) and all(isinstance(size, int) for size in pad)
        if not plain or mode != "constant" or value not in (None, 0) or source.dims != (1, -3):
            return self._unknown(node, "pad")
        # Sizes come in pairs from the last dimension on; the fourth of an image batch [N, C, H, W] is C's.
        before, after = (pad[4], pad[5]) if len(pad) >= 6 else (0, 0)
        if min(before, after) < 0 or len(pad) > 6 or len(pad) % 2:
            return self._unknown(node, "pad")
        self._row(node, "zero padding", "a zero has no sign")
        return replace(source, unknowns=[*self.signs.new(before), *source.unknowns, *self.signs.new(after)])

    def _concatenation(self, node: fx.Node) -> Any:
        tensors = _argument(node, 0, "tensors", ())
        if not isinstance(tensors, (list, tuple)) or not all(isinstance(part, fx.Node) for part in tensors):
            return self._unknown(node, "concatenation")
        parts = [self._tensor(part) for part in tensors]  # one may be there twice
        known = [part for part in parts if part is not None]
        dim = _argument(node, 1, "dim", 0)
        # dimension 1 is the features' without a doubt for maps only, dimension -1 for what linear maps put out
        if len(known) < len(parts) or any(part.flattened or dim != (1 if part.are_maps else -1) for part in known):
            return self._unknown(node, "concatenation")
        self._row(node, "concatenation", "keeps each feature's sign")
        return replace(known[0], unknowns=[unknown for part in known for unknown in part.unknowns])

    def _unknown(self, node: fx.Node, name: str) -> Any:
        """Anything else is left as it is, which is right if nothing that goes in is flipped."""
        for source in node.all_input_nodes:
            self._ask_for_plus(self._tensor(source), f"{name} is not known to commute with flips of sign")
        inside = self._modules[str(node.target)].modules() if node.op == "call_module" else ()
        if any(isinstance(module, (Bipolar, BipolarMaxPool2d, BatchAxisReLU)) for module in inside):
            self._demand(0, lambda: [False], "holds a bipolar activation where torch.fx cannot look into it")
        self._row(node, name, "no feature in front of it is flipped")
        return None


_NO_TENSOR = object()


def _argument(node: Any, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _is_not_floating(value: Any) -> bool:
    return isinstance(value, torch.dtype) and not value.is_floating_point


def _is_flattening(node: Any) -> bool:
    """Whether a view is x.view(N, -1), the N being the size of a tensor's first dimension."""
    shape = node.args[1:] if len(node.args) != 2 or not isinstance(node.args[1], (tuple, list)) else node.args[1]
    if not isinstance(shape, (tuple, list)) or len(shape) != 2 or shape[1] != -1 or not isinstance(shape[0], fx.Node):
        return False
    size: Any = shape[0]  # x.size(0), or item 0 of x.shape or x.size()
    of_all = size.target is operator.getitem and size.args[0].target in ("size", getattr)
    return bool((size.target == "size" or of_all) and size.args[1] == 0)


def _is_over_positions(features: _Features, name: str) -> bool:
    """Whether an operation called `...2d` (or 1d, 3d) runs over the positions of these feature maps, each for itself.

    Given less than it expects, torch takes the batch for the features, and the features for positions.
    """
    return features.are_maps and features.dims == (1, -1 - int(name[-2]))


def flipped_tensors(module: nn.Module) -> list[Tensor | None]:
    """What is flipped of a linear map (its weight comes first) or a normalization: parameters and running mean."""
    has_weight = isinstance(module, (*LINEAR, nn.Embedding, RecurrentStack))
    names = ("weight", "bias") if has_weight else ("bias", "running_mean")
    return [getattr(module, name, None) for name in names]


def _leaves(features: _Features, dims: Any) -> bool:
    """Whether a mean over `dims` of images [N, C, H, W] leaves each feature to itself."""
    chosen = (dims,) if isinstance(dims, int) else dims
    is_pair = isinstance(chosen, (tuple, list)) and all(isinstance(dim, int) for dim in chosen)
    return features.dims == (1, -3) and not features.flattened and is_pair and {dim % 4 for dim in chosen} == {2, 3}


def _dims(linear: nn.Module) -> tuple[int, int]:
    """The two names of the feature dimension of what `linear` puts out."""
    spatial = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
    return 1, -1 - next((count for kind, count in spatial.items() if isinstance(linear, kind)), 0)
