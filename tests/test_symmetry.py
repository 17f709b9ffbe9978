"""Tests of bipolar/symmetry.py: fold and unfold are exact, and what breaks the symmetry is named and does differ."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import compose
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bipolar import (
    BELU,
    BGELU,
    BatchAxisReLU,
    Bipolar,
    BReLU,
    batch_axis_relu,
    bipolar,
    build,
    sweep,
)
from bipolar.activations import PATTERNS
from bipolar.errors import ConfigError
from bipolar.initialization import LSUV
from bipolar.networks.cnn import CNN
from bipolar.networks.mlp import MLP
from bipolar.networks.pooling import BipolarMaxPool2d
from bipolar.networks.resnet import ResNet
from bipolar.run import run
from bipolar.runs import read_run, run_folder
from bipolar.symmetry import SymmetryError, explain, fold, unfold

IMAGE = (3, 6, 6)
BIPOLAR = (Bipolar, BipolarMaxPool2d, BatchAxisReLU)


class Net(nn.Module):
    """A user's own network: `forward(self, x)` and the modules it uses."""

    def __init__(self, forward, **modules):
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self._forward(self, x)


def randomise(model, seed=0):
    """Every parameter and every running statistic away from its default."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


def inputs(shape, size=6):
    return torch.randn(size, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def output(model, x, dtype=torch.float64, training=False):
    torch.manual_seed(2)  # of dropout
    with torch.no_grad():
        return copy.deepcopy(model).to(dtype).train(training)(x.to(dtype))


def assert_same_function(model, twin, shape):
    for dtype in (torch.float64, torch.float32):
        for training in (False, True):
            result = output(model, inputs(shape), dtype, training)
            assert torch.equal(result, output(twin, inputs(shape), dtype, training))
            assert result.std() > 0  # it does say something


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) for key in a)


# --- networks that keep the symmetry ----------------------------------------------------------------------------------


def mlp(act, **options):
    return MLP((11,), 4, act, depth=3, width=7, **options)


def cnn(act, **options):
    return CNN(IMAGE, 4, act, widths=(5, 5, 8, 3), **options)


def resnet(act, **options):
    return ResNet(IMAGE, 4, act, depth=8, width=4, **options)


OWN = {
    "mlp": (mlp, (11,)),
    "mlp batch": (lambda act: mlp(act, norm="batch"), (11,)),
    "mlp dropout": (lambda act: mlp(act, dropout=0.3), (11,)),
    **{
        f"cnn {pool} {norm}": (lambda act, pool=pool, norm=norm: cnn(act, pool=pool, norm=norm), IMAGE)
        for pool in ("stride", "average", "bipolar_max")
        for norm in ("none", "batch")
    },
    "cnn dropout": (lambda act: cnn(act, pool="stride", dropout=0.3), IMAGE),
    **{
        f"resnet B {norm}": (lambda act, norm=norm: resnet(act, shortcut="B", norm=norm), IMAGE)
        for norm in ("none", "batch")
    },
}
INTERLEAVED_ONLY = {
    f"resnet A {norm}": (lambda act, norm=norm: resnet(act, shortcut="A", norm=norm), IMAGE)
    for norm in ("none", "batch")
}


def _functional_flatten(self, x):
    x = self.act1(self.conv1(x))
    x = self.act2(self.conv2(x))
    return self.output(torch.flatten(F.avg_pool2d(x, 2), 1))


def _view(self, x):
    x = self.act1(self.conv1(x))
    return self.output(self.act2(self.hidden(x.view(x.size(0), -1))))


def _reshape(self, x):
    x = self.act1(self.conv1(x))
    return self.output(self.act2(self.hidden(x.reshape(x.shape[0], -1))))


def _mean(self, x):
    return self.output(self.act2(self.conv2(self.act1(self.conv1(x)))).mean(dim=(2, 3)))


def _mean_keepdim(self, x):
    x = self.act1(self.conv1(x)).mean((-2, -1), keepdim=True)
    return self.output(torch.tanh(self.act2(self.conv2(x))).flatten(1))


def _dense(self, x):
    x = self.conv1(x)
    x = torch.cat([x, self.conv2(self.act1(x))], 1)
    return self.output(self.act2(x).mean((2, 3)))


def _twice(self, x):
    x = self.act1(self.conv1(x))
    return self.output(self.pool(torch.cat([x, -x, x], dim=1)).flatten(1))


def _residual(self, x):
    x = self.first(x)
    x = x + 0.5 * self.linear(self.act1(x))
    x = torch.add(x, self.linear(self.act2(x)) / 2)
    x += x
    return self.output(self.act3(x))


def _tied(self, x):
    return self.output(self.act3(self.b(self.act2(self.a(self.act1(self.first(x)))))))


def _with_tied(name):
    def make(act):
        model = Net(
            _tied,
            first=nn.Linear(5, 7),
            a=nn.Linear(7, 7),
            b=nn.Linear(7, 7),
            output=nn.Linear(7, 3),
            **{f"act{i}": act() for i in (1, 2, 3)},
        )
        setattr(model.b, name, getattr(model.a, name))
        return model

    return make


def _shared_activation(act):
    shared = act()
    return nn.Sequential(nn.Linear(5, 7), shared, nn.Linear(7, 6), shared, nn.Linear(6, 3))


def _two_convs(forward, features=4, last=None, **modules):
    def make(act):
        return Net(
            forward,
            conv1=nn.Conv2d(3, 5, 3, padding=1),
            act1=act(),
            conv2=nn.Conv2d(5, features, 3, padding=1),
            act2=act(),
            output=nn.Linear(last or features, 3),
            **modules,
        )

    return make


TRACED = {
    "flatten function": (_two_convs(_functional_flatten, last=4 * 9), IMAGE),
    "view": (_two_convs(_view, hidden=nn.Linear(5 * 36, 4)), IMAGE),
    "reshape": (_two_convs(_reshape, hidden=nn.Linear(5 * 36, 4)), IMAGE),
    "mean": (_two_convs(_mean), IMAGE),
    "mean keepdim": (_two_convs(_mean_keepdim), IMAGE),
    "the same and its negative concatenated": (_two_convs(_twice, last=15, pool=nn.AvgPool2d(6)), IMAGE),
    "residual sums with shared weights": (
        lambda act: Net(
            _residual,
            first=nn.Linear(5, 7),
            linear=nn.Linear(7, 7),
            output=nn.Linear(7, 3),
            **{f"act{i}": act() for i in (1, 2, 3)},
        ),
        (5,),
    ),
    "tied weights": (_with_tied("weight"), (5,)),
    "tied biases": (_with_tied("bias"), (5,)),
    "shared activation": (_shared_activation, (5,)),
    "sequential": (
        lambda act: nn.Sequential(nn.Conv2d(3, 5, 3), act(), nn.Flatten(), nn.Linear(80, 7), act(), nn.Linear(7, 2)),
        IMAGE,
    ),
    "grouped convolutions": (
        lambda act: nn.Sequential(
            nn.Conv2d(3, 6, 1),
            act(),
            nn.Conv2d(6, 9, 3, groups=3),
            act(),
            nn.Conv2d(9, 9, 1, groups=9),
            act(),
            nn.Flatten(),
            nn.Linear(9 * 16, 2),
        ),
        IMAGE,
    ),
    "channel shuffle": (
        lambda act: nn.Sequential(
            nn.Conv2d(3, 6, 1), act(), nn.ChannelShuffle(3), nn.Conv2d(6, 4, 1), act(), nn.Flatten(), nn.Linear(144, 2)
        ),
        IMAGE,
    ),
    "conv1d": (
        lambda act: nn.Sequential(
            nn.Conv1d(2, 5, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm1d(5),
            act(),
            nn.AvgPool1d(2),
            nn.Conv1d(5, 5, 1, bias=False),
            act(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(5, 2),
        ),
        (2, 8),
    ),
    "conv3d": (
        lambda act: nn.Sequential(nn.Conv3d(2, 5, 2), act(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(5, 2)),
        (2, 3, 3, 3),
    ),
    "group norm, a group a feature": (
        lambda act: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(4, 4), act(), nn.Flatten(), nn.Linear(144, 2)),
        IMAGE,
    ),
    "rms norm": (
        lambda act: nn.Sequential(nn.Linear(5, 7), nn.RMSNorm(7), act(), nn.Linear(7, 6), act(), nn.Linear(6, 2)),
        (5,),
    ),
    "instance norm": (
        lambda act: nn.Sequential(
            nn.Conv2d(3, 5, 1),
            nn.InstanceNorm2d(5, affine=True, track_running_stats=True),
            act(),
            nn.Conv2d(5, 4, 3),
            nn.InstanceNorm2d(4),
            act(),
            nn.Flatten(),
            nn.Linear(64, 2),
        ),
        IMAGE,
    ),
    "batch norm behind flatten": (
        lambda act: nn.Sequential(
            nn.Conv2d(3, 5, 3), act(), nn.Flatten(), nn.BatchNorm1d(80), nn.Linear(80, 7), act(), nn.Linear(7, 2)
        ),
        IMAGE,
    ),
    "odd functions and dropout": (
        lambda act: nn.Sequential(
            nn.Linear(5, 7), act(), nn.Tanh(), nn.Dropout(0.3), nn.Hardtanh(-2, 2), nn.Softshrink(0.1), nn.Linear(7, 2)
        ),
        (5,),
    ),
    "upright part": (
        lambda act: nn.Sequential(nn.Linear(5, 7), act(), nn.Linear(7, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2)),
        (5,),
    ),
}
INTERLEAVED_ONLY |= {"dense": (_two_convs(_dense, features=4, last=9), IMAGE)}
SYMMETRIC = OWN | TRACED
ACTIVATIONS = {
    "brelu": BReLU,
    "belu": BELU,
    "prelu": lambda pattern: Bipolar(nn.PReLU(), pattern=pattern),
    "in place": lambda pattern: Bipolar(nn.ELU(inplace=True), pattern=pattern),
}
CASES = [(name, pattern) for name in SYMMETRIC for pattern in PATTERNS]
CASES += [(name, "interleaved") for name in INTERLEAVED_ONLY]
every_case = pytest.mark.parametrize(("name", "pattern"), CASES)


def pairwise(*values):
    """Every second combination, if the last has two values: any two values of different lists still meet."""
    numbered = itertools.product(*map(enumerate, values))
    chosen = (row for row in numbered if sum(number for number, _ in row) % 2 == 0)
    return [tuple(value for _, value in row) for row in chosen]


def made(name, pattern="interleaved", activation="brelu"):
    make, shape = (SYMMETRIC | INTERLEAVED_ONLY)[name]
    torch.manual_seed(0)
    return randomise(make(lambda: ACTIVATIONS[activation](pattern=pattern))), shape


@pytest.mark.parametrize(
    ("name", "activation", "pattern"),
    [*pairwise(SYMMETRIC, ACTIVATIONS, PATTERNS), *itertools.product(INTERLEAVED_ONLY, ACTIVATIONS, ["interleaved"])],
)
def test_fold_computes_the_same_function_bit_for_bit(name, activation, pattern):
    model, shape = made(name, pattern, activation)
    twin = fold(model)
    assert_same_function(model, twin, shape)
    assert not any(isinstance(module, BIPOLAR) for module in twin.modules())
    assert all(row.keeps for row in explain(model))
    flipped = [not torch.equal(*pair) for pair in zip(model.parameters(), twin.parameters(), strict=True)]
    assert any(flipped)
    assert all(torch.equal(a.abs(), b.abs()) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@every_case
def test_unfold_is_the_inverse_of_fold(name, pattern):
    model, shape = made(name, pattern, "belu")
    twin = fold(model)
    again = unfold(twin, pattern, activations=(nn.ELU,))
    assert_same_state(again, model)
    assert_same_function(again, model, shape)
    assert_same_state(fold(again), twin)


@every_case
def test_unfold_computes_the_same_function_bit_for_bit(name, pattern):
    base = fold(made(name, pattern)[0])
    randomise(base, seed=5)
    if name == "upright part":  # it is not known that its ReLU shall stay
        with pytest.raises(SymmetryError, match=r"^4 \(layer normalization\) takes one mean over"):
            unfold(base, pattern)
        return
    twin = unfold(base, pattern)
    assert_same_function(base, twin, SYMMETRIC.get(name, INTERLEAVED_ONLY.get(name))[1])
    assert any(isinstance(module, Bipolar) for module in twin.modules())
    assert not any(isinstance(module, nn.MaxPool2d) for module in twin.modules())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_group_norm_with_groups_of_one_sign_keeps_the_symmetry(pattern):
    """In the pattern halves the two groups are the flipped and the upright half."""
    model = randomise(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), BELU(pattern=pattern), nn.Flatten(), nn.Linear(8 * 36, 2))
    )
    if pattern == "halves":
        assert_same_function(model, fold(model), IMAGE)
    else:
        with pytest.raises(SymmetryError, match=r"^1 \(group normalization\) takes one mean over features"):
            fold(model)


# --- random networks --------------------------------------------------------------------------------------------------


@st.composite
def random_networks(draw):
    """A Sequential of convolutions, activations, norms and pools in any order, then of linear layers."""

    def of(*choices):
        return draw(st.sampled_from(choices))

    def activation():
        return of(BReLU, BELU, BGELU)(pattern=of(*PATTERNS))

    def divisor(count):
        return of(*[size for size in range(1, count + 1) if count % size == 0])

    layers, channels, size = [], 2, 6
    for _ in range(draw(st.integers(1, 6))):
        kind = of("conv", "conv", "act", "act", "norm", "pool", "max", "other") if layers else "conv"
        if kind == "conv":
            width = draw(st.integers(1, 6))
            groups = divisor(channels)
            width *= groups
            layers.append(nn.Conv2d(channels, width, of(1, 3), padding=1, groups=groups, bias=of(True, False)))
            size += 2 if layers[-1].kernel_size == (1, 1) else 0
            channels = width
        elif kind == "act":
            layers.append(activation())
        elif kind == "norm":
            layers.append(
                of(
                    nn.BatchNorm2d(channels),
                    nn.GroupNorm(divisor(channels), channels),
                    nn.InstanceNorm2d(channels, affine=True),
                )
            )
        elif kind == "pool":
            layers.append(nn.AvgPool2d(3, 1, 1))
        elif kind == "max":
            layers.append(of(nn.MaxPool2d(3, 1, 1), BipolarMaxPool2d(2, 1, pattern=of(*PATTERNS))))
            size -= 1 if isinstance(layers[-1], BipolarMaxPool2d) else 0
        else:
            layers.append(
                of(
                    nn.Tanh(), nn.Dropout2d(0.2), nn.Identity(), nn.LeakyReLU(), nn.ChannelShuffle(divisor(channels))
                )
            )  # fmt: skip
    layers.append(nn.Flatten())
    features = channels * size**2
    for _ in range(draw(st.integers(0, 3))):
        width = draw(st.integers(1, 7))
        norms = [[], [nn.RMSNorm(width)], [nn.LayerNorm(width)]] if width > 2 else [[]]  # of one feature: ±1 or 0
        layers += [nn.Linear(features, width), *draw(st.sampled_from(norms))]
        layers += [activation()] if of(True, True, False) else []
        features = width
    return nn.Sequential(*layers, nn.Linear(features, 3))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(model=random_networks(), seed=st.integers(0, 1000))
def test_random_networks_are_folded_exactly_or_not_at_all(model, seed):
    model = randomise(model, seed).double().eval()
    x = inputs((2, 6, 6))
    rows = explain(model)
    try:
        twin = fold(model)
    except SymmetryError:
        assert not all(row.keeps for row in rows)
        # with one draw of the weights all that is different may end in a dead unit
        draws = [randomise(copy.deepcopy(model), each) for each in range(seed, seed + 4)]
        pairs = [(output(each, x), output(fold(each, strict=False), x)) for each in draws]
        alive = any(float(result.std(0).max()) > 1e-6 for result, _ in pairs)
        assert not alive or not all(torch.equal(*pair) for pair in pairs)
    else:
        assert all(row.keeps for row in rows)
        assert torch.equal(output(model, x), output(twin, x))
        assert torch.equal(output(model, x, training=True), output(twin, x, training=True))


# --- training ---------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "clipping": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5),
}


def losses(model, shape, optimizer="sgd", dtype=torch.float64, steps=100):
    """The losses of training steps; what is drawn in them (dropout) is drawn alike each time."""
    model = copy.deepcopy(model).to(dtype).train()
    optimizer_ = OPTIMIZERS[optimizer](model.parameters())
    data = torch.Generator().manual_seed(3)
    torch.manual_seed(4)
    result = []
    for _ in range(steps):
        x = torch.randn(8, *shape, generator=data, dtype=torch.float64).to(dtype)
        y = (x.flatten(1).sum(1) > 0).long()
        loss = F.cross_entropy(model(x), y)
        optimizer_.zero_grad()
        loss.backward()
        if optimizer == "clipping":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer_.step()
        result.append(loss.item())
    return result


TRAINED = ["mlp", "cnn stride none", "cnn average none", "cnn bipolar_max none", "cnn stride batch", "resnet B none",
           "resnet A batch", "mlp dropout", "cnn dropout"]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "optimizer", "dtype"), pairwise(TRAINED, OPTIMIZERS, [torch.float64, torch.float32]), ids=str
)
def test_100_steps_of_training_have_the_same_losses_bit_for_bit(name, optimizer, dtype):
    make, shape = (SYMMETRIC | INTERLEAVED_ONLY)[name]
    torch.manual_seed(0)
    model = make(BELU)
    mine = losses(model, shape, optimizer, dtype)
    assert mine == losses(fold(model), shape, optimizer, dtype)
    assert all(loss == loss and loss < 100 for loss in mine)
    assert sum(mine[-10:]) < sum(mine[:10])


# --- what breaks it ---------------------------------------------------------------------------------------------------


def _streams(self, x):
    x = self.linear1(x)
    return self.output(self.one(x) + self.other(x))


def _dense_forward(self, x):
    x = self.conv1(x)
    x = torch.cat([x, self.conv2(self.act1(x))], 1)
    return self.output(self.act2(x).mean((2, 3)))


def _pool_function(self, x):
    return self.output(F.max_pool2d(self.act1(self.conv1(x)), 2).flatten(1))


def _batch_axis(self, x):
    return self.output(batch_axis_relu(self.linear(x)))


NOT_ODD = "is not odd: of a flipped map it keeps the value nearest zero"
GROUP = "takes one mean over features that are flipped and features that are not"
BREAKING = {
    "max pooling": (lambda: cnn(BReLU, pool="max"), IMAGE, "features.conv3.pool (max pooling)", NOT_ODD),
    "max pooling function": (
        lambda: Net(_pool_function, conv1=nn.Conv2d(3, 4, 3), act1=BReLU(), output=nn.Linear(16, 2)),
        IMAGE,
        "(the network itself) (max pooling)",
        NOT_ODD,
    ),
    "group norm": (
        lambda: CNN(IMAGE, 4, BReLU, (16, 16), norm="group"),
        IMAGE,
        "features.conv1.norm (group normalization)",
        GROUP,
    ),
    "group norm as layer norm": (
        lambda: mlp(BELU, norm="layer"),
        (11,),
        "hidden.layer1.norm (group normalization)",
        GROUP,
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), BReLU(), nn.Linear(8, 2)),
        (5,),
        "1 (layer normalization)",
        GROUP,
    ),
    "layer norm of maps": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm([4, 6, 6]), BReLU(), nn.Flatten(), nn.Linear(144, 2)),
        IMAGE,
        "1 (layer normalization)",
        "normalises over more, or less, than the features",
    ),
    "shortcut A with halves": (
        lambda: resnet(lambda: BReLU(pattern="halves"), shortcut="A"),
        IMAGE,
        "blocks.1 (sum)",
        "adds streams whose features are flipped in different patterns",
    ),
    "one stream, two patterns": (
        lambda: Net(
            _streams, linear1=nn.Linear(5, 8), one=BReLU(), other=BReLU(pattern="halves"), output=nn.Linear(8, 2)
        ),
        (5,),
        "other (BReLU)",
        "its pattern (halves) is not that of the features it gets",
    ),
    "concatenation": (
        lambda: Net(
            _dense_forward,
            conv1=nn.Conv2d(3, 4, 1),
            conv2=nn.Conv2d(4, 4, 1),
            act1=BReLU(pattern="halves"),
            act2=BReLU(pattern="halves"),
            output=nn.Linear(8, 2),
        ),
        IMAGE,
        "act2 (BReLU)",
        "its pattern (halves) is not that of the features it gets",
    ),
    "channel shuffle between two activations": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 1), BELU(), nn.ChannelShuffle(2), BELU(), nn.Flatten(), nn.Linear(216, 2)
        ),
        IMAGE,
        "3 (BELU)",
        "its pattern (interleaved) is not that of the features it gets",
    ),
    "batch axis": (
        lambda: mlp(BatchAxisReLU),
        (11,),
        "hidden.layer1.activation (BatchAxisReLU)",
        "flips rows of the batch: it is not a function of one sample",
    ),
    "base activation behind a bipolar one": (
        lambda: nn.Sequential(nn.Linear(5, 8), BELU(), nn.GELU(), nn.Linear(8, 2)),
        (5,),
        "2 (GELU)",
        "is not an odd function, and its input has flipped features",
    ),
    "bipolar output": (
        lambda: nn.Sequential(nn.Linear(5, 8), BELU()),
        (5,),
        "(the network itself) (output)",
        "the output has flipped features",
    ),
    "bipolar input": (
        lambda: nn.Sequential(BELU(), nn.Linear(5, 2)),
        (5,),
        "0 (BELU)",
        "acts on something whose signs no linear map in front can take in, such as the network's input",
    ),
    "bipolar max pooling of the input": (
        lambda: nn.Sequential(BipolarMaxPool2d(2), nn.Conv2d(3, 4, 1), BReLU(), nn.Flatten(), nn.Linear(36, 2)),
        IMAGE,
        "0 (bipolar max pooling)",
        "does not act on feature maps that a convolution made",
    ),
    "average over features": (
        lambda: nn.Sequential(nn.Linear(5, 8), BReLU(), nn.AvgPool1d(3, 1, 1), nn.Linear(8, 2)),
        (5,),
        "2 (AvgPool1d)",
        "averages over features, of which some are flipped",
    ),
    "instance norm over features": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.InstanceNorm1d(8), BReLU(), nn.Linear(8, 2)),
        (5,),
        "1 (instance normalization)",
        "does not normalise each feature that it gets for itself",
    ),
}
every_break = pytest.mark.parametrize("name", BREAKING)


@every_break
@pytest.mark.filterwarnings("ignore:input's size at dim=0 does not match num_features")
def test_what_breaks_the_symmetry_makes_a_difference_within_a_few_steps(name):
    make, shape, _, _ = BREAKING[name]
    torch.manual_seed(0)
    model = make()
    mine, twins = (losses(each, shape, steps=5) for each in (model, fold(model, strict=False)))
    if name == "batch axis":  # the twin has no Bipolar to replace: it is the network itself
        twins = losses(fold(mlp(BReLU)), shape, steps=5)
    assert max(abs(a - b) for a, b in zip(mine, twins, strict=True)) > 1e-4


@every_break
def test_what_breaks_the_symmetry_is_named_and_refused(name):
    make, _, layer, reason = BREAKING[name]
    with pytest.raises(SymmetryError, match="^" + re.escape(f"{layer} {reason}")):
        fold(make())
    broken = [row for row in explain(make()) if not row.keeps]
    assert (f"{broken[0].layer} ({broken[0].operation})", broken[0].reason) == (layer, reason)


def test_more_than_one_break_is_counted():
    with pytest.raises(SymmetryError, match=r"nearest zero \(and 1 more: see explain\)$"):
        fold(cnn(BReLU, pool="max"))


def test_a_group_norm_as_wide_as_it_must_be_differs_from_the_first_step_on():
    model = randomise(CNN(IMAGE, 4, BReLU, (16, 16), norm="group"))
    twin = fold(model, strict=False)
    assert losses(model, IMAGE, steps=1) != losses(twin, IMAGE, steps=1)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else -self.linear(x)


@pytest.mark.parametrize("function", [fold, explain, unfold])
def test_a_network_that_cannot_be_traced(function):
    with pytest.raises(SymmetryError, match=r"^Branches cannot be traced by torch\.fx: [^\n]*$"):
        function(Branches())


@pytest.mark.parametrize("base", [torch.relu, F.relu, torch.tanh, nn.ReLU()])
def test_bipolar_as_a_function_is_refused_with_advice(base):
    model = Net(lambda self, x: self.b(bipolar(base, self.a(x))), a=nn.Linear(5, 4), b=nn.Linear(4, 2))
    advice = r"^\(the network itself\) \(bipolar\) is called as a function; write it as a module, as in Bipolar\(nn"
    with pytest.raises(SymmetryError, match=advice):
        fold(model)


def test_batch_axis_relu_as_a_function_is_refused():
    own = Net(_batch_axis, linear=nn.Linear(5, 4), output=nn.Linear(4, 2))
    with pytest.raises(SymmetryError, match=r"\(batch_axis_relu\) flips rows of the batch"):
        fold(own)


@pytest.mark.parametrize(("dim", "right"), [(1, True), (-3, True), (0, False), (2, False), (-1, False)])
def test_the_dim_of_an_activation_of_maps(dim, right):
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 1), BReLU(dim), nn.Flatten(), nn.Linear(216, 2)))
    if right:
        assert_same_function(model, fold(model), IMAGE)
    else:
        with pytest.raises(SymmetryError, match=rf"^1 \(BReLU\) its dim={dim} is not the feature dimension"):
            fold(model)


@pytest.mark.parametrize(("dim", "right"), [(1, True), (-1, True), (0, False), (-2, False)])
def test_the_dim_of_an_activation_of_matrices(dim, right):
    model = randomise(nn.Sequential(nn.Linear(5, 6), BReLU(dim), nn.Linear(6, 2)))
    if right:
        assert_same_function(model, fold(model), (5,))
    else:
        with pytest.raises(SymmetryError, match=rf"^1 \(BReLU\) its dim={dim} is not the feature dimension"):
            fold(model)


def test_an_example_catches_a_wrong_assumption():
    """What a linear map puts out is taken to be a matrix, not [N, T, C]."""
    model = randomise(nn.Sequential(nn.Linear(5, 6), BReLU(dim=1), nn.Linear(6, 2)))
    fold(model, example=torch.randn(4, 5))
    with pytest.raises(SymmetryError, match=r"^the twin's output differs from the network's by up to .* on the ex"):
        fold(model, example=torch.randn(4, 3, 5))
    right = randomise(nn.Sequential(nn.Linear(5, 6), BReLU(dim=-1), nn.Linear(6, 2)))
    fold(right, example=torch.randn(4, 3, 5))
    unfold(fold(right), example=torch.randn(4, 3, 5))


def test_weights_shared_with_what_is_not_flipped():
    model = Net(
        lambda self, x: self.output(self.act(self.linear(x))) + F.linear(x, self.linear.weight),
        linear=nn.Linear(5, 4),
        act=BReLU(),
        output=nn.Linear(4, 4),
    )
    with pytest.raises(SymmetryError, match="its weights are shared with another place, which has other signs"):
        fold(model)
    tied = nn.Sequential(nn.EmbeddingBag(5, 4), nn.Linear(4, 4), BReLU(-1), nn.Linear(4, 5))
    tied[3].weight = tied[0].weight
    with pytest.raises(SymmetryError, match=r"^3 \(linear map\) its weights are shared"):
        fold(tied)
    other = nn.Sequential(nn.Linear(4, 4), BReLU(), nn.Linear(4, 4), BReLU(), nn.Linear(4, 2))
    other[2].weight = other[0].weight  # its input is upright in the one place and flipped in the other
    with pytest.raises(SymmetryError, match="its weights are shared"):
        fold(other)


def test_an_embedding_shares_its_weights_with_an_output_of_its_signs():
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), BReLU(-1), nn.Linear(4, 5)).double()
    tied[3].weight = tied[0].weight
    twin, tokens = fold(tied), torch.arange(20).view(4, 5) % 5
    assert twin[3].weight is twin[0].weight
    assert torch.equal(tied(tokens), twin(tokens))

    def two_outputs(self, x):
        x = self.hidden(self.embedding(x))
        return self.first(self.interleaved(x)) + self.second(self.halves(self.other(x)))

    modules = {name: nn.Linear(4, 4) for name in ("hidden", "other")} | {
        name: nn.Linear(4, 5) for name in ("first", "second")
    }
    model = Net(two_outputs, embedding=nn.Embedding(5, 4), interleaved=BReLU(-1), halves=BReLU(-1, "halves"), **modules)
    model.first.weight = model.second.weight = model.embedding.weight
    with pytest.raises(SymmetryError, match=r"^(first|second) \(linear map\) its weights are shared"):
        fold(model)


def test_a_weight_that_is_computed_is_not_flipped():
    linear = torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))
    with pytest.raises(SymmetryError, match=r"^1 \(BReLU\) acts on something whose signs no linear map"):
        fold(nn.Sequential(linear, BReLU(), nn.Linear(4, 2)))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.output(self.act(self.linear(x)) + 1),
        lambda self, x: self.output(self.act(self.linear(x)) + x),
        lambda self, x: self.output(self.act(self.linear(x)) * torch.sigmoid(self.act(self.linear(x)))),
        lambda self, x: self.output(torch.relu(self.act(self.linear(x)))),
        lambda self, x: self.output(self.act(self.linear(x)).softmax(1)),
        lambda self, x: self.output(self.act(self.linear(x)).view(x.shape[0] // 2, -1).view(-1, 6)),
        lambda self, x: self.output(F.avg_pool1d(self.act(self.linear(x)), 3, 1, 1)),
        lambda self, x: self.output(self.act(self.linear(x)).flip(1)),
    ],
)
def test_operations_that_do_not_commute_are_refused(forward):
    model = randomise(Net(forward, linear=nn.Linear(6, 6), act=BELU(), output=nn.Linear(6, 2)))
    with pytest.raises(SymmetryError, match=r"^\(the network itself\)"):
        fold(model)
    assert not torch.equal(output(model, inputs((6,))), output(fold(model, strict=False), inputs((6,))))


def test_even_functions_are_refused_for_want_of_a_proof():
    """The network does equal its twin: the analysis knows odd functions only, and errs on the safe side."""
    model = Net(lambda self, x: self.b(self.act(self.a(x)).abs()), a=nn.Linear(5, 6), act=BELU(), b=nn.Linear(6, 2))
    with pytest.raises(SymmetryError, match=r"\(abs\) abs is not known to commute with flips of sign"):
        fold(model)
    assert torch.equal(output(model, inputs((5,))), output(fold(model, strict=False), inputs((5,))))


def test_maps_and_matrices_are_not_added_feature_by_feature():
    """[N, C, H, W] + [N, C] brings feature i of the second to column i of the first."""

    def forward(self, x):
        return self.output((self.act1(self.conv(x)) + self.act2(self.linear(x[:, :, 0, 0]))).flatten(1))

    modules = {"conv": nn.Conv2d(3, 6, 1), "linear": nn.Linear(3, 6), "act1": BReLU(), "act2": BReLU()}
    model = randomise(Net(forward, **modules, output=nn.Linear(216, 2)))
    with pytest.raises(SymmetryError, match=r"\(sum\) adds something that is not flipped"):
        fold(model)


def test_a_convolution_over_what_a_linear_map_put_out():
    model = nn.Sequential(nn.Linear(4, 4), BReLU(dim=-1), nn.Conv1d(4, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(SymmetryError, match=r"^2 \(Conv1d\) its inputs are not the features in front of it"):
        fold(model)


# --- in-place activations ---------------------------------------------------------------------------------------------


def _reads_again(self, x):
    x = self.linear(x)
    return self.output(x + self.act(x))


def test_an_in_place_base_activation_does_not_overwrite_what_the_twin_reads_again():
    act = Bipolar(nn.ELU(inplace=True))
    model = randomise(Net(_reads_again, linear=nn.Linear(5, 6), act=act, output=nn.Linear(6, 2)))
    assert_same_function(model, fold(model), (5,))
    assert act.fn.inplace


def test_unfold_refuses_an_in_place_activation_whose_input_is_read_again():
    model = Net(_reads_again, linear=nn.Linear(5, 6), act=nn.ELU(inplace=True), output=nn.Linear(6, 2))
    with pytest.raises(SymmetryError, match=r"^act changes its input in place, which is read elsewhere too"):
        unfold(model)


# --- explain ----------------------------------------------------------------------------------------------------------


def test_rows_are_the_layers_in_the_order_in_which_they_run():
    rows = explain(CNN(IMAGE, 4, BReLU, (4, 6), pool="max", norm="batch", dropout=0.1))
    assert [(row.layer, row.operation, row.keeps) for row in rows] == [
        ("features.conv1.conv", "convolution", True),
        ("features.conv1.norm", "batch normalization", True),
        ("features.conv1.activation", "BReLU", True),
        ("features.conv1.dropout", "Dropout2d", True),
        ("features.conv2.pool", "max pooling", False),
        ("features.conv2.conv", "convolution", True),
        ("features.conv2.norm", "batch normalization", True),
        ("features.conv2.activation", "BReLU", True),
        ("features.conv2.dropout", "Dropout2d", True),
        ("pool", "AdaptiveAvgPool2d", True),
        ("flatten", "flatten", True),
        ("output", "linear map", True),
        ("(the network itself)", "output", True),
    ]
    assert all(row.reason for row in rows)


@pytest.mark.parametrize("make", [make for make, _ in SYMMETRIC.values()], ids=SYMMETRIC)
def test_every_layer_of_a_base_network_keeps_the_symmetry(make):
    model = make(nn.ReLU)
    assert all(row.keeps for row in explain(model))
    assert_same_state(fold(model), model)


@pytest.mark.parametrize("make", [lambda: cnn(nn.ReLU, pool="max", norm="layer"), lambda: mlp(nn.ELU, norm="group")])
def test_a_base_network_keeps_it_with_any_part(make):
    assert all(row.keeps for row in explain(make()))


# --- what fold leaves as it was ---------------------------------------------------------------------------------------


def test_fold_and_unfold_do_not_change_their_argument():
    model, _ = made("cnn bipolar_max batch")
    before, modules = copy.deepcopy(model.state_dict()), repr(model)
    twin = fold(model)
    assert repr(model) == modules
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    before, modules = copy.deepcopy(twin.state_dict()), repr(twin)
    unfold(twin)
    assert repr(twin) == modules
    assert all(torch.equal(twin.state_dict()[key], value) for key, value in before.items())
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in twin.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_class_layers_memory_format_dtype_and_mode_are_kept(dtype, training):
    model, _ = made("cnn stride batch")
    model = model.to(dtype=dtype, memory_format=torch.channels_last).train(training)
    model.features.conv2.eval()
    twin = fold(model)
    assert type(twin) is CNN
    assert [layer.name for layer in twin.layers()] == [layer.name for layer in model.layers()]
    assert {type(layer.activation) for layer in twin.layers()} == {nn.ReLU, type(None)}
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert (mine.dtype, mine.stride(), mine.requires_grad) == (theirs.dtype, theirs.stride(), theirs.requires_grad)
    keys = dict(twin.named_modules())
    assert all(keys[name].training == module.training for name, module in model.named_modules() if name in keys)


@pytest.mark.parametrize("name", OWN)
def test_networks_on_the_meta_device_can_be_folded(name):
    make, _ = OWN[name]
    with torch.device("meta"):
        twin = fold(make(BReLU))
    assert all(parameter.is_meta for parameter in twin.parameters())


def test_a_bipolar_of_a_plain_function_becomes_a_module():
    model = randomise(nn.Sequential(nn.Linear(5, 6), Bipolar(torch.relu), nn.Linear(6, 2)))
    assert_same_function(model, fold(model), (5,))


def test_unfold_makes_every_place_of_a_shared_activation_bipolar():
    shared = nn.ELU()
    twin = unfold(nn.Sequential(nn.Linear(5, 6), shared, nn.Linear(6, 7), shared, nn.Linear(7, 2)))
    assert isinstance(twin[1], Bipolar)
    assert twin[1] is twin[3]


def test_unfold_of_max_pooling_with_padding_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(36, 2))
    with pytest.raises(SymmetryError, match=r"^2 is max pooling with padding, dilation or indices"):
        unfold(model)


# --- the option twin --------------------------------------------------------------------------------------------------

IMAGES = [
    "network=cnn",
    "network.widths=[4,6]",
    "activation=belu",
    "dataset=gaussian",
    "dataset.shape=[2,6,6]",
    "dataset.train_size=96",
    "dataset.test_samples=32",
    "trainer.batch_size=16",
    "trainer.epochs=2",
    "trainer.precision=float32",
    "trainer.device=cpu",
    "trainer.log_every=1",
]


def curves(tmp_path, *overrides):
    """What is computed in a run and its twin: rows of metrics.jsonl but for the speed."""
    result = []
    for twin in ("false", "true"):
        cfg = compose(*IMAGES, f"output_root={tmp_path}", f"twin={twin}", *overrides)
        assert run(cfg)["status"] == "finished"
        rows = read_run(run_folder(cfg)).metrics
        result.append([(row["split"], row["step"], row["loss"], row.get("error")) for row in rows])
    assert len(result[0]) > 10
    return result


@pytest.mark.parametrize(
    "options",
    [
        ["network.pool=stride"],
        ["network.pool=bipolar_max", "optimizer=adamw", "network.dropout=0.2"],
        ["network.pool=average", "network.norm=batch", "activation=brelu", "activation.pattern=halves"],
        ["network.pool=stride", "init=lsuv", "init.variant=textbook"],
        ["network.pool=stride", "init=lsuv", "init.variant=authors"],
    ],
    ids=" ".join,
)
def test_a_run_of_the_twin_has_exactly_the_same_loss_curve(options, tmp_path):
    mine, twins = curves(tmp_path, *options)
    assert mine == twins


def test_a_run_of_the_twin_differs_with_max_pooling(tmp_path):
    mine, twins = curves(tmp_path, "network.pool=max")
    assert [row[:2] for row in mine] == [row[:2] for row in twins]
    assert all(a[2] != b[2] for a, b in zip(mine, twins, strict=True))


def test_a_twin_has_a_run_folder_of_its_own():
    cfg, twin = (sweep.compose([*IMAGES, f"twin={value}"]) for value in ("false", "true"))
    assert run_folder(cfg) != run_folder(twin)
    assert run_folder(cfg).name.startswith("belu-cnn-")
    assert run_folder(twin).name.startswith("belu-twin-cnn-")


@pytest.mark.parametrize("activation", ["relu", "identity", "batch_axis_relu"])
def test_a_twin_of_a_base_activation_is_refused(activation, train, tmp_path):
    ended = train("twin=true", f"activation={activation}", f"output_root={tmp_path}")
    message = f"error: twin=true needs a bipolar activation, such as brelu; {activation} is not one\n"
    assert (ended.status, ended.err) == (2, message)
    assert not list(tmp_path.iterdir())


def test_twin_is_a_truth_value():
    with pytest.raises(ConfigError, match=r"^twin='maybe' is not allowed"):
        build.check(sweep.compose(["twin=maybe"]))


# --- what docs/symmetry.md says of LSUV -------------------------------------------------------------------------------


def first_scales(variant, activation, networks=12):
    scales = []
    for seed in range(networks):
        torch.manual_seed(seed)
        x = torch.randn(1024, 20, dtype=torch.float64)
        model = MLP((20,), 4, activation, depth=2, width=128).double()
        scales.append([row["scale"] for row in LSUV(variant, 1e-6, 60)(model, x)[:2]])
    return torch.tensor(scales)


@pytest.mark.parametrize(("base", "version"), [(nn.ReLU, BReLU), (nn.ELU, BELU)])
def test_textbook_lsuv_scales_base_and_bipolar_networks_alike(base, version):
    mine, theirs = first_scales("textbook", base), first_scales("textbook", version)
    error = ((mine.var(0) + theirs.var(0)) / len(mine)).sqrt()
    assert ((mine.mean(0) - theirs.mean(0)).abs() < 4 * error + 1e-9).all()


@pytest.mark.parametrize(("base", "version", "scales"), [(nn.ReLU, BReLU, (1.713, 1.414)), (nn.ELU, BELU, None)])
def test_the_authors_lsuv_gives_a_base_network_larger_weights(base, version, scales):
    """It subtracts the mean over the layer, which a bipolar activation does not have: 1/sqrt(1/2 - 1/(2 pi)) for ReLU
    of N(0, 1) but sqrt(2) for bipolar ReLU."""
    mine, theirs = first_scales("authors", base)[:, 0], first_scales("authors", version)[:, 0]
    error = float(((mine.var() + theirs.var()) / len(mine)).sqrt())
    assert float(mine.mean() - theirs.mean()) > 5 * error
    if scales:
        assert (float(mine.mean()), float(theirs.mean())) == pytest.approx(scales, rel=0.02)
