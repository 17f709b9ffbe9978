"""Tests of bipolar/activations.py: every module is held against a plain loop over the units."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import bipolar as package
from bipolar import kernels
from bipolar.activations import (
    BELU,
    BGELU,
    BSELU,
    PATTERNS,
    BatchAxisReLU,
    Bipolar,
    BLeakyReLU,
    BReLU,
    BSiLU,
    batch_axis_relu,
    bipolar,
    flipped,
    signs,
    upright,
)
from bipolar.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
BTanh = functools.partial(Bipolar, torch.tanh)

# name: (how the module is made from dim and pattern, its base function in torch)
ACTIVATIONS = {
    "BReLU": (BReLU, F.relu),
    "BELU": (BELU, F.elu),
    "BLeakyReLU": (BLeakyReLU, F.leaky_relu),
    "BSELU": (BSELU, F.selu),
    "BGELU": (BGELU, F.gelu),
    "BSiLU": (BSiLU, F.silu),
    "tanh": (BTanh, torch.tanh),
}
SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772

every_activation = pytest.mark.parametrize(
    ("make", "base"), [pytest.param(*pair, id=name) for name, pair in ACTIVATIONS.items()]
)
every_module = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, (make, _) in ACTIVATIONS.items()])
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
relu_and_elu = pytest.mark.parametrize(
    ("make", "base"), [pytest.param(*ACTIVATIONS[name], id=name) for name in ("BReLU", "BELU")]
)
few_examples = settings(deadline=None, max_examples=40)


def is_flipped(index, features, pattern):
    return index % 2 == 1 if pattern == "interleaved" else index < features // 2


def naive(fn, x, dim=1, pattern="interleaved", swap=False):
    """The definition as a loop over the units; `swap` flips the units that the pattern leaves upright."""
    features = x.shape[dim]
    units = [
        -fn(-unit) if is_flipped(i, features, pattern) != swap else fn(unit) for i, unit in enumerate(x.unbind(dim))
    ]
    return torch.stack(units, dim) if units else x.clone()


def sample(*shape, seed=0, dtype=torch.float64):
    """Numbers from -3 to 3 in steps of a quarter: about one in 25 is exactly 0, and bfloat16 holds all of them."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-12, 13, shape, generator=generator) / 4).to(dtype)


def smooth_sample(*shape, seed=0):
    """Numbers of either sign that are not near 0, where some base functions have a kink."""
    x = sample(*shape, seed=seed)
    return x + torch.where(x < 0, -0.1, 0.1)


def value_and_gradient(fn, x):
    """fn(x) and the product of its Jacobian with a fixed vector that is neither constant nor 0."""
    x = x.detach().requires_grad_()
    y = fn(x)
    vector = (torch.arange(y.numel()).reshape(y.shape) % 7 + 1).to(y.dtype)
    (gradient,) = torch.autograd.grad(y, x, vector)
    return y.detach(), gradient


def assert_same(fn, reference, x):
    value, gradient = value_and_gradient(fn, x)
    expected, expected_gradient = value_and_gradient(reference, x)
    assert value.dtype == x.dtype
    assert_close(value, expected)
    assert_close(gradient, expected_gradient)


def assert_naive(make, base, x, dim=1, pattern="interleaved"):
    assert_same(make(dim=dim, pattern=pattern), lambda v: naive(base, v, dim, pattern), x)


# --- the definition ---------------------------------------------------------------------------------------------------

SHAPES = [(7,), (1,), (4, 5), (3, 1), (3, 4, 5), (2, 5, 3, 4), (2, 3, 2, 2, 3)]
SHAPES_AND_DIMS = [(shape, dim) for shape in SHAPES for dim in (0, 1, -1, 2) if dim < len(shape)]
EMPTY = [((0, 5), 1), ((0, 4, 3), 2), ((3, 0), 1), ((0,), 0), ((2, 0, 3, 3), 1), ((2, 4, 0, 3), 1), ((0, 0), -1)]


@every_activation
@every_pattern
@pytest.mark.parametrize(("shape", "dim"), SHAPES_AND_DIMS)
def test_equals_a_loop_over_the_units(make, base, pattern, shape, dim):
    assert_naive(make, base, sample(*shape), dim, pattern)


@every_activation
@every_pattern
@pytest.mark.parametrize(("shape", "dim"), EMPTY)
def test_batches_and_features_may_be_empty(make, base, pattern, shape, dim):
    assert_naive(make, base, sample(*shape), dim, pattern)


@every_activation
@few_examples
@given(data=st.data())
def test_equals_a_loop_over_the_units_for_any_shape(make, base, data):
    x, dim, pattern = data.draw(cases())
    assert_naive(make, base, x, dim, pattern)


@pytest.mark.parametrize(
    ("make", "scalar"),
    [
        (BReLU, lambda v: max(v, 0.0)),
        (BELU, lambda v: v if v > 0 else math.expm1(v)),
        (BLeakyReLU, lambda v: v if v > 0 else 0.01 * v),
        (BSELU, lambda v: SELU_SCALE * (v if v > 0 else SELU_ALPHA * math.expm1(v))),
        (BGELU, lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2)))),
        (BSiLU, lambda v: v / (1 + math.exp(-v))),
        (BTanh, math.tanh),
    ],
)
@pytest.mark.parametrize("value", [-2.0, -0.5, 0.0, 0.25, 3.0])
def test_formula_of_each_activation(make, scalar, value):
    even, odd = make()(torch.full((1, 2), value, dtype=torch.float64))[0].tolist()
    assert even == pytest.approx(scalar(value))
    assert odd == pytest.approx(-scalar(-value))


@pytest.mark.parametrize(
    ("module", "base"),
    [
        (BELU(alpha=0.5), functools.partial(F.elu, alpha=0.5)),
        (BLeakyReLU(negative_slope=0.2), functools.partial(F.leaky_relu, negative_slope=0.2)),
        (BGELU(approximate="tanh"), functools.partial(F.gelu, approximate="tanh")),
    ],
    ids=["alpha", "negative_slope", "approximate"],
)
def test_parameters_of_the_base_function(module, base):
    assert_same(module, lambda v: naive(base, v), sample(4, 5))


@pytest.mark.parametrize("fn", [F.relu, torch.relu, torch.Tensor.relu, nn.ReLU(), lambda v: v.clamp(min=0)])
@every_pattern
def test_relu_in_any_spelling(fn, pattern):
    assert_same(lambda v: bipolar(fn, v, 2, pattern), BReLU(2, pattern), smooth_sample(3, 4, 5))


def test_defaults_are_feature_dimension_1_and_the_papers_formula():
    x = sample(4, 5, 3)
    assert torch.equal(bipolar(torch.tanh, x), bipolar(torch.tanh, x, 1, "interleaved"))
    assert torch.equal(BTanh()(x), bipolar(torch.tanh, x))
    assert torch.equal(BReLU()(x), bipolar(torch.relu, x))


@every_module
@pytest.mark.parametrize("dim", [1, -1])
def test_gradcheck(make, dim):
    x = smooth_sample(2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(make(dim), x, check_forward_ad=True, check_batched_grad=True)


@every_module
@pytest.mark.parametrize("dim", [1, -1])
def test_gradgradcheck(make, dim):
    x = smooth_sample(2, 3, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(make(dim), x, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize(
    ("name", "at_zero"),
    [
        ("BReLU", 0.0),
        ("BELU", 1.0),
        ("BLeakyReLU", 0.01),
        ("BSELU", SELU_SCALE * SELU_ALPHA),
        ("BGELU", 0.5),
        ("BSiLU", 0.5),
        ("tanh", 1.0),
    ],
)
@every_pattern
@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 3)])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_gradient_at_0_is_the_base_functions(name, at_zero, pattern, shape, zero):
    make, base = ACTIVATIONS[name]
    x = torch.full(shape, zero, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(make(pattern=pattern)(x).sum(), x)
    (expected,) = torch.autograd.grad(base(x).sum(), x)
    assert torch.equal(gradient, expected)
    assert_close(gradient, torch.full_like(x, at_zero))


# --- dtypes -----------------------------------------------------------------------------------------------------------


@every_activation
@every_pattern
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_floating_dtype_is_kept(make, base, pattern, dim, dtype):
    assert_naive(make, base, sample(3, 5, 6, dtype=dtype), dim, pattern)


@every_module
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_other_dtypes_are_refused(make, dtype):
    with pytest.raises(TypeError, match=rf"needs a floating-point tensor, not {dtype}"):
        make()(torch.ones(2, 3, dtype=dtype))


# --- memory layouts ---------------------------------------------------------------------------------------------------

DENSE = {
    "contiguous": lambda: sample(2, 5, 3, 4),
    "channels_last": lambda: sample(2, 5, 3, 4).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: sample(2, 5, 3, 2, 3).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: sample(4, 5, 3).transpose(1, 2),
    "matrix.T": lambda: sample(6, 5).T,
    "permuted": lambda: sample(4, 5, 3).permute(2, 0, 1),
}
NOT_DENSE = {
    "every second feature": lambda: sample(3, 10, 2)[:, ::2],
    "every second column": lambda: sample(3, 5, 8)[..., ::2],
    "window": lambda: sample(5, 7)[1:4, 1:6],
    "expanded batch": lambda: sample(1, 5).expand(4, 5),
    "expanded features": lambda: sample(4, 1).expand(4, 5),
    "expanded twice": lambda: sample(1, 5, 1).expand(3, 5, 4),
    "single number": lambda: torch.tensor(-1.5, dtype=torch.float64).expand(3, 5),
}


def layouts(table):
    return pytest.mark.parametrize("layout", [pytest.param(make, id=name) for name, make in table.items()])


@every_activation
@every_pattern
@layouts(DENSE | NOT_DENSE)
def test_values_in_every_layout(make, base, pattern, layout):
    x = layout()
    for dim in range(x.ndim):
        assert_naive(make, base, x, dim, pattern)


@every_module
@layouts(DENSE)
def test_strides_are_those_of_relu(make, layout):
    x = layout()
    for dim in range(x.ndim):
        assert make(dim)(x).stride() == torch.relu(x).stride() == x.stride()


@every_module
@layouts(DENSE)
def test_strides_of_the_gradient_are_those_of_the_input(make, layout):
    x = layout().requires_grad_()
    for dim in range(x.ndim):
        y = make(dim)(x)
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert gradient.stride() == x.stride()


@every_module
@every_pattern
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 4, 3, 3), (2, 4, 1, 1), (2, 1, 3, 3), (2, 4, 1, 3)])
def test_channels_last_is_kept(make, pattern, shape):
    x = sample(*shape).to(memory_format=torch.channels_last)
    assert make(pattern=pattern)(x).is_contiguous(memory_format=torch.channels_last)


def test_the_gradient_of_brelu_is_laid_out_as_relus():
    """A mean's gradient is not channels_last, and sums over gradients depend on the layout in their last bits."""
    x = sample(2, 4, 3, 5).to(memory_format=torch.channels_last).requires_grad_()
    for gradient in (torch.ones(2, 4, 3, 5), torch.ones(()).expand(2, 4, 3, 5)):
        mine, relus = (torch.autograd.grad(fn(x), x, gradient.to(x))[0] for fn in (BReLU(), nn.ReLU()))
        assert mine.stride() == relus.stride() == x.stride()


@every_module
def test_channels_last_3d_is_kept(make):
    x = sample(2, 4, 3, 2, 3).to(memory_format=torch.channels_last_3d)
    assert make()(x).is_contiguous(memory_format=torch.channels_last_3d)


# --- BReLU ------------------------------------------------------------------------------------------------------------

# (shape, feature dimension): the features innermost in memory, or not
INNER_AND_OUTER = pytest.mark.parametrize(("shape", "dim"), [((4, 6), 1), ((4, 6), 0), ((3, 5, 4), 1)])


@every_pattern
@INNER_AND_OUTER
def test_brelu_makes_no_negative_zero(pattern, shape, dim):
    y = BReLU(dim, pattern)(smooth_sample(*shape))
    assert (y == 0).any()
    assert not torch.signbit(y[y == 0]).any()


def with_nan(*shape):
    x = sample(*shape)
    x.view(-1)[::3] = torch.nan
    return x


@every_pattern
@INNER_AND_OUTER
def test_brelu_propagates_nan(pattern, shape, dim):
    x = with_nan(*shape)
    y = BReLU(dim, pattern)(x)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~x.isnan()], naive(F.relu, x, dim, pattern)[~x.isnan()])


@every_pattern
@INNER_AND_OUTER
@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_brelu_keeps_infinity(pattern, shape, dim, infinity):
    x = torch.full(shape, infinity)
    y = BReLU(dim, pattern)(x)
    assert torch.equal(y, naive(F.relu, x, dim, pattern))
    assert y.isinf().any()


@INNER_AND_OUTER
def test_brelu_blocks_the_gradient_rather_than_multiply_it_by_0(shape, dim):
    x = torch.zeros(shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(BReLU(dim)(x), x, torch.full(shape, torch.inf))
    assert torch.equal(gradient, torch.zeros(shape))


def output_and_saved(fn, x):
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = fn(x.requires_grad_())
    return y, saved


def shares_memory(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@every_pattern
@INNER_AND_OUTER
def test_a_large_brelu_saves_its_output_and_nothing_else(pattern, shape, dim, monkeypatch):
    monkeypatch.setattr(kernels, "LARGE", 0)
    x = sample(*shape)
    y, saved = output_and_saved(BReLU(dim, pattern), x)
    assert [tensor.shape for tensor in saved] == [x.shape]
    assert shares_memory(saved[0], y)
    assert not shares_memory(saved[0], x)


@pytest.mark.parametrize("large", [0, 2**60])
@every_module
@every_pattern
@INNER_AND_OUTER
def test_at_most_one_tensor_like_the_input_is_saved(make, pattern, shape, dim, large, monkeypatch):
    monkeypatch.setattr(kernels, "LARGE", large)
    x = sample(*shape)
    _, saved = output_and_saved(make(dim, pattern), x)
    alike = [tensor for tensor in saved if tensor.numel() > shape[dim]]
    assert len(alike) == 1
    assert alike[0].numel() == x.numel()


@INNER_AND_OUTER
def test_changing_the_saved_output_in_place_is_noticed(shape, dim, monkeypatch):
    monkeypatch.setattr(kernels, "LARGE", 0)
    y = BReLU(dim)(sample(*shape).requires_grad_())
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- torch.compile ----------------------------------------------------------------------------------------------------

EVERY_COMPILED = pytest.mark.parametrize(
    "module",
    [
        *(pytest.param(make(), id=name) for name, (make, _) in ACTIVATIONS.items()),
        pytest.param(BReLU(-1, "halves"), id="BReLU-halves"),
        pytest.param(BELU(0, "halves"), id="BELU-halves"),
        pytest.param(Bipolar(nn.ReLU(inplace=True)), id="ReLU-inplace"),
        pytest.param(Bipolar(nn.SiLU(inplace=True)), id="SiLU-inplace"),
        pytest.param(BatchAxisReLU(), id="BatchAxisReLU"),
    ],
)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@EVERY_COMPILED
def test_compiled_equals_eager(module):
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(compiled, module, sample(3, 5, 4))


@pytest.mark.usefixtures("fresh_compiler")
@EVERY_COMPILED
def test_compiled_once_more_for_all_batch_sizes(module):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for batch_size in (3, 5, 8, 6):
        assert_same(compiled, module, sample(batch_size, 5, 4))
    assert counter.frame_count == 2


@pytest.mark.usefixtures("fresh_compiler")
@EVERY_COMPILED
def test_compiled_for_dynamic_shapes(module):
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3, 4, 5), (5, 7, 2), (2, 6, 8)):
        assert_same(compiled, module, sample(*shape))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("module", [BReLU(), BELU()], ids=["BReLU", "BELU"])
def test_compiled_by_inductor(module):
    compiled = torch.compile(module, fullgraph=True)
    assert_same(compiled, module, sample(3, 5, 4, dtype=torch.float32))


# --- torch.func -------------------------------------------------------------------------------------------------------


def energy(fn):
    """A scalar function of fn(x) whose first two derivatives are not constant."""
    return lambda x: (fn(x) ** 3).sum()


@every_activation
@pytest.mark.parametrize("in_dim", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vmap(make, base, in_dim, dim):
    x = sample(3, 4, 5, 2)
    expected = torch.stack([naive(base, part, dim) for part in x.unbind(in_dim)])
    assert_close(torch.func.vmap(make(dim), in_dims=in_dim)(x), expected)


@every_activation
def test_vmap_within_vmap(make, base):
    x = sample(3, 4, 5, 2)
    mapped = torch.func.vmap(torch.func.vmap(make(), in_dims=2), in_dims=1, out_dims=1)
    expected = torch.stack([torch.stack([naive(base, b) for b in a.unbind(2)]) for a in x.unbind(1)], dim=1)
    assert_close(mapped(x), expected)


@every_activation
def test_vmap_with_an_argument_that_is_not_mapped(make, base):
    x, weight = sample(3, 4, 5), sample(3, 5, seed=1)
    mapped = torch.func.vmap(lambda a, w: make()(a * w), in_dims=(1, None))
    assert_close(mapped(x, weight), torch.stack([naive(base, a * weight) for a in x.unbind(1)]))


@every_activation
@pytest.mark.parametrize("dim", [0, 1])
def test_grad(make, base, dim):
    x = sample(4, 5)
    _, expected = value_and_gradient(energy(lambda v: naive(base, v, dim)), x)
    assert_close(torch.func.grad(energy(make(dim)))(x), expected)


@every_activation
@pytest.mark.parametrize("dim", [0, 1])
def test_gradient_of_each_sample(make, base, dim):
    x = sample(3, 4, 5)
    reference = energy(lambda v: naive(base, v, dim))
    expected = torch.stack([value_and_gradient(reference, part)[1] for part in x])
    assert_close(torch.func.vmap(torch.func.grad(energy(make(dim))))(x), expected)


@every_activation
@pytest.mark.parametrize("dim", [0, 1])
def test_jvp(make, base, dim):
    x, tangent = sample(4, 5), sample(4, 5, seed=1)
    value, derivative = torch.func.jvp(make(dim), (x,), (tangent,))
    _, slope = value_and_gradient(lambda v: naive(base, v, dim).sum(), x)
    assert_close(value, naive(base, x, dim))
    assert_close(derivative, slope * tangent)


@relu_and_elu
@pytest.mark.parametrize("dim", [0, 1])
def test_jacobian(make, base, dim):
    x = sample(3, 4)
    expected = torch.autograd.functional.jacobian(lambda v: naive(base, v, dim), x)
    assert_close(torch.func.jacrev(make(dim))(x), expected)
    assert_close(torch.func.jacfwd(make(dim))(x), expected)


def second_derivatives():
    jacobians = {"rev": torch.func.jacrev, "fwd": torch.func.jacfwd}
    pairs = itertools.product(jacobians, jacobians)
    return [pytest.param(jacobians[a], jacobians[b], id=f"{a} over {b}") for a, b in pairs]


@relu_and_elu
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("outer", "inner"), second_derivatives())
def test_hessian(make, base, dim, outer, inner):
    x = sample(3, 4)
    expected = torch.autograd.functional.hessian(energy(lambda v: naive(base, v, dim)), x)
    assert_close(outer(inner(energy(make(dim))))(x), expected)
    assert_close(torch.func.hessian(energy(make(dim)))(x), expected)


# --- modules ----------------------------------------------------------------------------------------------------------


@every_module
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_meta_device(make, dim):
    x = torch.empty(2, 3, 4, 5, dtype=torch.float16, device="meta").to(memory_format=torch.channels_last)
    y = make(dim)(x)
    assert y.is_meta
    assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())


def clone_by_pickle(module):
    return pickle.loads(pickle.dumps(module))


@every_module
@pytest.mark.parametrize("clone", [copy.deepcopy, clone_by_pickle], ids=["deepcopy", "pickle"])
def test_copies_do_the_same(make, clone):
    module, x = make(2, "halves"), sample(3, 4, 5)
    twin = clone(module)
    assert twin is not module
    assert torch.equal(twin(x), module(x))


@every_module
def test_nothing_to_learn_or_store(make):
    assert list(make().parameters()) == []
    assert make().state_dict() == {}


@every_module
def test_repr_shows_dim_and_pattern(make):
    assert "dim=-1, pattern='halves'" in repr(make(-1, "halves"))


@every_module
def test_autocast(make):
    layer, module, x = nn.Linear(4, 5), make(), sample(3, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = layer(x)
        y = module(hidden)
    y.float().sum().backward()
    assert hidden.dtype == y.dtype == torch.bfloat16
    assert_close(y, module(hidden))
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.abs().sum() > 0


IN_PLACE = pytest.mark.parametrize("base", [nn.ReLU, nn.ELU, nn.SiLU, nn.SELU, nn.LeakyReLU])


@IN_PLACE
@every_pattern
def test_in_place_base_functions_leave_the_input_alone(base, pattern):
    x = sample(4, 5, 3)
    before = x.clone()
    Bipolar(base(inplace=True), pattern=pattern)(x)
    assert torch.equal(x, before)


@IN_PLACE
@every_pattern
def test_in_place_base_functions_compute_the_same(base, pattern):
    in_place, plain = Bipolar(base(inplace=True), pattern=pattern), Bipolar(base(), pattern=pattern)
    assert_same(in_place, plain, sample(4, 5, 3))


def test_a_base_with_parameters_learns():
    module, x = Bipolar(nn.PReLU(dtype=torch.float64)), smooth_sample(4, 5)
    module(x).sum().backward()
    (expected,) = torch.autograd.grad(naive(module.fn, x).sum(), module.fn.weight)
    assert_close(module.fn.weight.grad, expected)
    assert expected != 0


def test_a_base_with_parameters_has_them_in_the_state_dict():
    module, twin = Bipolar(nn.PReLU(init=0.5)), Bipolar(nn.PReLU())
    assert list(module.state_dict()) == ["fn.weight"]
    twin.load_state_dict(module.state_dict())
    assert twin.fn.weight.item() == 0.5


# --- errors -----------------------------------------------------------------------------------------------------------


@every_module
@pytest.mark.parametrize(("shape", "dim"), [((2, 3), 2), ((2, 3), -3), ((5,), 1), ((), 0), ((), -1), ((), 1)])
def test_dim_out_of_range(make, shape, dim):
    with pytest.raises(IndexError, match=rf"dim={dim} is not a dimension .* dim is the feature dimension"):
        make(dim)(torch.ones(shape))


@every_module
@pytest.mark.parametrize("dim", [True, False, 1.0, "1", None, (1,)])
def test_dim_must_be_an_integer(make, dim):
    with pytest.raises(TypeError, match="dim must be an integer, not "):
        make(dim)


@pytest.mark.parametrize("fn", [torch.relu, torch.tanh])
@pytest.mark.parametrize("dim", [True, 1.0, None])
def test_dim_must_be_an_integer_in_the_function(fn, dim):
    with pytest.raises(TypeError, match="dim must be an integer, not "):
        bipolar(fn, torch.ones(2, 3), dim)


PATTERN_USERS = {
    "BReLU": lambda pattern: BReLU(pattern=pattern),
    "BELU": lambda pattern: BELU(pattern=pattern),
    "Bipolar": lambda pattern: Bipolar(torch.tanh, pattern=pattern),
    "bipolar": lambda pattern: bipolar(torch.tanh, torch.ones(2, 3), pattern=pattern),
    "signs": lambda pattern: signs(4, pattern),
    "flipped": lambda pattern: flipped(4, pattern),
    "upright": lambda pattern: upright(4, pattern),
}


@pytest.mark.parametrize("use", [pytest.param(use, id=name) for name, use in PATTERN_USERS.items()])
@pytest.mark.parametrize(("wrong", "near"), [("halfs", "halves"), ("Interleave", "interleaved")])
def test_wrong_pattern_names_the_allowed_and_the_nearest(use, wrong, near):
    message = rf"pattern='{wrong}' is not allowed; choose from interleaved, halves \(did you mean '{near}'\?\)"
    with pytest.raises(ConfigError, match=message):
        use(wrong)


@pytest.mark.parametrize("wrong", ["zebra", None, 3])
def test_wrong_pattern_near_to_nothing(wrong):
    with pytest.raises(ConfigError, match=r"is not allowed; choose from interleaved, halves$"):
        BReLU(pattern=wrong)


def test_wrong_gelu_approximation():
    with pytest.raises(ConfigError, match=r"approximate='tan' .* none, tanh \(did you mean 'tanh'\?\)"):
        BGELU(approximate="tan")


@pytest.mark.parametrize("fn", [torch.sum, nn.Flatten(), nn.GLU(), lambda v: v[:1]], ids=["sum", "flat", "glu", "row"])
def test_base_functions_that_change_the_shape_are_refused(fn):
    with pytest.raises(ValueError, match=r"made \(.*\) of \(2, 4, 6\); it must act element by element"):
        bipolar(fn, torch.ones(2, 4, 6))


# --- properties -------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw, min_rank=1):
    """A tensor with some exact zeros, one of its dimensions, and a pattern."""
    shape = draw(st.lists(st.integers(0, 5), min_size=min_rank, max_size=5))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    return sample(*shape, seed=draw(st.integers(0, 99))), dim, draw(st.sampled_from(PATTERNS))


@every_activation
@few_examples
@given(case=cases())
def test_negated_input_is_negated_output_with_the_signs_swapped(make, base, case):
    x, dim, pattern = case
    assert_close(make(dim, pattern)(-x), -naive(base, x, dim, pattern, swap=True))


@few_examples
@given(case=cases())
def test_brelu_flipped_features_are_never_positive_and_upright_ones_never_negative(case):
    x, dim, pattern = case
    units = BReLU(dim, pattern)(x).movedim(dim, 0)
    assert (units[flipped(len(units), pattern)] <= 0).all()
    assert (units[upright(len(units), pattern)] >= 0).all()


@few_examples
@given(case=cases())
def test_brelu_keeps_a_number_or_makes_it_0(case):
    x, dim, pattern = case
    y = BReLU(dim, pattern)(x)
    assert ((y == x) | (y == 0)).all()
    assert_close(y + naive(F.relu, x, dim, pattern, swap=True), x)


@every_module
@few_examples
@given(data=st.data())
def test_a_sample_does_not_depend_on_its_place_in_the_batch(make, data):
    x, _, pattern = data.draw(cases(min_rank=2))
    order = data.draw(st.permutations(range(len(x))))
    module = make(pattern=pattern)
    assert_close(module(x[order]), module(x)[order])


@pytest.mark.parametrize("shift", [-0.25, 0.25, 1.0, 3.0])
@every_pattern
def test_layer_mean_is_half_the_shift_and_nearer_zero_than_relus(shift, pattern):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 64, generator=generator) + shift
    mean = BReLU(pattern=pattern)(x).mean()
    assert mean == pytest.approx(shift / 2, abs=0.02)
    assert mean.abs() < torch.relu(x).mean().abs()


@given(features=st.integers(0, 40), pattern=st.sampled_from(PATTERNS))
@few_examples
def test_flipped_and_upright_partition_the_features(features, pattern):
    indices = list(range(features))
    down, up = indices[flipped(features, pattern)], indices[upright(features, pattern)]
    assert sorted(down + up) == indices
    assert len(down) == features // 2
    assert down == [i for i in indices if is_flipped(i, features, pattern)]


@given(features=st.integers(0, 40), pattern=st.sampled_from(PATTERNS))
@few_examples
def test_signs_are_minus_1_where_flipped(features, pattern):
    expected = [-1.0 if is_flipped(i, features, pattern) else 1.0 for i in range(features)]
    assert signs(features, pattern).tolist() == expected


def test_signs_have_the_dtype_and_device_asked_for():
    assert signs(3).dtype == torch.get_default_dtype()
    assert signs(3, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert signs(3, device="meta").is_meta


# --- the misreading: signs along the batch ----------------------------------------------------------------------------


@few_examples
@given(case=cases())
def test_batch_axis_relu_is_the_bipolar_relu_of_the_transposed_batch(case):
    x, _, _ = case
    assert torch.equal(batch_axis_relu(x), naive(F.relu, x, dim=0))
    assert torch.equal(batch_axis_relu(x), BReLU(0)(x))
    assert torch.equal(BatchAxisReLU()(x), batch_axis_relu(x))


def test_batch_axis_relu_of_a_matrix_is_brelu_of_its_transpose():
    x = sample(5, 4)
    assert torch.equal(batch_axis_relu(x), BReLU(1)(x.T).T)


@pytest.mark.parametrize("shape", [(1, 6), (1, 3, 4, 4), (1,)])
def test_batch_axis_relu_of_one_sample_is_relu(shape):
    x = sample(*shape)
    assert torch.equal(batch_axis_relu(x), torch.relu(x))


def test_batch_axis_relu_makes_different_rows_of_identical_ones():
    first, second = batch_axis_relu(torch.tensor([[1.0, -2.0], [1.0, -2.0]]))
    assert first.tolist() == [1.0, 0.0]
    assert second.tolist() == [0.0, -2.0]


def test_batch_axis_relu_depends_on_the_order_of_the_batch():
    x, swapped = torch.tensor([[1.0], [-1.0]]), torch.tensor([[-1.0], [1.0]])
    assert batch_axis_relu(x).tolist() == [[1.0], [-1.0]]
    assert batch_axis_relu(swapped).tolist() == [[0.0], [0.0]]


def test_batch_axis_relu_gradient_at_0():
    x = torch.zeros(5, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(batch_axis_relu(x).sum(), x)
    assert gradient.tolist() == [[1, 1], [0, 0], [1, 1], [0, 0], [1, 1]]


def test_batch_axis_relu_gradient_elsewhere():
    x = torch.tensor([[2.0, -2.0], [2.0, -2.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(batch_axis_relu(x).sum(), x)
    assert gradient.tolist() == [[1, 0], [0, 1]]


def test_batch_axis_relu_needs_a_batch():
    with pytest.raises(IndexError, match="needs a batch dimension"):
        batch_axis_relu(torch.tensor(1.0))


# --- the package ------------------------------------------------------------------------------------------------------


def modules_after(statement):
    """The top-level modules that a fresh interpreter has imported after `statement`."""
    program = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_does_not_import_torch():
    modules = modules_after("import bipolar")
    assert "bipolar" in modules
    assert "torch" not in modules


def test_importing_an_activation_imports_torch_and_no_tool():
    modules = modules_after("from bipolar import BReLU")
    assert {"bipolar", "torch"} <= modules
    assert modules.isdisjoint({"torchvision", "wandb", "hydra", "omegaconf", "sklearn", "matplotlib"})


@pytest.mark.parametrize("name", package.__all__)
def test_the_package_offers_each_public_name(name):
    # getattr, not an import: the names are looked up lazily
    assert getattr(package, name) is getattr(sys.modules["bipolar.activations"], name)
    assert name in dir(package)


def test_the_package_offers_nothing_else():
    with pytest.raises(AttributeError, match="no attribute 'TriReLU'"):
        _ = package.TriReLU
