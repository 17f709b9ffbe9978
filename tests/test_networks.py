"""Tests of bipolar/networks/, among them the sign-flip symmetry: bipolar(f)(x) = S f(S x), so that a bipolar network is
its base network with the weights S_l W_l S_{l-1} and the biases S_l b_l."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from bipolar import BELU, BLeakyReLU, BReLU, build, sweep
from bipolar.activations import PATTERNS, signs
from bipolar.errors import ConfigError
from bipolar.networks import Network, Recurrent, layers_of
from bipolar.networks.cnn import CNN, POOLS
from bipolar.networks.mlp import MLP
from bipolar.networks.normalization import NORMS, groups_for, make_norm

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
IMAGE = (3, 9, 7)

some_examples = settings(deadline=None, max_examples=60)


def mlp(activation=nn.ReLU, input_shape=(11,), classes=4, depth=3, width=7, **options):
    return MLP(input_shape, classes, activation, depth, width, **options)


def cnn(activation=nn.ReLU, input_shape=IMAGE, classes=4, widths=(5, 5, 8, 3), **options):
    return CNN(input_shape, classes, activation, widths, **options)


# name: (how the network is made, the shape of a sample, its layers, the width of each hidden layer)
NETWORKS = {
    "mlp": (mlp, (11,), ["layer1", "layer2", "layer3", "output"], [7, 7, 7]),
    "cnn": (cnn, IMAGE, ["conv1", "conv2", "conv3", "conv4", "output"], [5, 5, 8, 3]),
}
every_network = pytest.mark.parametrize("name", NETWORKS)
every_pool = pytest.mark.parametrize("pool", POOLS)
every_norm = pytest.mark.parametrize("norm", NORMS)


def made(name, activation=nn.ReLU, **options):
    """The network of that name in float64, and a batch for it."""
    make, shape, _, _ = NETWORKS[name]
    torch.manual_seed(0)
    return make(activation, **options).double(), torch.randn(6, *shape, dtype=torch.float64)


def calls(modules, model, x):
    """The key of each module in a dictionary that the forward pass calls, in order, and the shape of what it gets."""
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args, key=key: seen.append((key, tuple(args[0].shape))))
        for key, module in modules.items()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


# --- shapes and layers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("classes", [1, 10])
@pytest.mark.parametrize(
    ("make", "shape"),
    [(mlp, (11,)), (mlp, (3, 8, 8)), (mlp, (2, 5)), (cnn, (3, 8, 8)), (cnn, (1, 28, 28)), (cnn, (2, 1, 1))],
)
def test_logits(make, shape, classes, batch_size):
    model = make(input_shape=shape, classes=classes)
    assert model(torch.randn(batch_size, *shape)).shape == (batch_size, classes)


@every_network
def test_layer_names(name):
    model, _ = made(name)
    assert isinstance(model, Network)
    assert [layer.name for layer in layers_of(model)] == NETWORKS[name][2]


@every_network
@every_norm
def test_layers_are_the_modules_that_run_in_the_order_in_which_they_run(name, norm):
    model, x = made(name, norm=norm, dropout=0.1)
    modules, expected = {}, []
    for layer in model.layers():
        for role in ("linear", "activation"):
            if getattr(layer, role) is not None:
                modules[layer.name, role] = getattr(layer, role)
                expected.append((layer.name, role))
    assert [key for key, _ in calls(modules, model, x)] == expected
    assert expected[-1] == ("output", "linear")


@every_network
@every_norm
def test_layers_hold_every_linear_map_and_every_activation(name, norm):
    model, _ = made(name, BELU, norm=norm, dropout=0.1)
    linear = [layer.linear for layer in model.layers()]
    activations = [layer.activation for layer in model.layers()]
    assert linear == [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert activations == [*(module for module in model.modules() if isinstance(module, BELU)), None]


@every_network
def test_each_activation_sees_features_in_dimension_1(name):
    model, x = made(name, BReLU)
    widths = NETWORKS[name][3]
    seen = [shape for _, shape in calls({layer.name: layer.activation for layer in model.layers()[:-1]}, model, x)]
    assert [shape[:2] for shape in seen] == [(len(x), width) for width in widths]
    assert {len(shape) for shape in seen} == {x.ndim}


def test_a_model_without_layers_is_refused():
    with pytest.raises(TypeError, match=r"^Linear has no layers\(\) method"):
        layers_of(nn.Linear(2, 2))


@every_network
def test_bipolar_and_base_networks_have_the_same_state_dict(name):
    base, x = made(name)
    bipolar, _ = made(name, BReLU)
    state = base.state_dict()
    assert all(key.rsplit(".", 1)[1] in ("weight", "bias") for key in state)
    assert not any("activation" in key for key in state)
    bipolar.load_state_dict(state)
    assert not torch.equal(bipolar(x), base(x))


@every_network
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_meta_device(name, norm):
    make, shape, _, _ = NETWORKS[name]
    with torch.device("meta"):
        y = make(BELU, norm=norm)(torch.empty(2, *shape))
    assert y.is_meta
    assert y.shape == (2, 4)


# --- resolution -------------------------------------------------------------------------------------------------------

small_sizes = st.integers(1, 12)
width_lists = st.lists(st.integers(1, 3), min_size=1, max_size=6)


def resolutions(model, height, width):
    """The resolution of what each activation sees."""
    activations = {layer.name: layer.activation for layer in model.layers()[:-1]}
    x = torch.empty(1, 2, height, width, device="meta")
    return [shape[2:] for _, shape in calls(activations, model, x)]


@every_pool
@some_examples
@given(height=small_sizes, width=small_sizes, widths=width_lists, kernel_size=st.sampled_from([1, 3, 5]))
def test_resolution_is_halved_rounding_up_exactly_where_the_width_changes(pool, height, width, widths, kernel_size):
    with torch.device("meta"):
        model = CNN((2, height, width), 4, nn.ReLU, widths, kernel_size, pool)
    expected, size = [(height, width)], (height, width)
    for before, after in itertools.pairwise(widths):
        size = (math.ceil(size[0] / 2), math.ceil(size[1] / 2)) if before != after else size
        expected.append(size)
    assert resolutions(model, height, width) == expected


@pytest.mark.parametrize(("pool", "kind"), [("max", nn.MaxPool2d), ("average", nn.AvgPool2d), ("stride", None)])
def test_kinds_of_pooling(pool, kind):
    model = cnn(widths=(4, 4, 8, 8, 2), pool=pool)
    pools = [module for module in model.modules() if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d))]
    strides = [layer.linear.stride[0] for layer in model.layers()[:-1]]
    assert [type(module) for module in pools] == ([kind, kind] if kind else [])
    assert strides == ([1, 1, 2, 1, 2] if kind is None else [1] * 5)


@pytest.mark.parametrize(("pool", "reduce"), [("max", torch.amax), ("average", torch.mean)])
def test_pooling_reduces_windows_of_2_by_2(pool, reduce):
    model = cnn(widths=(4, 8), pool=pool)
    (module,) = (module for module in model.modules() if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)))
    x = torch.randn(3, 4, 5, 6)
    expected = torch.stack(
        [
            torch.stack([reduce(x[..., i : i + 2, j : j + 2], dim=(2, 3)) for j in range(0, 6, 2)], dim=-1)
            for i in range(0, 5, 2)
        ],
        dim=-2,
    )
    assert_close(module(x), expected)


# --- normalization and dropout ----------------------------------------------------------------------------------------

NORM_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, NORM_KINDS)]


@pytest.mark.parametrize(
    ("name", "norm", "kind"),
    [
        ("mlp", "batch", nn.BatchNorm1d),
        ("cnn", "batch", nn.BatchNorm2d),
        ("mlp", "group", nn.GroupNorm),
        ("cnn", "group", nn.GroupNorm),
        ("mlp", "layer", nn.GroupNorm),
        ("cnn", "layer", nn.GroupNorm),
    ],
)
def test_a_norm_for_each_hidden_layer(name, norm, kind):
    model, _ = made(name, norm=norm)
    widths = NETWORKS[name][3]
    assert [type(module) for module in norms_of(model)] == [kind] * len(widths)
    assert [module.weight.shape for module in norms_of(model)] == [(width,) for width in widths]


@every_network
def test_no_norm_by_default(name):
    model, _ = made(name)
    assert norms_of(model) == []
    assert make_norm("none", 8, spatial_dims=2) is None


@every_network
@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "none"])
def test_the_norm_lies_between_the_linear_map_and_the_activation(name, norm):
    model, x = made(name, norm=norm)
    modules, expected = {}, []
    for layer, module in zip(model.layers()[:-1], norms_of(model), strict=True):
        for role, member in (("linear", layer.linear), ("norm", module), ("activation", layer.activation)):
            modules[layer.name, role] = member
            expected.append((layer.name, role))
    assert [key for key, _ in calls(modules, model, x)] == expected


@pytest.mark.parametrize(
    ("features", "groups"), [(1, 1), (2, 2), (7, 7), (8, 8), (10, 5), (11, 1), (12, 6), (26, 2), (32, 8), (128, 8)]
)
def test_groups_of_group_norm(features, groups):
    assert groups_for(features) == groups
    assert make_norm("group", features, spatial_dims=2).num_groups == groups


@pytest.mark.parametrize("spatial_dims", [0, 2])
def test_layer_norm_normalises_each_sample_over_all_its_features(spatial_dims):
    x = 3 * torch.randn(4, 6, *[5] * spatial_dims) + 2
    expected = nn.functional.layer_norm(x, x.shape[1:])
    assert_close(make_norm("layer", 6, spatial_dims)(x), expected)


@every_norm
@pytest.mark.parametrize(
    ("make", "options"),
    [(mlp, {"width": 6}), (mlp, {"width": 7}), (mlp, {"width": 8}), (mlp, {"width": 24}), (cnn, {"widths": (7, 8)})],
)
def test_the_logits_depend_on_the_input_with_every_norm(make, options, norm):
    torch.manual_seed(0)
    model = make(norm=norm, **options)
    model(torch.randn(16, *NETWORKS[make.__name__][1])).var(0).sum().backward()
    assert all(layer.linear.weight.grad.abs().max() > 1e-4 for layer in model.layers())


@every_network
def test_no_dropout_by_default(name):
    model, _ = made(name)
    assert not any(isinstance(module, nn.modules.dropout._DropoutNd) for module in model.modules())


@every_network
def test_dropout_is_the_last_module_of_each_hidden_layer_and_off_in_evaluation(name):
    model, x = made(name, dropout=0.4)
    plain, _ = made(name)
    plain.load_state_dict(model.state_dict())
    dropouts = [module for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    assert [module.p for module in dropouts] == [0.4] * len(NETWORKS[name][3])
    modules = {layer.name: layer.activation for layer in model.layers()[:-1]}
    modules |= {f"{layer.name} dropout": module for layer, module in zip(model.layers()[:-1], dropouts, strict=True)}
    assert [key for key, _ in calls(modules, model, x)] == [
        key for layer in model.layers()[:-1] for key in (layer.name, f"{layer.name} dropout")
    ]
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), plain(x))


def test_dropout_of_a_cnn_drops_whole_feature_maps():
    model = cnn(dropout=0.5)
    dropout = next(module for module in model.modules() if isinstance(module, nn.Dropout2d))
    kept = dropout(torch.ones(20, 5, 4, 4)).flatten(2)
    assert torch.equal(kept.amin(2), kept.amax(2))
    assert set(kept.unique().tolist()) == {0.0, 2.0}


# --- the sign-flip symmetry -------------------------------------------------------------------------------------------

ACTIVATIONS = {"relu": (nn.ReLU, BReLU), "elu": (nn.ELU, BELU), "leaky_relu": (nn.LeakyReLU, BLeakyReLU)}
SYMMETRIC = [("mlp", {}), ("cnn", {"pool": "average"}), ("cnn", {"pool": "stride"})]
# (network, options, patterns): a group of features that all have one sign would not notice the flip
BROKEN = [
    ("cnn", {"pool": "max"}, PATTERNS),
    ("mlp", {"norm": "layer"}, PATTERNS),
    ("cnn", {"norm": "layer", "pool": "stride"}, PATTERNS),
    ("mlp", {"norm": "group", "width": 16}, ["interleaved"]),
    ("cnn", {"norm": "group", "pool": "stride", "widths": (16, 16, 12)}, ["interleaved"]),
]


def randomise(model):
    """Every parameter and every running statistic away from its default."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)


def flip_signs(model, pattern, of=lambda parameter: parameter):
    """Replace W_l by S_l W_l S_{l-1} and b_l by S_l b_l, in norms too; `of` chooses the parameter or its gradient."""
    with torch.no_grad():
        before, norms = None, iter(norms_of(model))
        for layer in model.layers():
            weight, bias = of(layer.linear.weight), of(layer.linear.bias)
            if before is not None:
                weight *= before.view(1, -1, *[1] * (weight.ndim - 2))
            if layer.activation is None:
                continue
            sign = signs(len(weight), pattern, dtype=weight.dtype)
            weight *= sign.view(-1, *[1] * (weight.ndim - 1))
            bias *= sign
            if (norm := next(norms, None)) is not None:
                of(norm.bias).mul_(sign)
                if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                    norm.running_mean *= sign
            before = sign


def pair(name, activation, pattern, **options):
    """A bipolar network, its base network with flipped signs, and a batch."""
    base, bipolar = ACTIVATIONS[activation]
    model, x = made(name, lambda: bipolar(pattern=pattern), **options)
    randomise(model)
    twin, _ = made(name, base, **options)
    twin.load_state_dict(model.state_dict())
    flip_signs(twin, pattern)
    return model, twin, x


every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


@every_activation
@every_pattern
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize(("name", "options"), SYMMETRIC)
def test_a_bipolar_network_is_its_base_network_with_flipped_signs(name, options, norm, pattern, activation):
    model, twin, x = pair(name, activation, pattern, norm=norm, **options)
    assert torch.equal(model.eval()(x), twin.eval()(x))
    assert torch.equal(model.train()(x), twin.train()(x))


@every_activation
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize(("name", "options"), SYMMETRIC)
def test_its_gradients_are_those_of_the_base_network_with_flipped_signs(name, options, norm, activation):
    model, twin, x = pair(name, activation, "interleaved", norm=norm, **options)
    for network in (model, twin):
        nn.functional.cross_entropy(network(x), torch.arange(len(x)) % 4).backward()
    flip_signs(twin, "interleaved", of=lambda parameter: parameter.grad)
    for (key, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), key
    assert all(layer.linear.weight.grad.abs().sum() > 0 for layer in model.layers())


@every_activation
@pytest.mark.parametrize(
    ("name", "options", "pattern"),
    [(name, options, pattern) for name, options, patterns in BROKEN for pattern in patterns],
)
def test_max_pooling_and_norms_across_features_break_the_symmetry(name, options, pattern, activation):
    model, twin, x = pair(name, activation, pattern, **options)
    with torch.no_grad():
        assert (model(x) - twin(x)).abs().max() > 0.01


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG = [
    (mlp, "norm", "bach", r"norm='bach' .* none, batch, group, layer \(did you mean 'batch'\?\)"),
    (cnn, "norm", "grupo", r"norm='grupo' .* none, batch, group, layer \(did you mean 'group'\?\)"),
    (cnn, "pool", "avarage", r"pool='avarage' .* max, average, stride, bipolar_max \(did you mean 'average'\?\)"),
    (cnn, "pool", "xyz", r"pool='xyz' is not allowed; choose from max, average, stride, bipolar_max$"),
    *[(mlp, "depth", wrong, r"depth=.* integer of at least 1") for wrong in (0, -1, 2.0, "3", None, True)],
    *[(mlp, "width", wrong, r"width=.* integer of at least 1") for wrong in (0, 2.5, "16")],
    *[(cnn, "widths", [8, wrong], r"widths=.* integer of at least 1") for wrong in (0, 2.5, "16", True)],
    *[(cnn, "widths", wrong, r"widths=.* is not allowed; give a list") for wrong in ([], 32, "32", None, 2.5)],
    *[(cnn, "kernel_size", wrong, r"kernel_size=.* give an odd integer") for wrong in (2, 4)],
    *[(cnn, "kernel_size", wrong, r"kernel_size=.* integer of at least 1") for wrong in (0, -3, 3.0)],
    *[(make, "dropout", wrong, r"dropout=.* in \[0, 1\)") for make in (mlp, cnn) for wrong in (1.0, -0.1, "half")],
    *[(cnn, "input_shape", wrong, r"needs images \[C, H, W\]; .* shape \(") for wrong in ((8,), (8, 8), (1, 2, 3, 4))],
]


@pytest.mark.parametrize(("make", "option", "value", "message"), WRONG)
def test_wrong_options(make, option, value, message):
    with pytest.raises(ConfigError, match=message):
        make(**{option: value})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["network=cnn", "network.pool=avg"], r"^network\.pool='avg' .* max, .*, bipolar_max \(did you mean 'average'"),
        (["network.norm=batchnorm"], r"^network\.norm='batchnorm' .*\(did you mean 'batch'\?\)$"),
        (["network.depth=0"], r"^network\.depth=0 is not allowed; give an integer of at least 1$"),
        (["network=cnn", "network.kernel_size=4"], r"^network\.kernel_size=4 .* odd integer$"),
        (
            ["activation.pattern=half"],
            r"^activation\.pattern='half' .* interleaved, halves \(did you mean 'halves'\?\)$",
        ),
    ],
)
def test_wrong_options_are_named_as_on_the_command_line(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build.network(sweep.compose(overrides), (3, 8, 8), 10)


# --- configuration ----------------------------------------------------------------------------------------------------


def choices(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize("network", choices("network"))
@pytest.mark.parametrize("activation", choices("activation"))
def test_every_config_builds(network, activation):
    cfg = sweep.compose([f"network={network}", f"activation={activation}"])
    with torch.device("meta"):
        model = build.network(cfg, (3, 32, 32), 10)
        if isinstance(model, Recurrent):
            y, state = model(torch.zeros(2, 7, dtype=torch.long))
            assert state.shape == (8, 2, 128)
            y = y[:, -1]
        else:
            y = model(torch.empty(2, 3, 32, 32))
    names = [layer.name for layer in layers_of(model)]
    assert y.shape == (2, 10)
    assert len(set(names)) == len(names)
    assert names[-1] == "output"


def test_options_of_the_configuration_reach_the_network():
    mlp_cfg = sweep.compose(["network.depth=5", "network.width=9", "activation=elu", "activation.alpha=0.5"])
    cnn_cfg = sweep.compose(["network=cnn", "network.widths=[4,6]", "network.kernel_size=5", "network.norm=batch"])
    deep, wide = (build.network(cfg, (1, 8, 8), 10) for cfg in (mlp_cfg, cnn_cfg))
    assert [layer.linear.out_features for layer in deep.layers()] == [9] * 5 + [10]
    assert {layer.activation.alpha for layer in deep.layers()[:-1]} == {0.5}
    assert [layer.linear.weight.shape for layer in wide.layers()[:-1]] == [(4, 1, 5, 5), (6, 4, 5, 5)]
    assert len(norms_of(wide)) == 2
