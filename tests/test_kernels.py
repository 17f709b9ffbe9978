"""Fast ways of computing S f(S x) against the definition, to the last bit."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bipolar import kernels
from bipolar.activations import PATTERNS, bipolar, signs

BASES = {"relu": F.relu, "elu": F.elu, "elu-0.5": nn.ELU(0.5), "selu": F.selu, "SELU": nn.SELU()}
LAYOUTS = {
    "channels first": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "gaps": lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
}


@pytest.fixture(params=[64, 2**60], ids=["large", "small"])
def size(request, monkeypatch):
    """What is a large tensor, which is computed in another way."""
    monkeypatch.setattr(kernels, "LARGE", request.param)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def definition(fn, x, dim, pattern):
    sign = signs(x.shape[dim], pattern, dtype=x.dtype).view([-1 if d == dim else 1 for d in range(x.ndim)])
    return fn(x * sign) * sign


def with_gradient(function, x, gradient):
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, gradient)[0]


def assert_exact(fn, x, gradient, dim, pattern):
    y, slope = with_gradient(lambda v: bipolar(fn, v, dim, pattern), x, gradient)
    expected, expected_slope = with_gradient(lambda v: definition(fn, v, dim, pattern), x, gradient)
    assert torch.equal(y, expected)
    assert torch.equal(slope, expected_slope)
    assert slope.stride() == expected_slope.stride()


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("fn", BASES.values(), ids=BASES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dim", [1, 3])
def test_exactly_the_definition(fn, layout, dim, pattern, dtype):
    torch.manual_seed(0)
    shape = (16, 8, 4, 16)
    assert_exact(fn, layout(torch.randn(shape, dtype=dtype)), layout(torch.randn(shape, dtype=dtype)), dim, pattern)


@pytest.mark.usefixtures("size")
@settings(deadline=None, max_examples=60)
@given(shape=st.lists(st.integers(1, 40), min_size=2, max_size=3), data=st.data())
def test_exactly_the_definition_at_any_size(shape, data):
    dim = data.draw(st.integers(0, len(shape) - 1))
    pattern = data.draw(st.sampled_from(PATTERNS))
    assert_exact(F.elu, torch.randn(shape), torch.randn(shape), dim, pattern)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("fn", [F.relu, F.elu])
def test_exactly_the_definition_where_torch_shares_the_work_between_its_threads(fn):
    torch.manual_seed(0)
    for shape in ((128, 64, 18, 16), (2048, 1025), (3, 70001)):
        x = torch.randn(shape)
        assert x.numel() >= kernels.LARGE
        assert_exact(fn, x, torch.randn(shape), 1, "interleaved")


@pytest.mark.usefixtures("size")
def test_a_gradient_in_another_layout():
    x, gradient = torch.randn(16, 8, 4, 16), torch.randn(16, 8, 4, 16).to(memory_format=torch.channels_last)
    for fn in (F.relu, F.elu):
        assert_exact(fn, x, gradient, 1, "interleaved")
        assert_exact(fn, x, torch.ones(()).expand(16, 8, 4, 16), 1, "interleaved")


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("fn", [F.relu, F.elu])
def test_second_derivatives(fn):
    x = torch.randn(16, 8, 8, dtype=torch.float64, requires_grad=True)

    def second(function):
        (first,) = torch.autograd.grad((function(x) ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), x)[0]

    expected = second(lambda v: definition(fn, v, 1, "interleaved"))
    torch.testing.assert_close(second(lambda v: bipolar(fn, v)), expected)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("fn", [F.relu, F.elu])
def test_forward_derivatives(fn):
    x, tangent = torch.randn(16, 8, 8), torch.randn(16, 8, 8)
    results = []
    for function in (lambda v: bipolar(fn, v), lambda v: definition(fn, v, 1, "interleaved")):
        with torch.autograd.forward_ad.dual_level():
            y = function(torch.autograd.forward_ad.make_dual(x, tangent))
            results.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    assert torch.equal(*results)


# --- constants that are kept ------------------------------------------------------------------------------------------


def inference(x):
    with torch.inference_mode():
        return bipolar(F.elu, x), bipolar(F.relu, x)


def fake(x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake_x = mode.from_tensor(x)
        return bipolar(F.elu, fake_x), bipolar(F.relu, fake_x)


def meta(x):
    return bipolar(F.elu, x.to("meta")), bipolar(F.relu, x.to("meta"))


def transformed(x):
    return [torch.func.vmap(torch.func.grad(lambda v, f=f: bipolar(f, v, 0).sum()))(x) for f in (F.elu, F.relu)]


def compiled(x):
    torch.compiler.reset()
    return torch.compile(lambda v: bipolar(F.elu, v) + bipolar(F.relu, v), backend="aot_eager")(x)


@pytest.mark.parametrize(
    ("first", "then"),
    list(itertools.permutations([inference, fake, meta, transformed, compiled], 2)),
    ids=lambda each: each.__name__,
)
def test_what_is_kept_serves_everybody(first, then):
    """Constants that were made under one mode must not be found by another, nor by a plain training step."""
    kernels._kept.cache_clear()
    x = torch.randn(3, 5)
    first(x)
    then(x)
    for fn in (F.elu, F.relu):
        assert_exact(fn, x, torch.randn(3, 5), 1, "interleaved")
        first(x)


def test_other_dtypes_and_shapes_are_not_mixed_up():
    for dtype, shape in itertools.product([torch.float32, torch.float64], [(4, 6), (4, 6, 3), (6, 4), (4, 7)]):
        for dim, pattern in itertools.product([0, 1], PATTERNS):
            x = torch.randn(shape, dtype=dtype)
            assert_exact(F.relu, x, torch.randn(shape, dtype=dtype), dim, pattern)
