"""Tests of bipolar/statistics.py: every figure is held against float64 NumPy on tensors that own hooks recorded."""

from __future__ import annotations

import copy
import functools
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from bipolar.activations import BELU, BReLU
from bipolar.networks import Layer, layers_of
from bipolar.networks.cnn import CNN
from bipolar.networks.mlp import MLP
from bipolar.statistics import FIELDS, ActivationStatistics

CHUNKS = (5, 17, 2, 9)  # samples of the forward passes between two take()

NETWORKS = {
    "mlp": (functools.partial(MLP, (3, 4), 5, depth=3, width=6), (3, 4)),
    "cnn": (functools.partial(CNN, (2, 6, 5), 5, widths=(3, 4, 4)), (2, 6, 5)),
}
every_network = pytest.mark.parametrize("network", NETWORKS)
InplaceReLU = functools.partial(nn.ReLU, inplace=True)
every_activation = pytest.mark.parametrize(
    "activation",
    [nn.ReLU, pytest.param(InplaceReLU, id="InplaceReLU"), nn.ELU, BReLU, BELU],
)


class Sequences(nn.Module):
    """A network on [N, T, C]: the channels come last."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.activation, self.output = nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x):
        return self.output(self.activation(self.inner(x)).mean(1))

    def layers(self):
        return [Layer("inner", self.inner, self.activation), Layer("output", self.output, None)]


def make(network, activation=nn.ReLU, **options):
    torch.manual_seed(0)
    build, shape = NETWORKS[network]
    return build(activation=activation, **options), shape


def inputs(shape, size, seed=0):
    return torch.randn(size, *shape, generator=torch.Generator().manual_seed(seed))


def chunks_for(shape, sizes=CHUNKS):
    return [inputs(shape, size, seed) for seed, size in enumerate(sizes)]


def record(model):
    """A dict that fills with the [(before, after), ...] of each layer's activation, one pair for each forward pass."""
    tensors = defaultdict(list)
    for layer in layers_of(model)[:-1]:
        before = []
        layer.activation.register_forward_pre_hook(
            lambda _, args, before=before: before.append(args[0].detach().clone())
        )
        layer.activation.register_forward_hook(
            lambda *_, name=layer.name, before=before: tensors[name].append((before.pop(), _[2].detach().clone()))
        )
    return tensors


def expected_row(pairs, dim=1, gradient=None):
    """The fields of one layer, in float64; `gradient`: that of its weights."""
    pre, post = (torch.cat(tensors).double().movedim(dim, 0).flatten(1).numpy() for tensors in zip(*pairs, strict=True))
    row = {"zero_fraction": (post == 0).mean(), "max_abs": np.abs(post).max()}
    for prefix, x in (("", post), ("pre_", pre)):
        row[prefix + "mean"] = x.mean()
        row[prefix + "variance"] = x.var()
        row[prefix + "channel_mean_norm"] = np.sqrt(np.mean(x.mean(1) ** 2))
    row["gradient_norm"] = np.nan if gradient is None else np.linalg.norm(gradient.double().numpy())
    return [row[field] for field in FIELDS]


def expected(model, tensors, dim=1):
    return torch.tensor(
        [expected_row(tensors[layer.name], dim, layer.linear.weight.grad) for layer in layers_of(model)[:-1]]
    )


def measure(statistics, model, chunks):
    with torch.no_grad(), statistics.measuring():
        for chunk in chunks:
            model(chunk)
    return statistics.take()


def check(found, wanted, rtol=1e-5, atol=1e-6):
    assert found.dtype == torch.float32
    assert_close(found.double(), wanted, rtol=rtol, atol=atol, equal_nan=True)


def check_same(found, wanted):
    """Bit for bit; where there are no gradients their norm is NaN."""
    assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


# -- the figures -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0, 2**16], ids=["one by one", "together"])
def gathering(request, monkeypatch):
    """Which activations are small, and measured together."""
    monkeypatch.setattr("bipolar.statistics.SMALL", request.param)
    monkeypatch.setattr("bipolar.statistics.PART", 7)


every_hook = pytest.mark.parametrize("always_hooked", [True, False])


@pytest.mark.usefixtures("gathering")
@every_hook
@every_network
@every_activation
@pytest.mark.parametrize("sizes", [(8,), CHUNKS, (1, 1, 30)], ids=str)
def test_fields_are_those_of_numpy(network, activation, sizes, always_hooked):
    model, shape = make(network, activation)
    statistics = ActivationStatistics(model, inputs(shape, 2), always_hooked=always_hooked)
    tensors = record(model)
    found = measure(statistics, model, chunks_for(shape, sizes))
    assert statistics.names == [layer.name for layer in model.layers()[:-1]]
    check(found, expected(model, tensors))


@pytest.mark.usefixtures("gathering")
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_large_mean_and_small_variance(network):
    """Where E[x^2] - E[x]^2 in float32 is wrong by 1 % and more, the variances are right to 0.01 %."""
    model, shape = make(network, **({"kernel_size": 1} if network == "cnn" else {}))
    with torch.no_grad():
        for index, layer in enumerate(model.layers()[:-1]):
            weight = layer.linear.weight.flatten(1)
            if index > 0:
                weight -= weight.mean(1, keepdim=True)  # the constant part of the input cancels
            weight *= (1e-2 if index == 0 else 1) / weight.norm(dim=1, keepdim=True)
            layer.linear.bias.fill_(50)
    statistics = ActivationStatistics(model, inputs(shape, 2))
    tensors = record(model)
    found = measure(statistics, model, chunks_for(shape))
    wanted = expected(model, tensors)
    check(found, wanted, rtol=1e-4, atol=1e-9)
    for pairs, row in zip(tensors.values(), wanted, strict=True):
        assert row[FIELDS.index("mean")] == pytest.approx(50, abs=0.1)
        exact = row[FIELDS.index("variance")].item()
        assert 1e-3 < exact**0.5 < 3e-2
        x = torch.cat([after for _, after in pairs])
        naive = (x.square().mean() - x.mean().square()).item()
        assert abs(naive - exact) > 1e-2 * exact


def test_inplace_activation_is_measured_before_and_after():
    model, shape = make("mlp", InplaceReLU)
    statistics = ActivationStatistics(model, inputs(shape, 2))
    found = dict(zip(FIELDS, measure(statistics, model, chunks_for(shape))[0].tolist(), strict=True))
    assert found["zero_fraction"] > 0.1
    assert found["pre_variance"] > 1.5 * found["variance"]
    assert found["pre_mean"] < found["mean"]


@pytest.mark.usefixtures("gathering")
@every_hook
def test_layers_of_different_channel_counts_keep_their_order(always_hooked):
    model = CNN((2, 6, 6), 5, nn.ELU, widths=(4, 6, 4, 3, 6))
    statistics = ActivationStatistics(model, inputs((2, 6, 6), 2), always_hooked=always_hooked)
    tensors = record(model)
    found = measure(statistics, model, chunks_for((2, 6, 6)))
    assert statistics.names == ["conv1", "conv2", "conv3", "conv4", "conv5"]
    wanted = expected(model, tensors)
    assert len({round(value, 4) for value in wanted[:, 0].tolist()}) == 5  # rows that cannot be taken for another
    check(found, wanted)


@pytest.mark.parametrize("dim", [2, -1])
def test_channel_dimension(dim):
    model = Sequences()
    statistics = ActivationStatistics(model, torch.randn(2, 7, 3), dim=dim)
    tensors = record(model)
    found = measure(statistics, model, chunks_for((7, 3)))
    check(found, expected(model, tensors, dim=2))


@pytest.mark.usefixtures("gathering")
def test_channels_last():
    model, shape = make("cnn")
    model.to(memory_format=torch.channels_last)
    chunks = [chunk.to(memory_format=torch.channels_last) for chunk in chunks_for(shape)]
    statistics = ActivationStatistics(model, chunks[0])
    tensors = record(model)
    found = measure(statistics, model, chunks)
    assert tensors["conv2"][0][1].is_contiguous(memory_format=torch.channels_last)
    check(found, expected(model, tensors))


@every_network
def test_bfloat16_autocast(network):
    model, shape = make(network)
    statistics = ActivationStatistics(model, inputs(shape, 2))
    tensors = record(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = measure(statistics, model, chunks_for(shape))
    assert {after.dtype for pairs in tensors.values() for _, after in pairs} == {torch.bfloat16}
    check(found, expected(model, tensors))


@every_network
@every_activation
def test_gradient_norms_are_those_of_the_weights_when_it_is_taken(network, activation):
    """Of a whole step: gradients that are accumulated count as one."""
    model, shape = make(network, activation)
    statistics = ActivationStatistics(model, inputs(shape, 2))
    tensors = record(model)
    with statistics.measuring():
        for chunk in chunks_for(shape):
            F.cross_entropy(model(chunk), torch.arange(len(chunk)) % 5).backward()
    found = statistics.take()
    assert FIELDS[-1] == "gradient_norm"
    assert (found[:, -1] > 0).all()
    check(found, expected(model, tensors))
    model.zero_grad()
    assert measure(statistics, model, [inputs(shape, 3)])[:, -1].isnan().all()


@every_network
def test_a_layer_that_does_not_learn_hides_no_other_gradient(network):
    model, shape = make(network)
    layers = model.layers()
    layers[1].linear.weight.requires_grad_(False)
    statistics = ActivationStatistics(model, inputs(shape, 2))
    with statistics.measuring():
        model(inputs(shape, 8)).square().sum().backward()
    assert statistics.take()[:, -1].isnan().tolist() == [False, True, *[False] * (len(layers) - 3)]


def test_activations_that_are_not_finite_show():
    model, shape = make("mlp")
    statistics = ActivationStatistics(model, inputs(shape, 2))
    x = inputs(shape, 4)
    x[0, 0, 0] = torch.nan
    found = measure(statistics, model, [x])
    for field in ("mean", "variance", "channel_mean_norm", "max_abs", "pre_mean", "pre_variance"):
        assert found[0, FIELDS.index(field)].isnan(), field


# -- what is counted -------------------------------------------------------------------------------------------------


@every_network
def test_only_passes_inside_measuring_count(network):
    model, shape = make(network)
    statistics = ActivationStatistics(model, inputs(shape, 2))
    counted = chunks_for(shape)
    wanted = measure(statistics, model, counted)

    others = [inputs(shape, 6, seed=99) for _ in range(2)]
    with torch.no_grad():
        model(others[0])
        with statistics.measuring(on=False):
            model(others[0])
        with statistics.measuring():
            for chunk in counted:
                model(chunk)
        model(others[1])
    check_same(statistics.take(), wanted)


def test_measuring_ends_with_an_exception():
    model, shape = make("mlp")
    statistics = ActivationStatistics(model, inputs(shape, 2))
    with pytest.raises(RuntimeError, match="stop"), statistics.measuring():
        raise RuntimeError("stop")
    model(inputs(shape, 50, seed=9))
    chunk = inputs(shape, 3)
    found = measure(statistics, model, [chunk])
    check_same(found, measure(statistics, model, [chunk]))


@every_network
def test_take_starts_afresh(network):
    model, shape = make(network)
    statistics = ActivationStatistics(model, inputs(shape, 2))
    first, second = inputs(shape, 20, seed=1), inputs(shape, 7, seed=2)
    measure(statistics, model, [5 * first])  # a larger max_abs than all that follows
    found = measure(statistics, model, [second])
    fresh = ActivationStatistics(model, inputs(shape, 2))
    check_same(found, measure(fresh, model, [second]))


def test_a_taken_table_does_not_change_later():
    model, shape = make("mlp")
    statistics = ActivationStatistics(model, inputs(shape, 2))
    table = measure(statistics, model, [inputs(shape, 4)])
    before = table.clone()
    measure(statistics, model, [inputs(shape, 4, seed=1)])
    check_same(table, before)


class Skips(nn.Module):
    """In every second forward pass in which it trains, one of its activations is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.output = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.one, self.other = nn.ReLU(), nn.ReLU()
        self.passes = 0

    def forward(self, x):
        x = self.one(self.first(x))
        self.passes += self.training
        return self.output(x if self.passes % 2 else self.other(self.second(x)))

    def layers(self):
        return [Layer("first", self.first, self.one), Layer("second", self.second, self.other),
                Layer("output", self.output, None)]  # fmt: skip


@pytest.mark.usefixtures("gathering")
@every_hook
@pytest.mark.parametrize("sizes", [(8, 8), (8, 8, 8), (3, 5, 5, 7)], ids=str)
def test_layers_that_not_every_pass_goes_through(sizes, always_hooked):
    model = Skips()
    statistics = ActivationStatistics(model, inputs((4,), 2), always_hooked=always_hooked)
    tensors = record(model)
    found = measure(statistics, model, chunks_for((4,), sizes))
    assert len(tensors["second"]) < len(tensors["first"])
    check(found, expected(model, tensors))


@every_network
def test_many_snapshots_make_the_tables_that_each_makes(network):
    model, shape = make(network)
    statistics = ActivationStatistics(model, inputs(shape, 2), always_hooked=False)
    chunks = [[2 * inputs(shape, 4, seed)] for seed in range(3)]
    wanted = [measure(statistics, model, chunk) for chunk in chunks]
    snapshots = []
    for chunk in chunks:
        with torch.no_grad(), statistics.measuring():
            model(*chunk)
        with statistics.measuring(on=False):
            model(*chunk)
        snapshots.append(statistics.snapshot())
    check_same(statistics.tables(snapshots), torch.stack(wanted))


@every_network
def test_hooks_are_there_while_it_is_measured_only(network):
    model, shape = make(network)
    statistics = ActivationStatistics(model, inputs(shape, 2), always_hooked=False)

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    assert hooks() == 0
    with statistics.measuring():
        assert hooks() == 2 * len(statistics.names)
    with statistics.measuring(on=False):
        assert hooks() == 0


@every_network
def test_remove_takes_every_hook_off(network):
    model, shape = make(network)
    statistics = ActivationStatistics(model, inputs(shape, 2))

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    assert hooks() == 2 * len(statistics.names)
    statistics.remove()
    assert hooks() == 0


# -- the model is left alone -----------------------------------------------------------------------------------------


@every_network
@pytest.mark.parametrize("activation", [pytest.param(InplaceReLU, id="InplaceReLU"), BELU])
def test_outputs_gradients_and_state_are_unchanged(network, activation):
    plain, shape = make(network, activation, norm="batch", dropout=0.3)
    plain.features[0].eval() if network == "cnn" else plain.hidden[0].eval()  # a mode that must survive
    model = copy.deepcopy(plain)
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    statistics = ActivationStatistics(model, inputs(shape, 4))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)

    results = []
    for network_, context in ((plain, torch.enable_grad()), (model, statistics.measuring())):
        torch.manual_seed(1)
        x = inputs(shape, 8).requires_grad_()
        with context:
            output = network_(x)
        F.cross_entropy(output, torch.arange(8) % 5).backward()
        results.append([output, x.grad, *(p.grad for p in network_.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    state, wanted = model.state_dict(), plain.state_dict()
    assert list(state) == list(wanted)
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert statistics.take().isfinite().all()


# -- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "activation", "enabled_first"),
    [("mlp", nn.ReLU, True), ("mlp", BELU, False), ("cnn", BReLU, True), ("cnn", InplaceReLU, False)],
    ids=["mlp-ReLU", "mlp-BELU", "cnn-BReLU", "cnn-InplaceReLU"],
)
def test_compiled_equals_eager(network, activation, enabled_first):
    torch._dynamo.reset()
    model, shape = make(network, activation)
    statistics = ActivationStatistics(model, inputs(shape, 2))
    x, other = inputs(shape, 8), inputs(shape, 8, seed=1)
    wanted, wanted_sum = measure(statistics, model, [x]), measure(statistics, model, [x, other])

    model(x).square().sum().backward()
    norms = [layer.linear.weight.grad.norm() for layer in model.layers()[:-1]]
    with_gradients = torch.cat([wanted[:, :-1], torch.stack(norms)[:, None]], dim=1)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for on in (enabled_first, not enabled_first, enabled_first, not enabled_first):
        model.zero_grad()
        with statistics.measuring(on):
            loss = compiled(x).square().sum()
        loss.backward()
        if on:
            check(statistics.take(), with_gradients.double())
    model.zero_grad()
    compiled(other)
    with statistics.measuring():
        compiled(x)
        compiled(other)
    check(statistics.take(), wanted_sum.double())
