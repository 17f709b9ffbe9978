"""Tests of the deep RNN: its engine against the definition, its masks, its twins, its initialization, whole runs."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import compose
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import StopAfter
from torch import nn
from torch.testing import assert_close

from bipolar import BELU, BGELU, BatchAxisReLU, Bipolar, BReLU, build, sweep
from bipolar.activations import signs
from bipolar.errors import ConfigError
from bipolar.initialization import LSUV, Glorot, He, Identity, Orthogonal, gain
from bipolar.networks import Network, Recurrent
from bipolar.networks.rnn import RNN, RecurrentStack, _draw_kept
from bipolar.run import run
from bipolar.runs import read_run, run_folder
from bipolar.statistics import FIELDS, ActivationStatistics
from bipolar.symmetry import SymmetryError, explain, fold, unfold

CLASSES = 11
NOTHING_RANDOM = {"skip": 0, "dropout": 0, "recurrent_dropout": 0}
MUCH_RANDOM = {"skip": 0.4, "dropout": 0.3, "recurrent_dropout": 0.3}

ACTIVATIONS = {
    "relu": nn.ReLU,
    "brelu": BReLU,
    "brelu halves": lambda: BReLU(pattern="halves"),
    "brelu -1": lambda: BReLU(dim=-1),
    "belu": BELU,
    "belu -1 halves": lambda: BELU(dim=-1, pattern="halves"),
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "batch_axis_relu": BatchAxisReLU,
}
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
every_engine = pytest.mark.parametrize("engine", ["wavefront", "loop"])


def rnn(activation=nn.ReLU, seed=0, dtype=torch.float64, layers=4, hidden_size=6, classes=CLASSES, **options):
    """A network whose biases are not zero either."""
    torch.manual_seed(seed)
    model = RNN((5,), classes, activation, layers, hidden_size, **options)
    with torch.no_grad():
        model.stack.bias.normal_(std=0.3)
    return model.to(dtype)


def plain(activation=nn.ReLU, **options):
    """Without anything random."""
    return rnn(activation, **NOTHING_RANDOM | options)


def both(activation=nn.ReLU, **options):
    """The same network with either engine."""
    return [rnn(activation, engine=engine, **options) for engine in ("wavefront", "loop")]


def text(batch=3, times=5, seed=1):
    return torch.randint(CLASSES, (batch, times), generator=torch.Generator().manual_seed(seed))


def random_state(model, batch=3, seed=2):
    stack = model.stack
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(stack.depth, batch, stack.width, dtype=torch.float64, generator=generator).to(stack.weight)


def loss_of(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gradients(model, tokens, state=None, autocast=None):
    """Output, final state and all gradients of a loss that both have a part in."""
    model.zero_grad()
    torch.manual_seed(3)  # of the masks
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        logits, final = model(tokens, state)
    factors = torch.randn(final.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).to(final)
    (loss_of(logits, tokens.roll(1)) + (final * factors).mean()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    if state is not None:
        found["initial state"], state.grad = state.grad, None
    return {"logits": logits.detach(), "final state": final.detach(), **found}


def observed(model, tokens, state=None):
    """All cells of a forward pass: {layer: (pre-activations, activations)}, each [cells, H] in one order of its own."""
    cells = defaultdict(list)

    def observer(layer, pre, output):
        assert pre.shape == output.shape
        cells[layer].append((pre.detach().clone().flatten(0, -2), output.detach().clone().flatten(0, -2)))

    model.observers.append(observer)
    with torch.no_grad():
        model(tokens, state)
    model.observers.remove(observer)
    return {layer: tuple(map(torch.cat, zip(*pairs, strict=True))) for layer, pairs in sorted(cells.items())}


def in_order(rows):
    return rows[rows[:, 0].argsort()]


# --- the engine against the definition --------------------------------------------------------------------------------

probabilities = st.sampled_from([0.0, 0.3])


@settings(deadline=None, max_examples=80)
@given(
    activation=st.sampled_from(list(ACTIVATIONS)),
    blocks=st.integers(1, 3),
    block_size=st.integers(1, 4),
    times=st.integers(1, 7),
    batch=st.integers(1, 4),
    width=st.integers(1, 8),
    dropout=probabilities,
    recurrent_dropout=probabilities,
    skip=st.sampled_from([0.0, 0.4]),
    skip_per=st.sampled_from(["step", "sequence"]),
    stream_factor=st.sampled_from([0, 0.6, 0.99]),
    embedding=st.sampled_from([("fixed", False), ("learned", False), ("learned", True)]),
    training=st.booleans(),
    state=st.booleans(),
)
def test_wavefront_computes_what_the_loop_defines(
    activation, blocks, block_size, times, batch, width, embedding, training, state, **options
):
    models = both(
        ACTIVATIONS[activation], layers=blocks * block_size, block_size=block_size, hidden_size=width,
        embedding=embedding[0], tied=embedding[1], **options,
    )  # fmt: skip
    initial = random_state(models[0], batch).requires_grad_() if state else None
    mine, wanted = (gradients(model.train(training), text(batch, times), initial) for model in models)
    assert mine.keys() == wanted.keys()
    assert ("embedding.weight" in wanted) == (embedding[0] == "learned")
    assert ("initial state" in wanted) == state
    for name in wanted:
        assert_close(mine[name], wanted[name], rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("activation", ["brelu halves", "belu", "tanh", "batch_axis_relu"])
def test_the_two_engines_train_alike(activation):
    """30 steps of Adam with the state carried from one to the next."""
    losses = []
    for model in both(ACTIVATIONS[activation], layers=6, block_size=3, embedding="learned", tied=True, **MUCH_RANDOM):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        state, curve = None, []
        for step in range(30):
            torch.manual_seed(step)
            logits, state = model(text(3, 6, seed=step), state)
            loss = loss_of(logits, text(3, 6, seed=step + 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state = state.detach()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    assert len(set(losses[0])) == 30


@pytest.mark.parametrize("options", [NOTHING_RANDOM, MUCH_RANDOM], ids=["plain", "masks"])
@every_activation
def test_float32(activation, options):
    state = torch.zeros(8, 3, 16)
    models = both(activation, dtype=torch.float32, layers=8, hidden_size=16, **options)
    mine, wanted = (gradients(model, text(3, 12), state.clone().requires_grad_()) for model in models)
    for name, value in wanted.items():
        assert mine[name].dtype == torch.float32
        assert_close(mine[name], value, rtol=1e-4, atol=1e-5)


def relative_error(found, wanted):
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", [None, "dropout", "recurrent_dropout", "skip"])
@pytest.mark.parametrize("activation", [nn.Tanh, BELU])
def test_autocast_is_as_exact_as_that_of_the_loop(activation, what, dtype):
    options = NOTHING_RANDOM | ({what: MUCH_RANDOM[what]} if what else {}) | {"layers": 8, "hidden_size": 16}
    options |= {"embedding": "learned", "stream_factor": 0.9}
    exact = gradients(rnn(activation, engine="loop", **options), text(8, 12))
    mine, loops = (
        gradients(model.train(), text(8, 12), autocast=dtype)
        for model in both(activation, dtype=torch.float32, **options)
    )
    for name, wanted in exact.items():
        error = relative_error(mine[name], wanted)
        assert error < 2 * relative_error(loops[name], wanted) + (0.01 if dtype == torch.bfloat16 else 0.002), name
        assert error < (0.1 if dtype == torch.bfloat16 else 0.02), name
    assert mine["stack.weight"].dtype == torch.float32


@pytest.mark.parametrize("options", [NOTHING_RANDOM, MUCH_RANDOM], ids=["plain", "masks"])
@every_engine
def test_a_state_of_lower_precision_may_be_carried_on(engine, options):
    model = rnn(nn.Tanh, dtype=torch.float32, engine=engine, **options).eval()
    with torch.autocast("cpu", torch.bfloat16):
        _, state = model(text())
        logits, _ = model(text(seed=2), state)
    wanted = rnn(nn.Tanh, engine="loop", **options).eval()
    assert relative_error(logits, wanted(text(seed=2), wanted(text())[1])[0]) < 0.05


def test_only_once_differentiable_and_says_so():
    model = plain(nn.Tanh, engine="wavefront")
    state = random_state(model).requires_grad_()
    (first,) = torch.autograd.grad(model(text(), state)[0].square().sum(), state, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("activation", [nn.Tanh, BReLU, BELU])
def test_a_second_backward_pass_gives_the_same(activation):
    model = plain(activation, engine="wavefront")
    loss = model(text())[0].square().sum()
    loss.backward(retain_graph=True)
    first = model.stack.weight.grad.clone()
    loss.backward()
    assert torch.equal(model.stack.weight.grad, 2 * first)


def test_a_second_backward_pass_is_refused_and_not_wrong():
    """Where pre-activations are kept, the first one has put gradients in their place."""
    model = plain(nn.GELU, engine="wavefront")
    loss = model(text())[0].square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_gradient_is_asked_of_frozen_weights():
    models = both(nn.Tanh, **NOTHING_RANDOM)
    for model in models:
        model.stack.weight.requires_grad_(False)
    mine, wanted = (gradients(model, text()) for model in models)
    assert "stack.weight" not in wanted
    for name in wanted:
        assert_close(mine[name], wanted[name])


@every_engine
def test_auto_gives_the_same_as_either(engine):
    model, auto = rnn(BELU, engine=engine, **MUCH_RANDOM), rnn(BELU, **MUCH_RANDOM)
    mine, wanted = gradients(auto, text()), gradients(model, text())
    for name in wanted:
        assert_close(mine[name], wanted[name])


# --- the state --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 4, 7])
@every_engine
@every_activation
def test_the_state_carries_on_from_part_to_part(activation, engine, cut):
    model = rnn(activation, engine=engine, layers=6, block_size=2, **MUCH_RANDOM).eval()
    tokens, state = text(4, 8), random_state(model, 4)
    logits, final = model(tokens, state)
    first, between = model(tokens[:, :cut], state)
    second, last = model(tokens[:, cut:], between)
    assert_close(torch.cat([first, second], dim=1), logits, rtol=1e-11, atol=1e-12)
    assert_close(last, final, rtol=1e-11, atol=1e-12)


@every_engine
def test_without_a_state_it_starts_from_zeros(engine):
    model = plain(BELU, engine=engine)
    zeros = torch.zeros(4, 3, 6, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(model(text()), model(text(), zeros), strict=True))
    assert torch.equal(model.initial_state(text()), zeros)


@every_engine
def test_the_final_state_is_what_the_layers_put_out_last(engine):
    model = plain(BELU, engine=engine)
    _, final = model(text())
    _, before = model(text()[:, :-1])
    (step,) = [observed(model, text()[:, -1:], before)]
    for layer, (_, outputs) in step.items():
        assert_close(in_order(outputs), in_order(final[layer]))


@every_engine
def test_a_character_has_no_say_in_what_was_before_it(engine):
    model = plain(BELU, engine=engine)
    tokens, other = text(3, 6), text(3, 6)
    other[:, 4] = (other[:, 4] + 1) % CLASSES
    a, b = model(tokens)[0], model(other)[0]
    assert torch.equal(a[:, :4], b[:, :4])
    assert (a[:, 4:] - b[:, 4:]).abs().amin(2).amin() > 0


# --- what is random ---------------------------------------------------------------------------------------------------


def counting(p, **options):
    """A network that hands on what it gets: its masks can be read from its activations."""
    model = plain(nn.Identity, layers=6, block_size=2, hidden_size=50, stream_factor=0.6, **options).train()
    with torch.no_grad():
        model.stack.weight.zero_()
        model.stack.bias.zero_()
        model.embedding.weight.fill_(1)
    return model


def share(tensor, p, value):
    """The tensor has zeros and `value` only, and about a share p of zeros; returns it as booleans."""
    assert_close(tensor.unique(), torch.tensor([0, value], dtype=tensor.dtype))
    zeros = (tensor == 0).double().mean().item()
    assert zeros == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / tensor.numel()))
    return tensor != 0


@pytest.mark.parametrize("p", [0.0003, 0.05, 0.5, 0.97, 0.999999])
@pytest.mark.parametrize("shape", [(1001, 997), (7, 11, 13, 17 * 61)])
def test_inputs_are_dropped_with_the_given_probability(p, shape):
    torch.manual_seed(0)
    mask = torch.empty(shape, dtype=torch.bool)
    _draw_kept(mask, p)
    drops = (~mask).flatten().double()
    spread = 5 * math.sqrt(p * (1 - p) / drops.numel())
    assert drops.mean().item() == pytest.approx(p, abs=spread + 2**-17)
    for lag in (1, 2, 3, 4, shape[-1]):  # of numbers drawn together, and of neighbouring rows
        together = (drops[:-lag] * drops[lag:]).mean().item()
        assert together == pytest.approx(p * p, abs=5 * math.sqrt(p * p * (1 - p * p) / drops.numel()) * 2 + 2**-16)


@pytest.mark.parametrize("p", [0.1, 0.5])
@every_engine
def test_dropout_of_inputs(engine, p):
    """In front of every layer but the first, anew for every time and sample."""
    model = counting(p, dropout=p, engine=engine)
    with torch.no_grad():
        model.stack.weight[:, :, :50] = torch.eye(50)  # W: a layer is its input
    cells = observed(model, text(20, 30))
    assert (cells[0][0] == 1).all()
    kept = share(cells[1][0], p, 1 / (1 - p)).double()
    agreement = (kept[:-1] == kept[1:]).double().mean().item()  # of neighbouring cells
    assert agreement == pytest.approx(p**2 + (1 - p) ** 2, abs=0.03)
    assert torch.equal(observed(model.eval(), text(20, 30))[3][0], observed(plain_copy(model), text(20, 30))[3][0])


def plain_copy(model):
    model = copy.deepcopy(model)
    model.stack.dropout = model.stack.recurrent_dropout = model.stack.skip = 0
    return model


@pytest.mark.parametrize("p", [0.1, 0.4])
@every_engine
def test_recurrent_dropout_is_the_same_at_all_times(engine, p):
    model = counting(p, recurrent_dropout=p, engine=engine)
    with torch.no_grad():
        model.stack.weight[:, :, 50:] = torch.eye(50)  # U: a layer is its state
    ones = torch.ones(6, 30, 50, dtype=torch.float64)
    final = model(text(30, 7), ones)[1]
    kept = share(final, p, (1 - p) ** -7)  # had each time its own, 1 - (1 - p)^7 of them would be zero
    for one, other in itertools.pairwise([*kept, *kept.transpose(0, 1)[:, 0]]):
        assert not torch.equal(one, other)  # of two layers, of two samples
    assert torch.equal(model.eval()(text(30, 7), ones)[1], ones)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("skip_per", ["step", "sequence"])
@every_engine
def test_skipped_blocks(engine, skip_per, p):
    model = counting(p, skip=p, skip_per=skip_per, engine=engine)
    with torch.no_grad():
        model.stack.bias.fill_(1)  # what a layer puts out
    factors = []
    for _ in range(40):
        stream, final = model.stack(torch.ones(3, 20, 50, dtype=torch.float64), model.initial_state(text()))
        assert (final == 1).all()  # the layers themselves go on
        assert torch.equal(stream, stream[:1, :, :1].expand_as(stream))  # all samples and features alike
        rest = (stream[0, :, 0] - 0.6**3) / 0.8  # = 0.36 a + 0.6 b + c, with the factors a, b, c of the three blocks
        found = (rest[:, None] * (1 - p) - ALL_SUMS).abs() < 1e-9  # [times, kept or not of the three blocks]
        assert (found.sum(1) == 1).all()
        factors.append(KEPT[found.double().argmax(1)].T)
    kept = torch.stack(factors)  # [40, 3 blocks, times]
    draws = kept.numel() if skip_per == "step" else kept.numel() / 20
    assert kept.mean().item() == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p) / draws))
    assert (skip_per == "sequence") == bool((kept == kept[..., :1]).all())
    assert not torch.equal(kept[:, 0], kept[:, 1])
    stream, _ = model.eval().stack(torch.ones(3, 20, 50, dtype=torch.float64), model.initial_state(text()))
    assert_close(stream, torch.full_like(stream, 0.6**3 + 0.8 * (0.36 + 0.6 + 1)))


KEPT = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3))).double()
ALL_SUMS = KEPT @ torch.tensor([0.36, 0.6, 1], dtype=torch.float64)


@every_engine
def test_nothing_is_random_in_evaluation(engine):
    model = rnn(BELU, engine=engine, **MUCH_RANDOM).eval()
    before = torch.get_rng_state()
    logits = model(text())[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits, plain(BELU, engine=engine)(text())[0])
    assert not torch.equal(logits, model.train()(text())[0])


@every_engine
def test_the_seed_decides(engine):
    model = rnn(BELU, engine=engine, **MUCH_RANDOM)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(text())[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# --- the stream and the embedding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0, 0.6, 0.99])
@every_engine
def test_what_a_block_adds_to_the_stream(engine, factor):
    model = plain(nn.Identity, layers=2, block_size=1, stream_factor=factor, engine=engine)
    with torch.no_grad():
        model.stack.weight.zero_()
        model.stack.bias.copy_(torch.tensor([[2.0], [3.0]]))
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    stream, final = model.stack(x, model.initial_state(text()))
    branch = math.sqrt(1 - factor**2)
    assert_close(stream, factor * (factor * x + branch * 2) + branch * 3)
    assert_close(final, torch.tensor([2.0, 3.0]).double()[:, None, None].expand(2, 3, 6))


def test_blocks_without_a_stream_are_plain_layers():
    sizes = [plain(BELU, layers=6, block_size=size, stream_factor=0, engine="loop") for size in (1, 2, 3, 6)]
    results = [model(text())[0] for model in sizes]
    for other in results[1:]:
        assert_close(results[0], other)


def test_the_embedding_is_fixed_unless_it_is_learned():
    fixed, learned, tied = rnn(), rnn(embedding="learned"), rnn(embedding="learned", tied=True, hidden_size=400)
    assert [model.embedding.weight.requires_grad for model in (fixed, learned, tied)] == [False, True, True]
    assert tied.output.weight is tied.embedding.weight
    assert len(list(tied.parameters())) == len(list(learned.parameters())) - 1
    read = []
    tied.stack.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    tied(text(8, 50))
    assert_close(read[0], 20 * tied.embedding.weight[text(8, 50)])


# --- layers, observers, statistics ------------------------------------------------------------------------------------


def test_it_is_a_recurrent_network():
    model = rnn()
    assert isinstance(model, Network)
    assert isinstance(model, Recurrent)
    assert [layer.name for layer in model.layers()] == ["layer1", "layer2", "layer3", "layer4", "output"]
    assert not any("cells" in name or "activations" in name for name in model.state_dict())


def test_a_cell_is_a_view_of_the_stack():
    model = plain()
    cell = model.layers()[2].linear
    assert cell.gradient is None
    with torch.no_grad():
        cell.input_weight.fill_(2)
        cell.recurrent_weight.fill_(3)
        cell.bias.fill_(4)
    weight = model.stack.weight[2]
    assert (weight[:, :6] == 2).all()
    assert (weight[:, 6:] == 3).all()
    assert (model.stack.bias[2] == 4).all()
    assert (cell(torch.ones(1, 6).double(), torch.ones(1, 6).double()) == 6 * 2 + 6 * 3 + 4).all()
    model(text())[0].sum().backward()
    assert torch.equal(cell.gradient, model.stack.weight.grad[2])


@every_engine
def test_a_deep_copy_has_cells_of_its_own(engine):
    model = plain(BELU, engine=engine, stream_factor=0)
    before = model(text())[0]
    twin = copy.deepcopy(model)
    assert torch.equal(twin(text())[0], before)
    with torch.no_grad():
        for layer in twin.layers()[:-1]:
            layer.linear.weight.zero_()
            layer.linear.bias.zero_()
    assert not twin.stack.weight.any()
    assert torch.equal(model(text())[0], before)
    assert torch.equal(twin(text())[0], twin.output.bias.expand(3, 5, CLASSES))


@every_activation
@pytest.mark.parametrize("training", [True, False])
def test_observers_see_every_cell_once(activation, training):
    models = both(activation, layers=6, block_size=3, **MUCH_RANDOM)
    seen = []
    for model in models:
        torch.manual_seed(5)
        seen.append(observed(model.train(training), text(3, 7), random_state(model)))
    assert list(seen[0]) == list(seen[1]) == list(range(6))
    for mine, wanted in zip(seen[0].values(), seen[1].values(), strict=True):
        mine, wanted = (torch.cat(pair, dim=1) for pair in (mine, wanted))
        assert mine.shape == (21, 12)
        assert_close(in_order(mine), in_order(wanted), rtol=1e-9, atol=1e-11)
    if activation is not BatchAxisReLU:
        for pre, output in seen[0].values():
            assert_close(activation()(pre), output)


@pytest.mark.parametrize("training", [True, False])
@every_activation
def test_statistics_are_the_same_with_either_engine(activation, training):
    tables = []
    for model in both(activation, dtype=torch.float32, hidden_size=12, **MUCH_RANDOM):
        statistics = ActivationStatistics(model, text())
        assert statistics.names == ["layer1", "layer2", "layer3", "layer4"]
        model.train(training)
        model(text())  # not measured
        for seed in range(2):
            torch.manual_seed(seed)
            with statistics.measuring():
                logits, _ = model(text(4, 6, seed))
            loss_of(logits, text(4, 6, seed)).backward()
        tables.append(statistics.take())
        statistics.remove()
        assert model.observers == []
    assert tables[0].shape == (4, len(FIELDS))
    assert tables[0].isfinite().all()
    assert_close(*tables, rtol=1e-4, atol=1e-5)


@every_engine
def test_statistics_are_those_of_all_cells(engine):
    model = plain(BELU, dtype=torch.float32, engine=engine, hidden_size=12)
    cells = observed(model, text(4, 6))
    statistics = ActivationStatistics(model, text())
    with statistics.measuring():
        logits, _ = model(text(4, 6))
    loss_of(logits, text(4, 6)).backward()
    for row, layer, (pre, output) in zip(statistics.take().tolist(), model.layers()[:-1], cells.values(), strict=True):
        found = dict(zip(FIELDS, row, strict=True))
        wanted = {
            "mean": output.mean(),
            "variance": output.var(correction=0),
            "channel_mean_norm": output.mean(0).square().mean().sqrt(),
            "zero_fraction": (output == 0).float().mean(),
            "max_abs": output.abs().max(),
            "pre_mean": pre.mean(),
            "pre_variance": pre.var(correction=0),
            "gradient_norm": layer.linear.gradient.norm(),
        }
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


def test_statistics_change_nothing():
    results = []
    for measured in (False, True):
        model = rnn(BELU, dtype=torch.float32, **MUCH_RANDOM)
        before = torch.get_rng_state()
        statistics = ActivationStatistics(model, text())
        assert torch.equal(torch.get_rng_state(), before)
        with statistics.measuring(measured):
            results.append(gradients(model, text()))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# --- memory -----------------------------------------------------------------------------------------------------------


def bytes_for_backward(model, tokens):
    """Of all that the forward pass keeps, each storage once."""
    storages, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens)
    return sum(storages.values())


KEEPS_OUTPUT = {name: each for name, each in ACTIVATIONS.items() if name != "batch_axis_relu"}
every_paper_activation = pytest.mark.parametrize("activation", KEEPS_OUTPUT.values(), ids=KEEPS_OUTPUT)


@pytest.mark.parametrize("options", [{}, NOTHING_RANDOM, NOTHING_RANDOM | {"stream_factor": 0}], ids=str)
@every_paper_activation
def test_no_more_memory_than_the_loop(activation, options):
    models = both(activation, layers=12, hidden_size=32, dtype=torch.float32, **options)
    wavefront, loop = (bytes_for_backward(model, text(16, 30)) for model in models)
    # Without masks ReLU and tanh keep their output alone there too; the wavefront has the first state besides.
    assert wavefront <= (1.0 if not options else 1.07) * loop


@pytest.mark.parametrize("times", [10, 40])
@every_activation
def test_memory_is_an_activation_a_cell(activation, times):
    """And a stream a block, and what does not grow with time; a pre-activation too where it is needed."""
    model = plain(activation, layers=12, hidden_size=32, dtype=torch.float32, engine="wavefront")
    cells = 4 * 16 * 32 * times
    constant = 4 * (model.stack.weight.numel() + model.output.weight.numel() + 12 * 16 * 32) + 8 * 16 * times
    arrays = 1 if activation in KEEPS_OUTPUT.values() else 2
    assert bytes_for_backward(model, text(16, times)) <= (arrays * 12 + 3 + 2) * cells + constant


# --- activations that the wavefront cannot have -----------------------------------------------------------------------


class Own(nn.Module):
    """A user's activation, of which nothing is known."""

    def forward(self, x):
        assert x.ndim == 2
        return torch.sin(x)


LOOP_ONLY = {
    "prelu": nn.PReLU,
    "bipolar prelu": lambda: Bipolar(nn.PReLU()),
    "in place": lambda: nn.ELU(inplace=True),
    "bipolar in place": lambda: Bipolar(nn.ELU(inplace=True)),
    "own": Own,
}
every_loop_only = pytest.mark.parametrize("activation", LOOP_ONLY.values(), ids=LOOP_ONLY)


@every_loop_only
def test_auto_falls_back_to_the_loop(activation):
    mine, wanted = (gradients(rnn(activation, engine=engine, **MUCH_RANDOM), text()) for engine in ("auto", "loop"))
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
    assert all(value.abs().sum() > 0 for value in wanted.values())  # parameters of activations learn too


@every_loop_only
def test_the_wavefront_refuses_them_in_one_line(activation):
    with pytest.raises(ConfigError, match=r"^engine=wavefront is not possible with") as raised:
        rnn(activation, engine="wavefront")
    assert "\n" not in str(raised.value)


def test_activations_that_draw_numbers_have_the_gradient_of_what_they_drew():
    """RReLU: the slope of the backward pass is the one of the forward pass."""
    model = plain(nn.RReLU, layers=1, block_size=1, hidden_size=40)
    cells = []
    model.observers.append(lambda _, pre, output: cells.append((pre.flatten().clone(), output.flatten().clone())))
    _, final = model(text(1, 1))
    final.sum().backward()
    (pre, output), *_ = cells
    assert_close(model.stack.bias.grad[0], output / pre)


@pytest.mark.parametrize(
    "activation",
    [lambda: nn.Softmax(dim=-1), lambda: nn.Sequential(nn.Tanh(), Own())],
    ids=["along the last dimension", "own within torch's"],
)
def test_auto_gives_what_the_loop_gives_for_any_module(activation):
    mine, wanted = (plain(activation, engine=engine)(text())[0] for engine in ("auto", "loop"))
    assert_close(mine, wanted)


def test_layers_may_have_different_activations():
    def model(engine):
        kinds = itertools.cycle([nn.Tanh, nn.ReLU])
        return plain(lambda: next(kinds)(), engine=engine)

    assert_close(model("auto")(text())[0], model("loop")(text())[0])


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "activation"), [("eager", nn.PReLU), ("aot_eager", BReLU)])
def test_compiled(backend, activation):
    torch._dynamo.reset()
    model = rnn(activation, layers=2, block_size=1, embedding="learned", **MUCH_RANDOM)
    statistics = ActivationStatistics(model, text())
    compiled = torch.compile(model, backend=backend)
    tables, results = [], []
    for network in (model, compiled):
        state, curve = None, []
        for step in range(3):
            torch.manual_seed(step)
            with statistics.measuring(step == 1):
                logits, state = network(text(3, 2, seed=step), state)
            loss = loss_of(logits, text(3, 2, seed=step + 1))
            loss.backward()
            state = state.detach()
            curve.append(loss.item())
        results.append((curve, {name: p.grad for name, p in model.named_parameters()}))
        tables.append(statistics.take())
        model.zero_grad()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-10)
    for name, gradient in results[0][1].items():
        if gradient is not None:
            assert_close(results[1][1][name], gradient)
    assert_close(*tables)


# --- twins ------------------------------------------------------------------------------------------------------------

BIPOLAR = {
    "brelu": BReLU,
    "belu halves": lambda: BELU(pattern="halves"),
    "bgelu -1": lambda: BGELU(dim=-1),
    "bipolar prelu": lambda: Bipolar(nn.PReLU()),
}
every_bipolar = pytest.mark.parametrize("activation", BIPOLAR.values(), ids=BIPOLAR)


def optimizer_for(name, model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)
    return torch.optim.AdamW(parameters, lr=0.005, weight_decay=0.01)


def trained(model, optimizer, steps=50):
    """The losses of training with everything random, the state carried on."""
    optimizer, state, losses = optimizer_for(optimizer, model), None, []
    for step in range(steps):
        torch.manual_seed(step)
        logits, state = model(text(3, 5, seed=step), state)
        loss = loss_of(logits, text(3, 5, seed=step + 1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state = state.detach()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("activation", "dtype", "optimizer"),
    [
        ("brelu", torch.float32, "sgd"),
        ("brelu", torch.float64, "adamw"),
        ("belu halves", torch.float32, "adamw"),
        ("belu halves", torch.float64, "sgd"),
        ("bgelu -1", torch.float32, "sgd"),
        ("bipolar prelu", torch.float32, "adamw"),
    ],
)
def test_a_network_and_its_base_twin_train_alike_to_the_last_bit(activation, dtype, optimizer):
    model = rnn(BIPOLAR[activation], dtype=dtype, block_size=2, embedding="learned", **MUCH_RANDOM)
    twin = fold(model)
    assert not any(isinstance(module, Bipolar) for module in twin.modules())
    mine, twins = trained(model, optimizer), trained(twin, optimizer)
    assert mine == twins
    assert len(set(mine)) > 45


@pytest.mark.parametrize(
    "options",
    [{}, {"engine": "loop"}, {"tied": True, "embedding": "learned"}, {"layers": 1, "block_size": 1}],
    ids=["", "loop", "tied", "one layer"],
)  # fmt: skip
@every_bipolar
def test_fold_and_unfold(activation, options):
    model = rnn(activation, hidden_size=7, **options)
    twin = fold(model, example=text())
    for training in (False, True):
        results = []
        for network in (model, twin):
            torch.manual_seed(0)
            results.append(network.train(training)(text()))
        (logits, final), (twin_logits, twin_final) = results
        assert torch.equal(logits, twin_logits)
        sign = signs(7, model.stack.activations[0].pattern, dtype=torch.float64)
        assert torch.equal(final, twin_final * sign)
    if not any(isinstance(module, nn.PReLU) for module in model.modules()):
        again = unfold(twin, model.stack.activations[0].pattern, example=text())
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
        assert torch.equal(model.eval()(text())[0], again.eval()(text())[0])


def test_fold_does_not_change_its_argument():
    model = plain(BELU)
    before, logits = copy.deepcopy(model.state_dict()), model(text())[0]
    twin = fold(model)
    with torch.no_grad():
        twin.layers()[0].linear.weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(text())[0], logits)


@pytest.mark.parametrize(
    "activation", [BReLU, BELU, nn.ReLU, nn.GELU, nn.Tanh, lambda: Bipolar(torch.tanh)],
    ids=["brelu", "belu", "relu", "gelu", "tanh", "bipolar tanh"],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"tied": True, "embedding": "learned"}], ids=["", "tied"])
def test_explain_finds_nothing_that_breaks_the_symmetry(activation, options):
    rows = explain(rnn(activation, **options))
    assert all(row.keeps for row in rows), rows
    layers = [row.layer for row in rows]
    assert [name for name in layers if name in ("embedding", "stack", "output")] == ["embedding", "stack", "output"]
    assert all("\n" not in row.reason for row in rows)


def test_explain_names_the_batch_axis_relu():
    rows = explain(rnn(BatchAxisReLU))
    assert [row.layer for row in rows if not row.keeps] == ["stack"]
    with pytest.raises(SymmetryError, match=r"^stack \(4 recurrent layers\) flips rows of the batch"):
        fold(rnn(BatchAxisReLU))


def test_layers_of_different_patterns_break_the_symmetry():
    patterns = itertools.cycle(["interleaved", "halves"])
    model = rnn(lambda: BReLU(pattern=next(patterns)))
    with pytest.raises(SymmetryError, match=r"^stack \(4 recurrent layers\) has layers of different patterns"):
        fold(model)


def test_bipolar_and_base_layers_together_break_the_symmetry():
    kinds = itertools.cycle([BReLU, nn.ReLU])
    with pytest.raises(SymmetryError, match=r"^stack \(4 recurrent layers\) ReLU is not known to be odd"):
        fold(rnn(lambda: next(kinds)()))


class Wrapped(nn.Module):
    """A user's network around a stack: `forward(self, tokens)`."""

    def __init__(self, forward, activation=BReLU, classes=6, **modules):
        super().__init__()
        self._forward = forward
        self.embedding = nn.Embedding(classes, 6)
        self.stack = RecurrentStack(2, 6, activation, 1, 0.9, 0, "step", 0, 0, "auto")
        self.output = nn.Linear(6, 3)
        self.register_buffer("zeros", torch.zeros(2, 4, 6))
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, tokens):
        return self._forward(self, tokens)


TOKENS = torch.arange(20).view(4, 5) % 6


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.output(torch.tanh(self.stack(self.embedding(x), self.zeros)[0])),
        lambda self, x: self.output(self.stack(2 * self.embedding(x) + self.embedding(x), self.zeros)[0]),
        lambda self, x: self.output(self.stack(self.linear(self.embedding(x)), self.zeros)[0]),
        lambda self, x: self.output(self.second(self.stack(self.embedding(x), self.zeros)[0], self.zeros)[0]),
    ],
    ids=["tanh", "sum", "linear in front", "two stacks"],
)
def test_stacks_in_other_networks(forward):
    torch.manual_seed(0)
    second = RecurrentStack(2, 6, BReLU, 2, 0.5, 0, "step", 0, 0, "auto")
    model = Wrapped(forward, linear=nn.Linear(6, 6), second=second).double()
    twin = fold(model)
    assert torch.equal(model(TOKENS), twin(TOKENS))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.output(torch.relu(self.stack(self.embedding(x), self.zeros)[0])),
        lambda self, x: self.output(self.stack(self.embedding(x).abs(), self.zeros)[0]),
        lambda self, x: self.output(self.stack(self.norm(self.embedding(x)), self.zeros)[0]),
        lambda self, x: self.output(self.stack(self.embedding(x), self.zeros)[0]) + self.embedding(x)[..., :3],
    ],
    ids=["relu behind", "absolute values", "layer norm in front", "embedding put out"],
)
def test_what_breaks_the_symmetry_around_a_stack(forward):
    torch.manual_seed(0)
    model = Wrapped(forward, norm=nn.LayerNorm(6)).double()
    with pytest.raises(SymmetryError):
        fold(model)
    assert (model(TOKENS) - fold(model, strict=False)(TOKENS)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.output(self.stack(self.embedding(x), self.first.expand(2, 4, 6))[0]),
        lambda self, x: self.output(self.second(self.embedding(x), self.stack(self.embedding(x))[1].abs())[0]),
        lambda self, x: self.stack(self.embedding(x), self.zeros)[1],
    ],
    ids=["learned", "absolute values", "put out"],
)  # fmt: skip
def test_a_state_with_signs_is_seen(forward):
    """A learned first state, or one that is made of another, is not flipped: no fold, or a right one."""
    torch.manual_seed(0)
    model = Wrapped(forward, second=RecurrentStack(2, 6, BReLU, 2, 0.5, 0, "step", 0, 0, "auto")).double()
    model.first = nn.Parameter(torch.randn(6).double())
    try:
        twin = fold(model)
    except SymmetryError:
        return
    assert_close(model(TOKENS), twin(TOKENS))


def test_embeddings_in_other_networks():
    torch.manual_seed(0)
    for layers in (
        [nn.Embedding(6, 4), BReLU(-1), nn.Linear(4, 2)],
        [nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 5), BELU(-1), nn.Linear(5, 2)],
        [nn.Embedding(6, 4), nn.Conv1d(5, 5, 1), BELU(), nn.Flatten(), nn.Linear(20, 2)],
    ):
        model = nn.Sequential(*layers).double()
        assert torch.equal(model(TOKENS), fold(model)(TOKENS))
    times_are_not_features = nn.Sequential(nn.Embedding(6, 5), BReLU(-1), nn.Conv1d(5, 5, 1), nn.Flatten()).double()
    with pytest.raises(SymmetryError, match=r"^2 \(Conv1d\) its inputs are not the features in front of it"):
        fold(times_are_not_features)


# --- initialization ---------------------------------------------------------------------------------------------------

WIDE = {"layers": 8, "hidden_size": 256, "dtype": torch.float32, "classes": 500}
STEP = torch.zeros(512, 1, dtype=torch.long)  # what a probe looks at the shape of


def initialised(init, activation=nn.ReLU, seed=0, **options):
    model = rnn(activation, seed, **WIDE | options)
    torch.manual_seed(1000 + seed)  # not the numbers of the embedding again
    return model, init(model, STEP)


def cells_of(model):
    return [layer.linear for layer in model.layers()[:-1]]


@pytest.mark.parametrize("activation", [nn.ReLU, BReLU, nn.ELU, BELU, nn.Tanh, nn.Identity])
def test_he_shares_the_variance_between_input_and_state(activation):
    model, _ = initialised(He(), activation)
    of_state = gain(activation()) ** 2 / 512
    for index, cell in enumerate(cells_of(model)):
        assert cell.recurrent_weight.var().item() == pytest.approx(of_state, rel=0.03)
        if 0 < index < 4:  # in the first block: read from the layer below
            assert cell.input_weight.var().item() == pytest.approx(of_state, rel=0.03)
    assert cells_of(model)[0].input_weight.var().item() == pytest.approx(1 / 512, rel=0.03)
    embedding, activations = 0.99**4, (1 - 0.99**4) / gain(activation()) ** 2  # second moments in the stream
    assert model.output.weight.var().item() == pytest.approx(1 / (embedding + activations) / 256, rel=0.1)
    assert not model.stack.bias.any()
    assert not model.output.bias.any()


def second_moments(activation, blocks, networks=3):
    """Of the pre-activations of each layer, in running networks with He's weights."""
    found = torch.zeros(4 * blocks)
    for seed in range(networks):
        model = plain(activation, dtype=torch.float32, layers=4 * blocks, hidden_size=256, seed=seed)
        He()(model)
        for layer, (pre, _) in observed(model, text(16, 25)).items():
            found[layer] += pre.square().mean() / networks
    return found


@pytest.mark.parametrize("activation", [nn.ReLU, BReLU, nn.ELU, BELU, nn.Tanh])
def test_he_gives_pre_activations_of_variance_1(activation):
    assert second_moments(activation, 1)[:3].tolist() == pytest.approx([1] * 3, rel=0.35)


@pytest.mark.parametrize("activation", [BReLU, nn.ELU, nn.Tanh])
def test_he_gives_pre_activations_of_variance_1_where_a_block_begins(activation):
    """What is read there is the stream, whose variance is 1, and no activation."""
    assert second_moments(activation, 3)[::4].tolist() == pytest.approx([1] * 3, rel=0.35)


@pytest.mark.parametrize("activation", [nn.ReLU, BELU])
def test_orthogonal(activation):
    model, _ = initialised(Orthogonal(), activation, hidden_size=32, dtype=torch.float64)
    square = gain(activation()) ** 2 / 2 * torch.eye(32).double()
    for index, cell in enumerate(cells_of(model)):
        assert_close(cell.recurrent_weight @ cell.recurrent_weight.T, square, atol=1e-10, rtol=1e-7)
        if 0 < index < 4:
            assert_close(cell.input_weight @ cell.input_weight.T, square, atol=1e-10, rtol=1e-7)
    first = cells_of(model)[0].input_weight
    assert_close(first @ first.T, 0.5 * torch.eye(32).double(), atol=1e-10, rtol=1e-7)


def test_identity():
    model, _ = initialised(Identity(), nn.ReLU)
    for cell in cells_of(model):
        assert torch.equal(cell.recurrent_weight, torch.eye(256))
        assert cell.input_weight.std() > 0.01
    assert cells_of(model)[0].input_weight.var().item() == pytest.approx(1 / 512, rel=0.03)
    assert cells_of(model)[1].input_weight.var().item() == pytest.approx(2 / 512, rel=0.03)


def test_glorot_takes_both_matrices_as_one():
    model, _ = initialised(Glorot())
    for cell in cells_of(model):
        assert cell.weight.var().item() == pytest.approx(2 / (3 * 256), rel=0.03)
        assert cell.weight.abs().max() <= math.sqrt(6 / (3 * 256))


INITS = {
    "he": He,
    "glorot": Glorot,
    "orthogonal": Orthogonal,
    "identity": Identity,
    "lsuv textbook": LSUV,
    "lsuv authors": lambda: LSUV("authors"),
}
every_init = pytest.mark.parametrize("init", INITS.values(), ids=INITS)


@every_init
def test_every_initialization_says_what_it_did(init):
    model, report = initialised(init(), hidden_size=32)
    assert [row["layer"] for row in report] == [layer.name for layer in model.layers()]
    for row, layer in zip(report, model.layers(), strict=True):
        assert row["weight_mean"] == pytest.approx(float(layer.linear.weight.detach().mean()), abs=1e-7)
        assert row["weight_std"] == pytest.approx(float(layer.linear.weight.detach().std(correction=0)), rel=1e-5)
        assert not layer.linear.bias.any()


@every_init
def test_every_initialization_repeats_itself_and_leaves_the_rest_alone(init):
    results = []
    for seed in (1, 1, 2):
        model = rnn(BELU, dtype=torch.float32, hidden_size=32, layers=8, embedding="learned", **MUCH_RANDOM)
        embedding, options = model.embedding.weight.clone(), repr(model)
        model.stack.eval()
        torch.manual_seed(seed)
        init()(model, STEP)
        assert (model.training, model.stack.training, repr(model)) == (True, False, options)
        assert torch.equal(model.embedding.weight, embedding)
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert model.observers == []
        results.append(model.stack.weight.clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def probed(model):
    """(pre-activations, activations) of each layer in a probe."""
    seen = defaultdict(dict)
    hooks = []
    for layer in model.layers():
        for role in ("linear", "activation"):
            if (module := getattr(layer, role)) is not None:
                hooks.append(
                    module.register_forward_hook(
                        lambda _, __, output, name=layer.name, role=role: seen[name].update({role: output})
                    )
                )
    with torch.no_grad():
        model.probe(STEP)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("activation", [nn.ReLU, BReLU, nn.ELU, BELU])
def test_lsuv_of_the_authors_gives_activations_of_variance_1_in_one_step(activation):
    model, report = initialised(LSUV("authors"), activation, dtype=torch.float64, hidden_size=128)
    after = torch.get_rng_state()
    same, torch_state = probed(model), torch.get_rng_state()
    assert not torch.equal(after, torch_state)  # a probe draws; the one within the initialization left no trace
    for row, name in zip(report, same, strict=True):
        output = same[name].get("activation", same[name]["linear"])
        assert row["layer"] == name
        assert row["std_after"] ** 2 == pytest.approx(1, abs=0.001)
        assert output.var(correction=0).item() == pytest.approx(row["std_after"] ** 2, rel=1e-9)
    for output in probed(model).values():  # other characters, other states
        assert output.get("activation", output["linear"]).var().item() == pytest.approx(1, abs=0.1)


def test_textbook_lsuv_gives_pre_activations_of_variance_1_in_one_step():
    model, report = initialised(LSUV("textbook", tolerance=0.001), BELU, dtype=torch.float64)
    for row, output in zip(report, probed(model).values(), strict=True):
        assert output["linear"].var(correction=0).item() == pytest.approx(1, abs=0.001)
        assert row["std_after"] ** 2 == pytest.approx(1, abs=0.001)


@pytest.mark.parametrize("variant", ["textbook", "authors"])
def test_lsuv_scales_both_matrices_of_a_layer_alike(variant):
    model, _ = initialised(LSUV(variant), BELU)
    for cell in cells_of(model):
        ratio = cell.input_weight.std() / cell.recurrent_weight.std()
        assert ratio.item() == pytest.approx(1, abs=0.02)


def test_a_probe_is_one_step_without_masks():
    model = plain(BELU)
    torch.manual_seed(1)
    found = model.probe(text(16, 9))
    torch.manual_seed(1)
    tokens = torch.randint(CLASSES, (16,))
    state = torch.randn(4, 16, 6, dtype=torch.float64)
    assert_close(found, model(tokens[:, None], state)[0][:, 0])
    masked = rnn(BELU, **MUCH_RANDOM)
    torch.manual_seed(1)
    assert torch.equal(masked.train().probe(text(16, 9)), found)


@pytest.mark.parametrize(("base", "version"), [(nn.ReLU, BReLU), (nn.ELU, BELU)])
def test_the_authors_lsuv_does_not_start_a_base_network_and_its_bipolar_version_alike(base, version):
    """It subtracts the mean, which a bipolar layer has not; He's weights, and the textbook's, are of one scale."""

    def scales(init):
        """The base network's less its bipolar version's, of the first two layers: mean and standard error."""
        made = [
            [initialised(init, kind, seed, layers=2, block_size=2, hidden_size=128)[0] for kind in (base, version)]
            for seed in range(12)
        ]
        stds = torch.stack([torch.stack([model.stack.weight.std((1, 2)) * 16 for model in pair]) for pair in made])
        differences = stds.detach()[:, 0] - stds.detach()[:, 1]
        return differences.mean(0), differences.std(0) / math.sqrt(12)

    mean, error = scales(LSUV("authors"))
    assert (mean > 3 * error).all()
    assert mean[0].item() == pytest.approx({nn.ReLU: 1.713 - 1.414, nn.ELU: 1.32 - 1.276}[base], abs=0.015)
    assert not scales(He())[0].any()  # the very same weights
    mean, error = scales(LSUV("textbook", 1e-4, 40))
    assert (mean.abs() < 4 * error + 1e-6).all()


# --- errors -----------------------------------------------------------------------------------------------------------

TEXT = ["network=rnn", "dataset=ptb"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["network.layers=6"], r"network\.layers=6 is not allowed; give a multiple of block_size=4, such as 4 or 8"),
        (["network.layers=3"], r"network\.layers=3 is not allowed; give a multiple of block_size=4, such as 4"),
        (["network.layers=0"], r"network\.layers=0 is not allowed; give an integer of at least 1"),
        (["network.layers=8.0"], r"network\.layers=8\.0 is not allowed; give an integer .*"),
        (["network.hidden_size=0"], r"network\.hidden_size=0 is not allowed; .*"),
        (["network.block_size=0"], r"network\.block_size=0 is not allowed; .*"),
        (["network.block_size=3"], r"network\.layers=8 is not allowed; give a multiple of block_size=3, .* 6 or 9"),
        *[([f"network.stream_factor={value}"], r"network\.stream_factor=.* is not allowed; .*\[0, 1\).*")
          for value in (1, -0.1, "nan", "half")],
        *[([f"network.{name}={value}"], rf"network\.{name}=.* is not allowed; .*\[0, 1\).*")
          for name in ("skip", "dropout", "recurrent_dropout") for value in (1, -0.1)],
        (["network.skip_per=steps"], r"network\.skip_per='steps' .*step, sequence \(did you mean 'step'\?\)"),
        (["network.embedding=fixd"], r"network\.embedding='fixd' .*fixed, learned \(did you mean 'fixed'\?\)"),
        (["network.engine=wave"], r"network\.engine='wave' .*auto, wavefront, loop.*"),
        (["network.tied=maybe"], r"network\.tied='maybe' is not allowed; .*"),
        (["network.tied=true"], r"network\.tied=true needs embedding=learned.*"),
        (["activation=brelu", "activation.dim=2"], r"network: it needs activation\.dim=1, .* not 2"),
        (["activation=brelu", "activation.dim=0"], r"network: it needs activation\.dim=1, .* not 0"),
        (["activation=relu", "activation._target_=torch.nn.PReLU", "network.engine=wavefront"],
         r"network\.engine=wavefront is not possible with PReLU: .*; choose auto or loop"),
        (["activation=brelu", "activation._target_=bipolar.activations.Bipolar", "network.engine=wavefront",
          "+activation.fn={_target_: torch.nn.PReLU}"],
         r"network\.engine=wavefront is not possible with .*; choose auto or loop"),
        (["dataset=digits"], r"network=rnn does not go with dataset=digits: it reads text, and this is no text"),
        (["dataset=cifar10"], r"network=rnn does not go with dataset=cifar10: it reads text, and this is no text"),
        (["dataset=gaussian", "dataset.shape=[8]"], r"network=rnn does not go with dataset=gaussian: .*"),
        (["network=mlp"], r"network=mlp does not go with dataset=ptb: it reads images, and this is a text"),
        *[([f"network={name}", f"dataset={dataset}"],
          rf"(network={name} does not go with dataset={dataset}: .*|network: .*needs images .*)")
          for name, dataset in (("cnn", "text"), ("resnet", "text8"), ("mlp", "python_docs"))],
        (["dataset.sequence_length=0"], r"dataset\.sequence_length=0 is not allowed; give an integer of at least 1"),
        (["dataset.sequence_length=half"], r"dataset\.sequence_length='half' is not allowed; .*"),
    ],
)  # fmt: skip
def test_wrong_options(overrides, message):
    build._tried.clear()
    with pytest.raises(ConfigError, match=f"^{message}$"):
        build.check(sweep.compose([*TEXT, *overrides]))
    build.check(compose(*TEXT))


@pytest.mark.parametrize("name", ["dataset.sequence_length=0"])
def test_a_text_that_was_tried_does_not_hide_one_that_is_wrong(name):
    build.check(sweep.compose(TEXT))
    with pytest.raises(ConfigError, match=r"^dataset\."):
        build.check(sweep.compose([*TEXT, name]))


@pytest.mark.parametrize(("dataset", "engine"), [("ptb", "auto"), ("text", "wavefront"), ("text8", "loop")])
def test_it_goes_with_every_text(dataset, engine):
    build.check(sweep.compose(["network=rnn", f"dataset={dataset}", f"network.engine={engine}", "activation=belu"]))


def test_wide_layers_are_checked_without_their_values():
    build.check(sweep.compose([*TEXT, "network.hidden_size=100000", "network.layers=36"]))


# --- whole runs -------------------------------------------------------------------------------------------------------

SMALL = [
    "network=rnn",
    "network.layers=4",
    "network.hidden_size=16",
    "optimizer=adam",
    "trainer.batch_size=8",
    "trainer.device=cpu",
    "trainer.precision=float32",
    "trainer.log_every=1",
    "trainer.statistics_every=3",
    "trainer.max_steps=12",
]
DOCS = [*SMALL, "dataset=python_docs", "dataset.sequence_length=10", "dataset.evaluation_size=300"]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A text file of which an epoch is 5 steps of 8 streams of 10 characters."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    words = ["one", "of", "the", "grey", "stones", "and", "a", "river"]
    numbers = torch.randint(8, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text(" ".join(words[number] for number in numbers)[:505], encoding="utf-8")
    return path


@pytest.fixture
def make_config(tmp_path, story):
    """make_config(*overrides): a run on the story of more than two epochs."""
    options = [*SMALL, "dataset=text", f"dataset.path={story}", "dataset.sequence_length=10",
               "dataset.valid_fraction=0.1", "dataset.test_fraction=0.1"]  # fmt: skip
    return lambda *overrides: compose(*options, f"output_root={tmp_path}/outputs", *overrides)


def lines(cfg, name="metrics.jsonl"):
    return [json.loads(line) for line in (run_folder(cfg) / name).read_text(encoding="utf-8").splitlines()]


def metrics(cfg):
    """All that was measured, without the speed."""
    return [{key: row[key] for key in row if key != "characters_per_second"} for row in lines(cfg)]


def saved(cfg):
    return torch.load(run_folder(cfg) / "checkpoint.pt", weights_only=True)


def test_records_of_a_run_on_text(tmp_path):
    cfg = sweep.compose([*DOCS, "activation=brelu", f"output_root={tmp_path}"])
    summary = run(cfg)
    assert (summary["status"], summary["steps"]) == ("finished", 12)
    rows = lines(cfg)
    assert {row["split"] for row in rows} == {"train", "valid", "test"}
    for row in rows:
        assert row["bits_per_character"] == pytest.approx(row["loss"] / math.log(2), rel=1e-12)
        assert ("characters_per_second" in row) == (row["split"] == "train")
        assert 0 <= row["error"] <= 1
        assert "images_per_second" not in row
    classes = len(read_run(run_folder(cfg)).environment["text"]["vocabulary"])
    assert rows[0]["loss"] == pytest.approx(math.log(classes), rel=0.5)
    assert summary["characters_per_second"] > 0
    for split in ("train", "valid", "test"):
        assert (
            summary["final"][f"{split}_bits_per_character"]
            == next(row for row in reversed(rows) if row["split"] == split)["bits_per_character"]
        )
    assert summary["best"]["valid_bits_per_character"] == summary["best"]["valid_loss"] / math.log(2)

    activations = lines(cfg, "activations.jsonl")
    assert [(row["step"], row["layer"]) for row in activations] == [
        (step, f"layer{index}") for step in (0, 3, 6, 9, 12) for index in range(1, 5)
    ]
    for row in activations:
        assert all(math.isfinite(row[field]) for field in FIELDS if field != "gradient_norm")
        assert (row["gradient_norm"] is None) == (row["step"] == 12)  # the last is measured without a backward pass
        assert row["gradient_norm"] is None or row["gradient_norm"] > 0
    assert {row["layer"] for row in json.loads((run_folder(cfg) / "initialization.json").read_text())} == {
        *(f"layer{index}" for index in range(1, 5)), "output"
    }  # fmt: skip


def written_out(cfg):
    """Losses of every step and of the validation part, by a loop of its own; what is recorded of gradients."""
    from bipolar.seeding import derive_seed, seed_everything

    seed_everything(derive_seed(cfg.seed, "global"), deterministic=False)
    batches = build.batches(cfg, build.arrays(cfg), torch.device("cpu"))
    model = build.network(cfg, batches.input_shape, batches.classes)
    torch.manual_seed(derive_seed(cfg.seed, "weights"))
    build.initialization(cfg)(model, batches.sample(1))
    torch.manual_seed(derive_seed(cfg.seed, "training"))
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.optimizer.lr, betas=tuple(cfg.optimizer.betas))
    train, valid, gradient_norms = [], [], []
    text, part = batches.splits["train"].long(), batches.splits["valid"].long()
    length = (len(text) - 1) // 8
    streams = text[: 8 * length].view(8, length), text[1 : 8 * length + 1].view(8, length)
    for step in range(cfg.trainer.max_steps):
        place = 10 * (step % 5)
        if place == 0:
            state = torch.zeros(4, 8, 16)
        x, y = (stream[:, place : place + 10] for stream in streams)
        logits, state = model(x, state)
        state = state.detach()
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        gradient_norms.append([gradient.norm().item() for gradient in model.stack.weight.grad])
        if cfg.trainer.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), cfg.trainer.grad_clip)
        optimizer.step()
        train.append(loss.item())
        if step % 5 == 4 or step == cfg.trainer.max_steps - 1:
            model.eval()
            length = (len(part) - 1) // 8
            end = 8 * length
            with torch.no_grad():
                logits, _ = model(part[:end].view(8, length))
            valid.append(F.cross_entropy(logits.flatten(0, 1), part[1 : end + 1]).item())
            model.train()
    return train, valid, gradient_norms


@pytest.mark.parametrize("options", [["trainer.grad_clip=0.05"], ["network.skip=0.3", "network.dropout=0.2"]], ids=str)
def test_a_run_against_a_loop_written_out(make_config, options):
    """The state is carried from step to step and starts from zeros in every epoch; evaluation reads a part as one."""
    cfg = make_config(
        "activation=belu", "trainer.statistics_every=1", "optimizer.lr=0.01", "scheduler=constant", *options
    )
    run(cfg)
    train, valid, gradient_norms = written_out(cfg)
    assert train[10] < train[0] - 0.3  # the same characters, in the third epoch
    of = lambda split: [row["loss"] for row in lines(cfg) if row["split"] == split]
    assert of("train") == pytest.approx(train, rel=1e-5)
    assert of("valid") == pytest.approx(valid, rel=1e-5)
    recorded = [row["gradient_norm"] for row in lines(cfg, "activations.jsonl") if row["step"] < 12]
    assert recorded == pytest.approx([norm for norms in gradient_norms for norm in norms], rel=1e-3)


def test_what_was_carried_matters(make_config):
    """So that the test above does see it."""
    cfg = make_config("activation=belu")
    run(cfg)
    batches = build.batches(cfg, build.arrays(cfg), torch.device("cpu"))
    assert batches.steps_per_epoch == 5
    model = build.network(cfg, batches.input_shape, batches.classes)
    model.load_state_dict(saved(cfg)["model"])
    first, second = itertools.islice(batches.train(0), 2)
    _, state = model.eval()(first[0])
    carried, fresh = (loss_of(model(second[0], each)[0], second[1]).item() for each in (state, None))
    assert abs(carried - fresh) > 1e-4


MASKS, PARTS = ["network.dropout=0.2", "network.skip=0.2"], ["optimizer=adamw", "trainer.accumulate=3"]


@pytest.mark.parametrize(
    ("options", "cuts"), [(MASKS, [1]), (MASKS, [5]), (MASKS, [3, 1, 1, 2, 4]), (PARTS, [7])], ids=str
)
def test_interrupted_and_resumed(make_config, tmp_path, options, cuts):
    cfg = make_config("activation=brelu", *options)
    done = 0
    for steps in cuts:
        done += steps
        assert run(cfg, StopAfter(steps))["steps"] == done
        torch.manual_seed(done)  # another job in the same process
    assert run(cfg)["status"] == "finished"
    reference = make_config("activation=brelu", *options, f"output_root={tmp_path}/reference")
    run(reference)
    assert metrics(cfg) == metrics(reference)
    assert lines(cfg, "activations.jsonl") == lines(reference, "activations.jsonl")
    mine, wanted = saved(cfg), saved(reference)
    assert torch.equal(mine["state"], wanted["state"])
    assert mine["samples_seen"] == wanted["samples_seen"] == 12 * 80
    assert all(torch.equal(value, mine["model"][name]) for name, value in wanted["model"].items())


@pytest.mark.parametrize(
    "options",
    [
        ["activation=brelu", "trainer.grad_clip=0.1", "network.dropout=0.2"],
        ["activation=belu", "init=lsuv", "init.variant=authors", "activation.pattern=halves", "network.engine=loop"],
        ["activation=belu", "network.embedding=learned", "network.tied=true", "trainer.accumulate=2"],
    ],
    ids=["clipped", "lsuv", "tied"],
)
def test_a_run_of_the_twin_has_exactly_the_same_loss_curve(make_config, options):
    mine, twins = (make_config(f"twin={twin}", *options) for twin in ("false", "true"))
    for cfg in (mine, twins):
        assert run(cfg)["status"] == "finished"
    assert metrics(mine) == metrics(twins)
    gradient_norms = [
        [row["gradient_norm"] for row in lines(cfg, "activations.jsonl") if row["step"] == 0] for cfg in (mine, twins)
    ]
    assert gradient_norms[0] == pytest.approx(gradient_norms[1], rel=1e-5)


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulation_gives_nearly_the_same(make_config, parts):
    off = ["network.dropout=0", "network.recurrent_dropout=0", "network.skip=0", "optimizer=sgd"]
    whole, cut = make_config(*off), make_config(*off, f"trainer.accumulate={parts}")
    for cfg in (whole, cut):
        run(cfg)
    mine, wanted = ([row["loss"] for row in lines(cfg)] for cfg in (cut, whole))
    assert mine == pytest.approx(wanted, rel=1e-4)
    assert_close(saved(cut)["state"], saved(whole)["state"], rtol=1e-3, atol=1e-4)  # of the streams in their order


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_trains(make_config, precision):
    cfg, exact = make_config(f"trainer.precision={precision}"), make_config()
    for each in (cfg, exact):
        assert run(each)["status"] == "finished"
    mine, wanted = ([row["loss"] for row in lines(each)] for each in (cfg, exact))
    assert mine == pytest.approx(wanted, rel=0.1)


def test_a_run_says_which_text_it_read(make_config, tmp_path, story):
    other = tmp_path / "other.txt"
    other.write_text(story.read_text(encoding="utf-8").replace("river", "brook"), encoding="utf-8")
    runs = [make_config("trainer.max_steps=0"), make_config("trainer.max_steps=0", f"dataset.path={other}")]
    for cfg in runs:
        run(cfg)
    first, second = (json.loads((run_folder(cfg) / "environment.json").read_text())["text"] for cfg in runs)
    assert first["vocabulary"] == "".join(sorted(set(story.read_text(encoding="utf-8"))))
    assert first["digest"] != second["digest"]


def test_nothing_is_written_where_the_text_is_missing(make_config, tmp_path):
    from bipolar.errors import DataError

    missing = Path(tmp_path, "missing.txt")
    with pytest.raises(DataError, match=r"there is no such file"):
        run(make_config(f"dataset.path={missing}"))
    assert not (tmp_path / "outputs").exists() or not any((tmp_path / "outputs").rglob("*.jsonl"))
