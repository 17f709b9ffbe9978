"""Tests of bipolar/initialization.py: gains against quadrature in plain Python, and what each initialization promises,
measured by hooks of our own on a forward pass of our own."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import erf
from torch import nn
from torch.testing import assert_close

from bipolar import BELU, BGELU, BSELU, BatchAxisReLU, Bipolar, BLeakyReLU, BReLU, BSiLU, build, sweep
from bipolar.activations import PATTERNS
from bipolar.errors import ConfigError
from bipolar.initialization import LSUV, LSUV_VARIANTS, Glorot, He, Identity, Orthogonal, _gains, fan_in, gain
from bipolar.networks import Layer
from bipolar.networks.cnn import CNN
from bipolar.networks.mlp import MLP
from bipolar.networks.resnet import ResNet

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "init"

# --- gain -------------------------------------------------------------------------------------------------------------

SCALE, ALPHA = 1.0507009873554805, 1.6732632423543772
# name: (torch's module, the same in plain Python, its bipolar version)
FORMULAS = {
    "relu": (nn.ReLU(), lambda z: max(z, 0.0), BReLU),
    "leaky_relu": (nn.LeakyReLU(0.2), lambda z: max(z, 0.2 * z), lambda d, p: BLeakyReLU(d, p, 0.2)),
    "elu": (nn.ELU(0.7), lambda z: z if z > 0 else 0.7 * math.expm1(z), lambda d, p: BELU(d, p, 0.7)),
    "selu": (nn.SELU(), lambda z: SCALE * (z if z > 0 else ALPHA * math.expm1(z)), BSELU),
    "gelu": (nn.GELU(), lambda z: 0.5 * z * (1 + erf(z / math.sqrt(2))), BGELU),
    "silu": (nn.SiLU(), lambda z: z / (1 + math.exp(-z)), BSiLU),
    "tanh": (nn.Tanh(), math.tanh, lambda d, p: Bipolar(torch.tanh, d, p)),
    "identity": (nn.Identity(), lambda z: z, lambda d, p: Bipolar(nn.Identity(), d, p)),
}
every_formula = pytest.mark.parametrize("name", FORMULAS)


def gain_by_quadrature(function):
    def integrand(z):
        return function(z) ** 2 * math.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)

    moment = sum(quad(integrand, *side, epsabs=1e-13, epsrel=1e-12)[0] for side in ((-20, 0), (0, 20)))
    return 1 / math.sqrt(moment)


@every_formula
def test_gain_is_that_of_adaptive_quadrature(name):
    module, function, _ = FORMULAS[name]
    assert gain(module) == pytest.approx(gain_by_quadrature(function), rel=1e-9)


@every_formula
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dim", [1, -1])
def test_gain_of_a_bipolar_activation_is_its_bases(name, pattern, dim):
    module, _, make_bipolar = FORMULAS[name]
    assert gain(make_bipolar(dim, pattern)) == pytest.approx(gain(module), rel=1e-12)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (None, 1.0),
        (nn.Identity(), 1.0),
        (nn.ReLU(), math.sqrt(2)),
        (torch.relu, math.sqrt(2)),
        (nn.ReLU(inplace=True), math.sqrt(2)),
        (BatchAxisReLU(), math.sqrt(2)),
        (nn.LeakyReLU(0.1), math.sqrt(2 / 1.01)),
        (nn.SELU(), 1.0),  # by design: 1 is the fixed point of the variance
        (lambda z: 3 * z, 1 / 3),
        (torch.sign, 1.0),
    ],
)
def test_known_gains(activation, expected):
    assert gain(activation) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("module", [nn.PReLU(init=0.1), Bipolar(nn.PReLU(init=0.1))], ids=["PReLU", "bipolar PReLU"])
def test_gain_of_an_activation_with_parameters(module):
    assert gain(module) == pytest.approx(math.sqrt(2 / 1.01), rel=1e-6)
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


def test_no_gain_suits_an_activation_that_is_zero():
    with pytest.raises(ConfigError, match=r"no initial variance suits .*: it is zero for normally distributed input"):
        gain(nn.Threshold(100, 0.0))


# --- networks ---------------------------------------------------------------------------------------------------------

ACTIVATIONS = {"relu": nn.ReLU, "elu": nn.ELU, "brelu": BReLU, "belu": BELU}
SHAPES = {"mlp": (20,), "cnn": (3, 8, 8)}
INITS = {
    "he": He,
    "glorot": Glorot,
    "orthogonal": Orthogonal,
    "lsuv textbook": LSUV,
    "lsuv authors": lambda **options: LSUV("authors", **options),
}
every_network = pytest.mark.parametrize("network", SHAPES)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
every_init = pytest.mark.parametrize("init", [pytest.param(make, id=name) for name, make in INITS.items()])
every_variant = pytest.mark.parametrize("variant", LSUV_VARIANTS)


def made(network, activation=nn.ReLU, **options):
    if network == "mlp":
        return MLP(SHAPES["mlp"], 5, activation, depth=4, width=24, **options).double()
    return CNN(SHAPES["cnn"], 5, activation, widths=(6, 6, 9), **options).double()


def batch(network, size=128):
    """Inputs whose variance is far from 1, so that the first layer too has to be scaled."""
    generator = torch.Generator().manual_seed(7)
    return 4 + 3 * torch.randn(size, *SHAPES[network], dtype=torch.float64, generator=generator)


def initialised(init, network="mlp", activation=nn.ReLU, seed=0, **options):
    model = made(network, activation, **options)
    torch.manual_seed(seed)
    return model, init(model, batch(network))


def weights(model):
    return {layer.name: layer.linear.weight.detach().clone() for layer in model.layers()}


def outputs(model, inputs, post_activation=False):
    """What each layer puts out in a forward pass in training mode without dropout: pre- or post-activations."""
    seen = {}
    hooks = []
    for layer in model.layers():
        module = layer.activation if post_activation and layer.activation is not None else layer.linear
        hooks.append(module.register_forward_hook(lambda _, __, output, name=layer.name: seen.update({name: output})))
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.eval()
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    return seen


def variances(model, inputs, post_activation=False):
    return {name: float(np.var(output.numpy())) for name, output in outputs(model, inputs, post_activation).items()}


# --- what all initializations do --------------------------------------------------------------------------------------


@every_init
@every_network
def test_biases_are_zero(init, network):
    model = made(network)
    init()(model, batch(network))
    assert all((layer.linear.bias == 0).all() for layer in model.layers())


@every_init
@every_network
def test_a_row_for_each_layer(init, network):
    model, report = initialised(init(), network)
    assert [row["layer"] for row in report] == [layer.name for layer in model.layers()]
    for row, weight in zip(report, weights(model).values(), strict=True):
        assert row["weight_mean"] == pytest.approx(float(weight.mean()), abs=1e-12)
        assert row["weight_std"] == pytest.approx(float(np.std(weight.numpy())))


@every_init
@every_network
def test_same_seed_same_weights(init, network):
    first, second, other = (weights(initialised(init(), network, seed=seed)[0]) for seed in (1, 1, 2))
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        assert not torch.equal(weight, other[name])


@pytest.mark.parametrize("make", [He, Glorot, Orthogonal])
@every_network
def test_weight_mean_shifts_every_weight(make, network):
    plain, shifted = (weights(initialised(make(weight_mean=mean), network)[0]) for mean in (0.0, 0.25))
    for name, weight in plain.items():
        assert_close(shifted[name], weight + 0.25)


@pytest.mark.parametrize("make", [He, Glorot, Orthogonal])
def test_initializations_that_look_at_no_data_need_none(make):
    (with_data, _), without_data = initialised(make()), made("mlp")
    torch.manual_seed(0)
    make()(without_data)
    for name, weight in weights(with_data).items():
        assert torch.equal(weight, weights(without_data)[name])


@pytest.mark.parametrize("init", [He(), Glorot(), Orthogonal(), LSUV()])
def test_norm_layers_and_the_need_of_gradients_are_left_alone(init):
    model = made("cnn", norm="batch")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.constant_(norm.weight, 2)
        nn.init.constant_(norm.bias, 3)
    init(model, batch("cnn"))
    assert all((norm.weight == 2).all() and (norm.bias == 3).all() for norm in norms)
    assert all(parameter.requires_grad and parameter.grad_fn is None for parameter in model.parameters())


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_config_builds_and_runs(name):
    init = build.initialization(sweep.compose([f"init={name}", "init.weight_mean=0.02"]))
    model, report = initialised(init, activation=BELU)
    assert [row["layer"] for row in report] == [layer.name for layer in model.layers()]
    assert init.weight_mean == 0.02


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init.weight_mean=high"], r"^init\.weight_mean='high' is not allowed; give a number "),
        (
            ["init=lsuv", "init.variant=author"],
            r"^init\.variant='author' .* textbook, authors \(did you mean 'authors'",
        ),
        (["init=lsuv", "init.tolerance=0"], r"^init\.tolerance=0 is not allowed; give a number in \(0, inf\)$"),
        (
            ["init=lsuv", "init.max_iterations=0"],
            r"^init\.max_iterations=0 is not allowed; give an integer of at least",
        ),
    ],
)
def test_wrong_options_are_named_as_on_the_command_line(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build.initialization(sweep.compose(overrides))


# --- He, Glorot, orthogonal -------------------------------------------------------------------------------------------


@every_activation
def test_he_keeps_the_variance_of_pre_activations_through_30_layers(activation):
    torch.manual_seed(0)
    model = MLP((1024,), 1024, ACTIVATIONS[activation], depth=30, width=1024)
    He()(model)
    # a factor of 2 over 30 layers is 1.2 % in the gain of each
    assert all(0.5 < variance < 2 for variance in variances(model, torch.randn(64, 1024)).values())


@every_network
@pytest.mark.parametrize(("activation", "factor"), [(nn.ReLU, math.sqrt(2)), (BReLU, math.sqrt(2)), (nn.Identity, 1)])
def test_he_weights_are_normal_with_the_gain_of_the_activation_in_front(network, activation, factor):
    torch.manual_seed(0)
    if network == "mlp":
        model = MLP((400,), 400, activation, depth=2, width=400)
    else:
        model = CNN((64, 4, 4), 400, activation, widths=(64, 64), kernel_size=5)
    He()(model)
    fan_ins = [400] * 3 if network == "mlp" else [64 * 25, 64 * 25, 64]
    assert [fan_in(layer.linear) for layer in model.layers()] == fan_ins
    for weight, n, expected in zip(weights(model).values(), fan_ins, [1, factor, factor], strict=True):
        standardised = weight.flatten() * math.sqrt(n) / expected
        assert float(standardised.std()) == pytest.approx(1, rel=0.02)
        assert float(standardised.pow(4).mean()) == pytest.approx(3, rel=0.05)
        assert float(standardised.mean()) == pytest.approx(0, abs=0.02)


class Opaque(nn.Module):
    """A user's own activation, whose repr does not show what it computes."""

    def __init__(self, module):
        super().__init__()
        self.forward = module.forward


@pytest.mark.parametrize("kinds", [(nn.ELU, nn.ReLU), (nn.ReLU, nn.Tanh)], ids=["elu-relu", "relu-tanh"])
@pytest.mark.parametrize(
    "wrap",
    [lambda module: module, Bipolar, lambda module: Bipolar(module.forward), Opaque],
    ids=["base", "bipolar", "bipolar function", "own"],
)
def test_each_layer_has_the_gain_of_its_own_activation(kinds, wrap):
    activations = iter([wrap(kind()) for kind in kinds])
    model = MLP((300,), 300, lambda: next(activations), depth=2, width=300)
    torch.manual_seed(0)
    He()(model)
    stds = [float(weight.std()) * math.sqrt(300) for weight in weights(model).values()]
    assert stds == pytest.approx([1, *(gain(kind()) for kind in kinds)], rel=0.02)


@pytest.mark.parametrize(("fan_in_", "fan_out"), [(300, 500), (500, 300), (400, 400)])
def test_glorot_weights_are_uniform_with_the_variance_of_the_paper(fan_in_, fan_out):
    torch.manual_seed(0)
    model = MLP((fan_in_,), 10, nn.ReLU, depth=1, width=fan_out)
    Glorot()(model)
    weight = weights(model)["layer1"]
    assert float(weight.var()) == pytest.approx(2 / (fan_in_ + fan_out), rel=0.02)
    assert float(weight.abs().max()) == pytest.approx(math.sqrt(6 / (fan_in_ + fan_out)), rel=1e-3)


def test_glorot_counts_the_kernel_of_a_convolution():
    torch.manual_seed(0)
    model = CNN((32, 4, 4), 10, nn.ReLU, widths=(64,), kernel_size=5)
    Glorot()(model)
    assert float(weights(model)["conv1"].var()) == pytest.approx(2 / (25 * (32 + 64)), rel=0.02)


def orthogonality(weight):
    """W W^T or W^T W, whichever is the smaller, over its mean diagonal, and that mean."""
    matrix = weight.flatten(1)
    product = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    scale = product.diagonal().mean()
    return product / scale, float(scale)


def assert_orthogonal(weight, scale=None):
    product, found = orthogonality(weight)
    assert_close(product, torch.eye(len(product), dtype=weight.dtype), rtol=0, atol=1e-9)
    if scale is not None:
        assert found == pytest.approx(scale)


@every_network
@every_activation
def test_orthogonal_weights_times_the_gain_of_the_activation_in_front(network, activation):
    model, _ = initialised(Orthogonal(), network, ACTIVATIONS[activation])
    layers = model.layers()
    gains = [1.0, *(gain(layer.activation) for layer in layers[:-1])]
    for layer, layer_gain in zip(layers, gains, strict=True):
        assert_orthogonal(layer.linear.weight.detach(), layer_gain**2)


# --- LSUV -------------------------------------------------------------------------------------------------------------


@every_network
@every_activation
@every_variant
@pytest.mark.parametrize("weight_mean", [0.0, 0.1])
def test_lsuv_reaches_variance_1_in_every_layer(network, activation, variant, weight_mean):
    init = LSUV(variant, weight_mean=weight_mean)
    model, report = initialised(init, network, ACTIVATIONS[activation])
    measured = variances(model, batch(network), post_activation=variant == "authors")
    tolerance = {"textbook": 0.1, "authors": 0.001}[variant]
    assert list(measured) == [layer.name for layer in model.layers()]
    for row in report:
        assert measured[row["layer"]] == pytest.approx(1, abs=tolerance)
        assert row["std_after"] ** 2 == pytest.approx(measured[row["layer"]], abs=1e-9)


@pytest.mark.parametrize("pool", ["max", "average", "stride"])
@every_variant
def test_lsuv_with_every_pooling(pool, variant):
    model, _ = initialised(LSUV(variant, tolerance=1e-3), "cnn", BELU, pool=pool)
    measured = variances(model, batch("cnn"), post_activation=variant == "authors")
    assert list(measured.values()) == pytest.approx([1] * 4, abs=1e-3)


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_textbook_lsuv_measures_before_the_norm(norm):
    model, _ = initialised(LSUV(tolerance=1e-6), "cnn", norm=norm)
    assert list(variances(model, batch("cnn")).values()) == pytest.approx([1] * 4, abs=1e-6)


@every_network
@every_activation
def test_weights_of_textbook_lsuv_are_orthogonal_up_to_a_scale(network, activation):
    model, _ = initialised(LSUV(), network, ACTIVATIONS[activation])
    for weight in weights(model).values():
        assert_orthogonal(weight)


def test_weights_of_the_authors_lsuv_are_normal():
    model = MLP((300,), 10, BELU, depth=3, width=300)
    torch.manual_seed(0)
    LSUV("authors")(model, torch.randn(64, 300))
    for weight in list(weights(model).values())[:-1]:
        standardised = weight.flatten() / weight.std()
        assert float(standardised.pow(4).mean()) == pytest.approx(3, rel=0.05)
        product, _ = orthogonality(weight)
        assert (product - torch.eye(300)).abs().max() > 0.1


@every_variant
def test_weight_mean_is_added_to_the_weights_as_drawn_before_they_are_scaled(variant):
    model, _ = initialised(LSUV(variant, weight_mean=0.5))
    torch.manual_seed(0)
    for layer, weight in zip(model.layers(), weights(model).values(), strict=True):
        drawn = torch.empty_like(weight)
        if variant == "textbook":
            nn.init.orthogonal_(drawn)
        else:
            nn.init.normal_(drawn, std=1 / math.sqrt(fan_in(layer.linear)))
        scale = weight / (drawn + 0.5)
        assert_close(scale, scale.mean().expand_as(scale))


def test_report_of_lsuv():
    model, report = initialised(LSUV("textbook", tolerance=1e-6), activation=nn.ReLU)
    assert report[0]["std_before"] > 2
    assert [row["rounds"] for row in report] == [1] * 5  # a linear map is right after one division
    for row, layer in zip(report, model.layers(), strict=True):
        weight = layer.linear.weight.detach()
        assert row["scale"] == pytest.approx(float(np.std(weight.numpy())) * math.sqrt(weight[0].numel()))


def test_std_before_is_that_of_the_weights_as_drawn():
    model, report = initialised(LSUV("textbook"))
    untouched, _ = initialised(LSUV("textbook", tolerance=1e9))
    before = variances(untouched, batch("mlp"))["layer1"]
    assert report[0]["std_before"] == pytest.approx(math.sqrt(before))
    assert not torch.equal(weights(model)["layer1"], weights(untouched)["layer1"])


@pytest.mark.parametrize("network", SHAPES)
def test_layers_of_the_authors_variant_start_from_the_scale_of_the_layer_before(network):
    _, report = initialised(LSUV("authors", tolerance=1e9), network)
    assert [row["rounds"] for row in report] == [0] * len(report)
    assert [row["scale"] for row in report] == pytest.approx([report[0]["scale"]] * len(report))


def test_layers_of_the_textbook_variant_start_from_their_own_scale():
    model, _ = initialised(LSUV("textbook", tolerance=1e9))
    for weight in weights(model).values():
        assert_orthogonal(weight, 1)


@every_network
@every_variant
def test_dropout_is_off_while_lsuv_runs(network, variant):
    with_dropout, _ = initialised(LSUV(variant), network, BELU, dropout=0.5)
    without, _ = initialised(LSUV(variant), network, BELU)
    for name, weight in weights(without).items():
        assert torch.equal(weights(with_dropout)[name], weight)


# --- LSUV leaves all else as it was found -----------------------------------------------------------------------------


def half_evaluated(model):
    """Some modules in training mode and some in evaluation mode."""
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 0
    return model


def hooks_of(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def state_around(model):
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": hooks_of(model),
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002 - the global generator is meant
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same_state(model, before):
    after = state_around(model)
    assert_close(after.pop("buffers"), before.pop("buffers"), rtol=0, atol=0)
    assert after == before


def used(network, **options):
    """A network that has been trained on a batch, partly in evaluation mode, and with a hook of its user."""
    model = made(network, **options)
    model(batch(network))
    model.layers()[0].linear.register_forward_hook(lambda *_: None)
    return half_evaluated(model)


@every_network
@pytest.mark.parametrize("options", [{}, {"norm": "batch", "dropout": 0.3}], ids=["plain", "batch norm and dropout"])
def test_modes_hooks_and_buffers_after_textbook_lsuv(network, options):
    model = used(network, **options)
    before = state_around(model)
    LSUV("textbook")(model, batch(network))
    assert_same_state(model, before)


@every_network
def test_modes_hooks_and_buffers_after_the_authors_lsuv(network):
    model = used(network, dropout=0.3)
    before = state_around(model)
    LSUV("authors")(model, batch(network))
    assert_same_state(model, before)


@every_network
@pytest.mark.parametrize(
    ("variant", "options", "scale"),
    [("textbook", {"norm": "batch", "dropout": 0.3}, 0), ("authors", {"norm": "batch"}, 1), ("authors", {}, 0)],
)
def test_modes_hooks_and_buffers_after_a_failure(network, variant, options, scale):
    model = used(network, **options)
    before = state_around(model)
    with pytest.raises(ConfigError):
        LSUV(variant)(model, scale * batch(network))
    assert_same_state(model, before)


def test_the_forward_pass_of_lsuv_takes_nothing_from_the_random_generator():
    """Weights are drawn from torch's generator, but what the network draws while LSUV looks at it is given back."""
    states = []
    for activation in (nn.ReLU, nn.RReLU):  # RReLU draws its slopes in training mode
        initialised(LSUV("textbook"), activation=activation)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_inputs_are_left_alone():
    inputs = batch("mlp")
    before = inputs.clone()
    LSUV()(made("mlp", lambda: nn.ReLU(inplace=True)), inputs)
    assert torch.equal(inputs, before)


@every_variant
def test_in_place_activations_give_the_same_weights(variant):
    plain, _ = initialised(LSUV(variant), activation=nn.ELU)
    in_place, _ = initialised(LSUV(variant), activation=lambda: nn.ELU(inplace=True))
    for name, weight in weights(plain).items():
        assert torch.equal(weights(in_place)[name], weight)


# --- when LSUV is impossible ------------------------------------------------------------------------------------------


def test_tanh_never_has_variance_1_behind_it():
    message = r"^LSUV cannot normalise layer1: the variance of its output is 0\.9\d* after 40 rounds \(wanted: 1 within"
    with pytest.raises(ConfigError, match=message):
        initialised(LSUV("authors"), activation=nn.Tanh)


@every_variant
@pytest.mark.parametrize(("network", "first"), [("mlp", "layer1"), ("cnn", "conv1")])
def test_inputs_that_are_zero(variant, network, first):
    message = rf"^LSUV cannot normalise {first}: the variance of its output is 0 after 0 rounds \(wanted: 1 within 0\."
    with pytest.raises(ConfigError, match=message):
        LSUV(variant)(made(network), torch.zeros(16, *SHAPES[network], dtype=torch.float64))


@every_variant
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_finite(variant, value):
    inputs = batch("mlp")
    inputs[0, 0] = value
    with pytest.raises(ConfigError, match="LSUV cannot normalise layer1"):
        LSUV(variant)(made("mlp"), inputs)


@every_variant
def test_a_layer_that_is_dead_further_on_is_named(variant):
    dead = iter([nn.ReLU(), nn.Threshold(1e6, 0.0), nn.ReLU(), nn.ReLU()])
    name = {"textbook": "layer3", "authors": "layer2"}[variant]
    with pytest.raises(ConfigError, match=f"LSUV cannot normalise {name}: the variance of its output is 0 after 0"):
        initialised(LSUV(variant), activation=lambda: next(dead))


def test_too_few_rounds():
    initialised(LSUV("authors", tolerance=1e-6, max_iterations=1), activation=nn.ReLU)  # homogeneous: one is enough
    with pytest.raises(ConfigError, match=r"cannot normalise layer1: .* after 1 rounds \(wanted: 1 within 1e-06\)"):
        initialised(LSUV("authors", tolerance=1e-6, max_iterations=1), activation=nn.ELU)


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
@pytest.mark.parametrize(("network", "first"), [("mlp", "layer1"), ("cnn", "conv1")])
def test_the_authors_variant_refuses_a_norm_in_between(network, first, norm):
    with pytest.raises(ConfigError, match=rf"in {first} another module lies between .*network\.norm=none"):
        initialised(LSUV("authors"), network, norm=norm)


class SkipsLayers(MLP):
    def forward(self, x):
        return self.output(self.hidden.layer4(self.hidden.layer1(x)))


def test_layers_that_the_forward_pass_does_not_use():
    model = SkipsLayers(SHAPES["mlp"], 5, nn.ReLU, depth=4, width=24).double()
    with pytest.raises(ConfigError, match=r"LSUV did not reach layer2, layer3: the forward pass does not use them"):
        LSUV()(model, batch("mlp"))
    assert not any(hooks_of(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "autors"}, r"variant='autors' .* textbook, authors \(did you mean 'authors'\?\)"),
        ({"tolerance": 0.0}, r"tolerance=0\.0 .* in \(0, inf\)"),
        ({"tolerance": "small"}, r"tolerance='small' .* in \(0, inf\)"),
        ({"max_iterations": 0}, r"max_iterations=0 .* integer of at least 1"),
        ({"weight_mean": math.nan}, r"weight_mean=nan is not allowed; give a number"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        LSUV(**options)


# --- identity, and layers without an activation -----------------------------------------------------------------------


def test_identity_of_an_mlp_passes_on_its_input():
    model, report = initialised(Identity(), activation=nn.Identity)
    x = batch("mlp")
    assert torch.equal(model(x), x[:, :5])
    assert [row["layer"] for row in report] == ["layer1", "layer2", "layer3", "layer4", "output"]
    assert [float(weight.sum()) for weight in weights(model).values()] == [20, 24, 24, 24, 5]


def test_identity_of_a_cnn_is_a_dirac_kernel():
    model, _ = initialised(Identity(), "cnn", nn.Identity)
    for name, weight in weights(model).items():
        if name == "output":
            assert torch.equal(weight, torch.eye(*weight.shape, dtype=weight.dtype))
        else:
            expected = torch.zeros_like(weight)
            for channel in range(min(weight.shape[:2])):
                expected[channel, channel, 1, 1] = 1
            assert torch.equal(weight, expected)
    assert all(not layer.linear.bias.any() for layer in model.layers())


def test_identity_draws_nothing_and_takes_a_weight_mean():
    state = torch.get_rng_state()
    model = made("mlp")
    torch.set_rng_state(state)
    Identity(weight_mean=0.25)(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights(model)["layer2"], torch.eye(24, dtype=torch.float64) + 0.25)
    cfg = sweep.compose(["init=identity"])
    assert isinstance(build.initialization(cfg), Identity)


def test_gains_pass_a_layer_without_an_activation():
    linear, relu = nn.Linear(2, 2), nn.ReLU()
    layers = [
        Layer("projection of the input", linear, None),
        Layer("a", linear, relu),
        Layer("shortcut", linear, None),
        Layer("b", linear, nn.Identity()),
        Layer("output", linear, None),
    ]
    root = math.sqrt(2)
    assert _gains(layers)[0] == pytest.approx([1, 1, root, root, 1])


def test_a_projection_on_a_shortcut_has_the_gain_of_the_stream_that_it_reads():
    model = ResNet((3, 8, 8), 5, nn.ReLU, depth=8, width=64, norm="none", shortcut="B").double()
    torch.manual_seed(0)
    He()(model)
    for name, weight in weights(model).items():
        moment = 1 if name == "conv1" else 2
        assert float(weight.square().mean()) * weight[0].numel() == pytest.approx(moment, rel=0.1), name
