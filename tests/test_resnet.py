"""Tests of bipolar/networks/resnet.py and bipolar/networks/pooling.py."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from bipolar import BELU, BReLU, build, sweep
from bipolar.activations import PATTERNS, signs
from bipolar.errors import ConfigError
from bipolar.initialization import LSUV, He
from bipolar.networks import Network, layers_of
from bipolar.networks.cnn import CNN
from bipolar.networks.pooling import BipolarMaxPool2d
from bipolar.networks.resnet import PaddedShortcut, ResidualBlock, ResNet

IMAGE = (3, 9, 7)
NORMS = ("none", "batch")
SHORTCUTS = ("A", "B")
every_norm = pytest.mark.parametrize("norm", NORMS)
every_shortcut = pytest.mark.parametrize("shortcut", SHORTCUTS)


def resnet(activation=nn.ReLU, depth=8, width=4, shape=IMAGE, **options):
    return ResNet(shape, 4, activation, depth, width, **options)


def calls(modules, model, x):
    """The key of each module in a dictionary that the forward pass calls, in order, and the shape of its output."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda _, args, out, key=key: seen.append((key, tuple(out.shape))))
        for key, module in modules.items()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


# --- parameters and shapes --------------------------------------------------------------------------------------------


def parameters(depth, width=16, shortcut="A", norm="batch", channels=3, classes=10):
    """Counted by the formula: 3x3 convolutions, scale and shift of BatchNorm (or biases), the output layer."""
    per_map = 2 if norm == "batch" else 1
    blocks = (depth - 2) // 6
    total = 9 * channels * width + per_map * width
    before = width
    for maps in (width, 2 * width, 4 * width):
        total += 9 * before * maps + (2 * blocks - 1) * 9 * maps**2 + 2 * blocks * per_map * maps
        if shortcut == "B" and maps != before:
            total += before * maps + per_map * maps
        before = maps
    return total + before * classes + classes


def count(**options):
    with torch.device("meta"):
        model = ResNet((3, 32, 32), 10, nn.ReLU, **options)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("depth", "exact", "published"), [(20, 269_722, 0.27), (44, 658_586, 0.66), (110, 1_727_962, 1.73)]
)
def test_published_numbers_of_parameters(depth, exact, published):
    """He et al., arXiv:1512.03385, table 6."""
    assert count(depth=depth) == parameters(depth) == exact
    assert round(exact / 1e6, 2) == published


@every_norm
@every_shortcut
@pytest.mark.parametrize(("depth", "width"), [(8, 5), (14, 16), (20, 3)])
def test_numbers_of_parameters(depth, width, shortcut, norm):
    options = {"depth": depth, "width": width, "shortcut": shortcut, "norm": norm}
    assert count(**options) == parameters(**options)


@every_norm
@every_shortcut
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 9, 7), (2, 1, 1)])
def test_shapes_at_every_stage(shape, shortcut, norm):
    model = resnet(depth=14, width=6, shape=shape, norm=norm, shortcut=shortcut)
    x = torch.randn(2, *shape)
    shapes = [shape for _, shape in calls(dict(model.blocks.named_children()), model, x)]
    sizes = [shape[1:]]
    for _ in range(2):
        sizes.append(tuple(-(-size // 2) for size in sizes[-1]))
    expected = [(2, 6 * 2**stage, *size) for stage, size in enumerate(sizes) for _ in range(2)]
    assert shapes == expected
    assert model(x).shape == (2, 4)


@every_norm
@every_shortcut
def test_layers_are_in_the_order_of_running(norm, shortcut):
    model = resnet(depth=14, norm=norm, shortcut=shortcut)
    assert isinstance(model, Network)
    names = [layer.name for layer in model.layers()]
    linear = {layer.name: layer.linear for layer in model.layers()}
    assert [name for name, _ in calls(linear, model, torch.randn(2, *IMAGE))] == names
    assert len(set(names)) == len(names) == 1 + 12 + (2 if shortcut == "B" else 0) + 1
    assert (names[0], names[1:3], names[-1]) == ("conv1", ["block1.conv1", "block1.conv2"], "output")
    assert list(linear.values()) == [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    activations = {layer.name: layer.activation for layer in model.layers() if layer.activation}
    assert [name for name, _ in calls(activations, model, torch.randn(2, *IMAGE))] == list(activations)


@every_norm
@every_shortcut
def test_a_block_is_the_sum_of_its_formula(norm, shortcut):
    """f(a shortcut(x) + b conv2(f(conv1(x)))), b² = 1 / number of blocks without normalization."""
    torch.manual_seed(0)
    model = resnet(BELU, depth=14, norm=norm, shortcut=shortcut).double()
    block = model.blocks[2]
    assert isinstance(block, ResidualBlock)
    x = torch.randn(3, 4, 9, 7, dtype=torch.float64)
    f = BELU()

    def normalised(y):
        deviation = (y.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        return (y - y.mean((0, 2, 3), keepdim=True)) / deviation if norm == "batch" else y

    stream = normalised(block.shortcut(x)) if shortcut == "B" else block.shortcut(x)
    branch = normalised(block.conv2(f(normalised(block.conv1(x)))))
    b = 1.0 if norm == "batch" else 6**-0.5
    a = 1.0 if norm == "batch" else (5 / 6) ** 0.5
    assert_close(block(x), f(a * stream + b * branch))


def test_type_a_is_every_second_row_and_column_and_zeros():
    x = torch.randn(2, 3, 5, 4)
    naive = torch.zeros(2, 6, 3, 2)
    for n, c, i, j in itertools.product(range(2), range(3), range(3), range(2)):
        naive[n, c, i, j] = x[n, c, 2 * i, 2 * j]
    assert torch.equal(PaddedShortcut(3)(x), naive)
    assert not list(PaddedShortcut(3).parameters())


def test_shortcuts_stand_where_the_width_changes():
    for shortcut, kind in (("A", PaddedShortcut), ("B", nn.Conv2d)):
        model = resnet(depth=20, shortcut=shortcut)
        kinds = [type(block.shortcut) for block in model.blocks]
        none = type(None)
        assert kinds == [none, none, none, kind, none, none, kind, none, none]
    assert (model.blocks[3].shortcut.kernel_size, model.blocks[3].shortcut.stride) == ((1, 1), (2, 2))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 18}, r"^depth=18 is not allowed; give 6n \+ 2, such as 20 \(the nearest\), 20, 44 or 110"),
        ({"depth": 10}, r"such as 8 \(the nearest\)"),
        ({"depth": 2}, r"^depth=2 is not allowed; give an integer of at least 8"),
        ({"depth": 20.0}, r"^depth=20\.0 is not allowed; give an integer"),
        ({"width": 0}, r"^width=0 is not allowed"),
        ({"norm": "group"}, r"^norm='group' is not allowed; choose from none, batch"),
        ({"shortcut": "C"}, r"^shortcut='C' is not allowed; choose from A, B"),
        ({"shape": (8,)}, r"^a ResNet needs images \[C, H, W\]"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        resnet(**options)


@pytest.mark.parametrize("depth", range(8, 130))
def test_the_nearest_depth_is_named(depth):
    with torch.device("meta"):
        if depth % 6 == 2:
            resnet(depth=depth, width=1)
            return
        with pytest.raises(ConfigError) as error:
            resnet(depth=depth, width=1)
    named = int(str(error.value).split("such as ")[1].split()[0])
    assert named % 6 == 2
    assert abs(named - depth) == min(abs(each - depth) for each in range(8, 200, 6))


def test_the_command_line_names_the_option():
    with pytest.raises(ConfigError, match=r"^network\.depth=21 is not allowed; give 6n \+ 2, such as 20 "):
        build.check(sweep.compose(["network=resnet", "network.depth=21", "dataset=cifar10"]))


# --- variance of the stream -------------------------------------------------------------------------------------------

FACTOR = {He: 5.0, LSUV: 2.0}
"""The most by which the stream's second moment may change from the first block to the last, up or down: padding costs
some at the border of maps as small as these, which LSUV makes up for."""


@pytest.mark.parametrize("depth", [8, 20, 110])
@pytest.mark.parametrize("init", [He, LSUV])
@pytest.mark.parametrize("activation", [nn.ReLU, BReLU, nn.ELU, BELU])
def test_without_normalization_the_stream_keeps_its_size_at_any_depth(activation, init, depth):
    torch.manual_seed(0)
    model = resnet(activation, depth, width=8, shape=(3, 8, 8), norm="none", shortcut="B")
    x = torch.randn(32, 3, 8, 8)
    init()(model, x)
    moments = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: moments.append(float(out.square().mean())))
    with torch.no_grad():
        model(x)
    assert 1 / FACTOR[init] < moments[-1] / moments[0] < FACTOR[init]
    assert 0.05 < min(moments) < max(moments) < 2


# --- bipolar max pooling ----------------------------------------------------------------------------------------------


def naive_pool(x, size, stride, ceil_mode, pattern):
    n, channels, height, width = x.shape
    sign = signs(channels, pattern)

    def starts(length):
        last = length - 1 if ceil_mode else length - size
        found = [start for start in range(0, length, stride) if start <= last]
        # with ceil_mode a window that starts behind the input is left out, and so is one that is not needed
        return found if not ceil_mode else found[: -(-(length - size) // stride) + 1]

    rows, columns = starts(height), starts(width)
    y = x.new_empty(n, channels, len(rows), len(columns))
    for c in range(channels):
        for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
            window = x[:, c, row : row + size, column : column + size].flatten(1)
            y[:, c, i, j] = window.amax(1) if sign[c] > 0 else window.amin(1)
    return y


@settings(deadline=None, max_examples=60)
@given(
    channels=st.integers(1, 6),
    height=st.integers(3, 8),
    width=st.integers(3, 8),
    size=st.integers(1, 3),
    stride=st.integers(1, 3),
    ceil_mode=st.booleans(),
    pattern=st.sampled_from(PATTERNS),
    channels_last=st.booleans(),
)
def test_bipolar_max_pooling(channels, height, width, size, stride, ceil_mode, pattern, channels_last):
    x = torch.randn(2, channels, height, width)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    y = BipolarMaxPool2d(size, stride, ceil_mode, pattern)(x)
    assert y.shape == nn.functional.max_pool2d(x, size, stride, ceil_mode=ceil_mode).shape
    assert torch.equal(y, naive_pool(x, size, stride, ceil_mode, pattern)[..., : y.shape[2], : y.shape[3]])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_gradients_of_bipolar_max_pooling(pattern, ceil_mode):
    torch.manual_seed(0)
    pool = BipolarMaxPool2d(2, ceil_mode=ceil_mode, pattern=pattern)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pool, x)
    assert torch.autograd.gradgradcheck(pool, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_memory_format_and_dtype_are_kept(dtype):
    x = torch.randn(2, 5, 6, 4, dtype=dtype).to(memory_format=torch.channels_last)
    y = BipolarMaxPool2d(2)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == dtype
    assert BipolarMaxPool2d(2)(x.to("meta")).shape == y.shape


def test_it_has_no_state_and_says_what_it_is():
    pool = BipolarMaxPool2d(2, pattern="halves")
    assert not pool.state_dict()
    assert repr(pool) == "BipolarMaxPool2d(kernel_size=2, stride=2, pattern='halves')"
    with pytest.raises(ConfigError, match=r"^pattern='half' is not allowed; .* 'halves'"):
        BipolarMaxPool2d(2, pattern="half")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_of_a_cnn_it_takes_the_pattern_of_the_activation(pattern):
    model = CNN(IMAGE, 4, lambda: BELU(pattern=pattern), (4, 4, 6, 3), pool="bipolar_max")
    pools = [module for module in model.modules() if isinstance(module, BipolarMaxPool2d)]
    assert [(pool.pattern, pool.kernel_size, pool.ceil_mode) for pool in pools] == [(pattern, 2, True)] * 2


def test_behind_a_base_activation_it_is_max_pooling():
    torch.manual_seed(0)
    model = CNN(IMAGE, 4, nn.ELU, (4, 4, 6), pool="bipolar_max")
    other = CNN(IMAGE, 4, nn.ELU, (4, 4, 6), pool="max")
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    x = torch.randn(2, *IMAGE)
    assert torch.equal(model(x), other(x))
    assert not any(isinstance(module, BipolarMaxPool2d) for module in model.modules())


# --- configuration ----------------------------------------------------------------------------------------------------


def test_options_of_the_configuration_reach_the_network():
    options = ["network.depth=14", "network.width=6", "network.shortcut=B"]
    cfg = sweep.compose(["network=resnet", "activation=belu", *options])
    model = build.network(cfg, (3, 32, 32), 10)
    layers = layers_of(model)
    assert len(model.blocks) == 6
    assert [layer.linear.weight.shape[0] for layer in layers[:-1]] == [6] * 5 + [12] * 5 + [24] * 5
    assert {type(layer.activation) for layer in layers} == {BELU, type(None)}
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == len(layers) - 1
