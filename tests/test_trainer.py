"""Tests of bipolar/trainer.py, most of them on whole runs: the records are held against loops written out here."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, compose
from torch.utils._python_dispatch import TorchDispatchMode

from bipolar import build, checkpoint, sweep
from bipolar.data.batches import Batches
from bipolar.errors import ConfigError
from bipolar.recording.folder import FileRecorder, write_json
from bipolar.run import run
from bipolar.runs import read_run, run_folder
from bipolar.seeding import derive_seed
from bipolar.statistics import FIELDS
from bipolar.trainer import Trainer, TrainerOptions

CPU = torch.device("cpu")
STEPS_PER_EPOCH, STEPS = 8, 16  # of tiny_config


@pytest.fixture
def cnn_config(tmp_path):
    """As tiny_config, a small convolutional network, smooth: no rounding error tips a maximum over."""
    base = [option for option in TINY if not option.startswith(("network.", "dataset.shape"))]
    small = ["network=cnn", "network.widths=[4,6]", "network.pool=average", "dataset.shape=[2,6,6]"]
    return lambda *overrides: compose(*base, *small, f"output_root={tmp_path}/outputs", *overrides)


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def lines(folder, name="metrics.jsonl"):
    return [strict_json(line) for line in (folder / name).read_text().splitlines()]


def train(cfg):
    """Run `cfg`; returns its summary, its metrics by split and its activations."""
    summary = run(cfg)
    metrics = defaultdict(list)
    for record in lines(run_folder(cfg)):
        metrics[record["split"]].append(record)
    return summary, metrics, lines(run_folder(cfg), "activations.jsonl")


def records(cfg):
    """All that a run recorded but for its speed, as text."""
    run(cfg)
    metrics = lines(run_folder(cfg))
    for record in metrics:
        record.pop("images_per_second", None)
    return json.dumps(metrics), (run_folder(cfg) / "activations.jsonl").read_text()


def column(rows, key):
    return [row[key] for row in rows]


def numbers(rows, key):
    """A column in which NaN stands for what there is none of."""
    return [math.nan if value is None else value for value in column(rows, key)]


def without_gradients(rows):
    """Those of `activations.jsonl` as of a network of which no gradients were computed."""
    return [{**row, "gradient_norm": None} for row in rows]


def initial(cfg):
    """The network and the batches that a run starts from."""
    batches = build.batches(cfg, build.arrays(cfg), CPU)
    model = build.network(cfg, batches.input_shape, batches.classes)
    torch.manual_seed(derive_seed(cfg.seed, "weights"))
    build.initialization(cfg)(model, batches.sample(build.init_samples(cfg)))
    return model, batches


def final_weights(cfg):
    return torch.load(run_folder(cfg) / "checkpoint.pt", weights_only=True)["model"]


@contextmanager
def trainer_for(cfg, folder, kind=Trainer, batches_kind=Batches, loggers=()):
    """A trainer as run() makes it."""
    model, batches = initial(cfg)
    batches.__class__ = batches_kind
    folder.mkdir(parents=True, exist_ok=True)
    with FileRecorder(folder) as files:
        yield kind(
            model,
            batches,
            build.optimizer(cfg, model),
            build.schedule(cfg),
            build.trainer_options(cfg),
            precision="float32",
            files=files,
            loggers=list(loggers),
            checkpoint_path=folder / "checkpoint.pt",
        )


# -- against a loop written out --------------------------------------------------------------------------------------


def sgd(parameter, gradient, memory, rate, options):
    gradient = gradient + options.weight_decay * parameter
    memory["velocity"] = options.momentum * memory.get("velocity", 0) + gradient
    direction = gradient + options.momentum * memory["velocity"] if options.nesterov else memory["velocity"]
    parameter -= rate * direction


def adamw(parameter, gradient, memory, rate, options):
    beta1, beta2 = options.betas
    memory["n"] = memory.get("n", 0) + 1
    memory["m"] = beta1 * memory.get("m", 0) + (1 - beta1) * gradient
    memory["v"] = beta2 * memory.get("v", 0) + (1 - beta2) * gradient**2
    m, v = memory["m"] / (1 - beta1 ** memory["n"]), memory["v"] / (1 - beta2 ** memory["n"])
    parameter -= rate * (m / (v.sqrt() + options.eps) + options.weight_decay * parameter)


def cosine_after_warmup(step, total, warmup=5):
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def reference(cfg, update, factor):
    """Final weights, and loss, error and learning rate of every step."""
    model, batches = initial(cfg)
    parameters = list(model.parameters())
    memories = [{} for _ in parameters]
    total = cfg.trainer.epochs * batches.steps_per_epoch
    history = []
    for epoch in range(cfg.trainer.epochs):
        for inputs, targets in batches.train(epoch):
            rate = cfg.optimizer.lr * factor(len(history), total)
            logits = model(inputs)
            loss = -logits.log_softmax(1)[torch.arange(len(targets)), targets].mean()
            gradients = torch.autograd.grad(loss, parameters)
            if cfg.trainer.grad_clip is not None:
                norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
                gradients = [g * min(1, cfg.trainer.grad_clip / norm) for g in gradients]
            with torch.no_grad():
                for parameter, gradient, memory in zip(parameters, gradients, memories, strict=True):
                    update(parameter, gradient, memory, rate, cfg.optimizer)
            history.append((loss.item(), (logits.argmax(1) != targets).double().mean().item(), rate))
    return dict(model.named_parameters()), history


SGD = ["optimizer=sgd", "optimizer.weight_decay=0.01", "scheduler=cosine", "scheduler.warmup_steps=5"]
ADAMW = ["optimizer=adamw", "optimizer.lr=0.01", "scheduler=cosine", "scheduler.warmup_steps=5"]


@pytest.mark.parametrize(
    ("overrides", "update"),
    [
        pytest.param([*SGD, "optimizer.nesterov=true"], sgd, id="nesterov"),
        pytest.param([*SGD, "optimizer.nesterov=false"], sgd, id="momentum"),
        pytest.param([*SGD, "trainer.grad_clip=0.3"], sgd, id="sgd-clipped"),
        pytest.param([*ADAMW, "trainer.grad_clip=0.3"], adamw, id="adamw-clipped"),
    ],
)
@pytest.mark.parametrize("config", ["tiny_config", "cnn_config"])
def test_run_equals_a_loop_written_out(request, config, overrides, update):
    cfg = request.getfixturevalue(config)(*overrides, "trainer.epochs=5", "trainer.log_every=3")
    weights, history = reference(cfg, update, cosine_after_warmup)
    _, metrics, _ = train(cfg)

    found = final_weights(cfg)
    assert list(found) == list(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(
            found[name], weight.detach(), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    ends = [record["step"] for record in metrics["train"]]
    assert ends == [3, 6, 8, 9, 12, 15, 16, 18, 21, 24, 27, 30, 32, 33, 36, 39, 40]
    for start, record in zip([0, *ends], metrics["train"], strict=False):
        losses, errors, rates = zip(*history[start : record["step"]], strict=True)
        assert record["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert record["error"] == pytest.approx(np.mean(errors), rel=1e-6)
        assert record["learning_rate"] == pytest.approx(rates[-1], rel=1e-12)


@pytest.mark.parametrize("parts", [4, 5])
@pytest.mark.parametrize("config", ["tiny_config", "cnn_config"])
def test_accumulation_changes_nothing(request, config, parts):
    """Neither the updates nor the records: the statistics are those of the whole batch."""
    make = request.getfixturevalue(config)
    whole, split = make("trainer.accumulate=1"), make(f"trainer.accumulate={parts}")
    (_, metrics, activations), (_, split_metrics, split_activations) = train(whole), train(split)
    for (name, a), b in zip(final_weights(whole).items(), final_weights(split).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("train", "valid", "test"):
        assert column(split_metrics[name], "step") == column(metrics[name], "step")
        assert column(split_metrics[name], "loss") == pytest.approx(column(metrics[name], "loss"), rel=1e-4)
    assert column(split_activations, "step") == column(activations, "step")
    for field in FIELDS:
        wanted = pytest.approx(numbers(activations, field), rel=1e-3, abs=1e-5, nan_ok=True)
        assert numbers(split_activations, field) == wanted


# -- how long and when -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"), [(2, "null", 16), (2, 5, 5), ("null", 11, 11), (1, 20, 20), (3, 24, 24)]
)
def test_number_of_steps(tiny_config, epochs, max_steps, steps):
    summary, metrics, _ = train(tiny_config(f"trainer.epochs={epochs}", f"trainer.max_steps={max_steps}"))
    assert (summary["status"], summary["steps"], summary["total_steps"]) == ("finished", steps, steps)
    assert metrics["train"][-1]["step"] == steps
    assert metrics["train"][-1]["epoch"] == steps / STEPS_PER_EPOCH


def test_no_steps_measures_the_network_as_initialised(tiny_config):
    cfg = tiny_config("trainer.max_steps=0")
    summary, metrics, activations = train(cfg)
    assert summary["status"] == "finished"
    assert {split: column(rows, "step") for split, rows in metrics.items()} == {"valid": [0], "test": [0]}
    assert column(activations, "layer") == ["layer1", "layer2"]
    for name, weight in initial(cfg)[0].state_dict().items():
        assert torch.equal(final_weights(cfg)[name], weight)
    assert activations == without_gradients(train(tiny_config())[2][:2])  # step 0 of a longer run


@pytest.mark.parametrize("evaluate_every", ["null", 1, 3, 5, 16, 100])
@pytest.mark.parametrize("log_every", [1, 3, 16, 100])
def test_steps_of_the_metrics(tiny_config, evaluate_every, log_every):
    _, metrics, _ = train(tiny_config(f"trainer.evaluate_every={evaluate_every}", f"trainer.log_every={log_every}"))
    every = STEPS_PER_EPOCH if evaluate_every == "null" else evaluate_every
    valid = sorted({*range(every, STEPS + 1, every), STEPS})
    assert column(metrics["valid"], "step") == valid
    assert column(metrics["train"], "step") == sorted({*range(log_every, STEPS + 1, log_every), *valid})
    assert column(metrics["test"], "step") == [STEPS]


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (1, list(range(41))),
        (7, [0, 7, 14, 21, 28, 35, 40]),
        (40, [0, 40]),
        (100, [0, 40]),
        (0, [40]),
        ("log", [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40]),
    ],
)
@pytest.mark.parametrize("log_every", [1, 6])
def test_steps_of_the_statistics(tiny_config, every, steps, log_every):
    options = ["trainer.epochs=5", f"trainer.statistics_every={every}", f"trainer.log_every={log_every}"]
    _, _, activations = train(tiny_config(*options))
    assert [(row["step"], row["layer"], row["index"]) for row in activations] == [
        (step, f"layer{index}", index) for step in steps for index in (1, 2)
    ]
    assert column(activations, "epoch") == [row["step"] / STEPS_PER_EPOCH for row in activations]


def layer_means(model, inputs):
    """Mean of every hidden layer of an MLP, and of its input."""
    after, before = [], []
    x = inputs.flatten(1)
    for block in model.hidden:
        before.append(block.linear(x))
        x = block.activation(before[-1])
        after.append(x)
    return [x.mean().item() for x in after], [x.mean().item() for x in before]


def test_statistics_are_of_the_weights_before_and_after_the_training(tiny_config):
    cfg = tiny_config()
    _, _, activations = train(cfg)
    model, batches = initial(cfg)
    for epoch, step in ((0, 0), (2, STEPS)):  # at the end, of the batch that would be next
        inputs, _ = next(batches.train(epoch))
        means, pre_means = layer_means(model, inputs)
        rows = [row for row in activations if row["step"] == step]
        assert column(rows, "mean") == pytest.approx(means, rel=1e-5)
        assert column(rows, "pre_mean") == pytest.approx(pre_means, rel=1e-5)
        model.load_state_dict(final_weights(cfg))


@pytest.mark.parametrize(
    ("scheduler", "factor"),
    [
        (["scheduler=constant"], lambda s: 1),
        (["scheduler=linear", "scheduler.final=0.2"], lambda s: 1 - 0.8 * s / 16),
        (["scheduler=step", "scheduler.milestones=[0.5,0.75]"], lambda s: 1 if s < 8 else 0.1 if s < 12 else 0.01),
        (["scheduler=cosine", "scheduler.warmup_steps=5"], lambda s: cosine_after_warmup(s, 16)),
    ],
    ids=["constant", "linear", "step", "cosine"],
)
def test_learning_rate_column(tiny_config, scheduler, factor):
    _, metrics, _ = train(tiny_config(*scheduler, "trainer.log_every=1"))
    assert column(metrics["train"], "learning_rate") == pytest.approx([0.05 * factor(step) for step in range(STEPS)])


@pytest.mark.parametrize("patience", [1, 2])
def test_plateau_lowers_the_rate_when_the_validation_loss_does_not_fall(tiny_config, patience):
    options = ["scheduler=plateau", f"scheduler.patience={patience}", "trainer.evaluate_every=2", "trainer.log_every=1"]
    cfg = tiny_config(*options, "trainer.epochs=4", "dataset.separation=0", "optimizer.lr=0.5")
    run(cfg)
    rate, best, waited = 0.5, math.inf, 0
    for record in lines(run_folder(cfg)):
        if record["split"] == "train":
            assert record["learning_rate"] == rate
        elif record["split"] == "valid":
            waited = 0 if record["loss"] < best else waited + 1
            best = min(best, record["loss"])
            if waited == patience:
                rate, waited = rate / 2, 0
    assert rate < 0.5  # there was something to react to


# -- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_evaluation_is_of_the_whole_split(tiny_config, norm):
    cfg = tiny_config(f"network.norm={norm}", "network.dropout=0.3", "dataset.test_samples=2500")
    summary, metrics, _ = train(cfg)
    model, batches = initial(cfg)
    model.load_state_dict(final_weights(cfg))
    model.double().eval()
    for split in ("valid", "test"):
        inputs, targets = batches.splits[split].inputs.double(), batches.splits[split].targets
        with torch.no_grad():
            logits = model(inputs)
        record = metrics[split][-1]
        assert record["loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
        assert record["error"] == pytest.approx((logits.argmax(1) != targets).double().mean().item(), abs=1e-6)
        assert summary["final"][f"{split}_loss"] == record["loss"]
    assert summary["best"]["valid_loss"] == min(column(metrics["valid"], "loss"))


class CountedBatches(Batches):
    asked: ClassVar[list[tuple[str, str]]]

    def evaluation(self, name, batch_size=1024):
        self.asked.append(("evaluation", name))
        return super().evaluation(name, batch_size)

    def train(self, epoch, first_step=0):
        self.asked.append(("train", f"{epoch}"))
        return super().train(epoch, first_step)


def test_test_split_is_read_once_at_the_end(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(CountedBatches, "asked", asked := [], raising=False)
    with trainer_for(tiny_config(), tmp_path / "run", batches_kind=CountedBatches) as trainer:
        assert trainer.fit() == ("finished", None)
    assert asked == [
        ("train", "0"),
        ("evaluation", "valid"),
        ("train", "1"),
        ("evaluation", "valid"),
        ("evaluation", "test"),
        ("train", "2"),  # the statistics of the trained network
    ]


def test_evaluation_is_not_counted_in_the_statistics(tiny_config, tmp_path):
    tables = []
    for evaluate in (False, True):
        with trainer_for(tiny_config("trainer.statistics_every=1"), tmp_path / f"{evaluate}") as trainer:
            batches = list(trainer.batches.train(0))
            for batch in batches[:3]:
                if evaluate:
                    trainer.evaluate("valid")
                trainer.train_step(batch)
            tables.append(trainer.pending)
    for (step, table), (other_step, other) in zip(*tables, strict=True):
        assert step == other_step
        assert torch.equal(table, other)


class RecordingLogger:
    def __init__(self):
        self.seen = {"metrics": [], "activations": []}

    def start(self, info): ...

    def finish(self, status, summary): ...

    def metrics(self, record):
        self.seen["metrics"].append(record)

    def activations(self, records):
        self.seen["activations"] += records


def test_loggers_see_what_the_files_hold(tiny_config, tmp_path):
    logger = RecordingLogger()
    with trainer_for(tiny_config(), tmp_path / "run", loggers=[logger]) as trainer:
        trainer.fit()
    assert logger.seen["metrics"] == lines(tmp_path / "run")
    seen = [
        {key: None if value != value else value for key, value in row.items()} for row in logger.seen["activations"]
    ]
    assert seen == lines(tmp_path / "run", "activations.jsonl")


# -- divergence and precision ----------------------------------------------------------------------------------------


def strict_folder(folder):
    """Every JSON file of a run folder, strictly valid."""
    for path in [*folder.glob("*.json"), *folder.glob("*.jsonl")]:
        text = path.read_text()
        for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
            strict_json(part)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("options", "last"), [([], ("train", 2)), (["trainer.evaluate_every=1"], ("valid", 1))])
def test_divergence_is_a_result(tiny_config, precision, options, last):
    cfg = tiny_config("optimizer.lr=1e30", f"trainer.precision={precision}", *options)
    summary = run(cfg)
    folder = run_folder(cfg)
    strict_folder(folder)
    assert summary["status"] == json.loads((folder / "summary.json").read_text())["status"] == "diverged"
    metrics = lines(folder)
    assert (metrics[-1]["split"], metrics[-1]["step"]) == last
    assert metrics[-1]["loss"] is None
    assert "test" not in column(metrics, "split")
    first = [row for row in lines(folder, "activations.jsonl") if row["step"] == 0]
    assert len(first) == 2
    assert all(row[field] is not None for row in first for field in FIELDS)
    assert run(cfg)["skipped"]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lower_precision_trains_alike(tiny_config, precision, accumulate):
    _, exact, _ = train(tiny_config("trainer.grad_clip=0.5"))
    options = [f"trainer.precision={precision}", f"trainer.accumulate={accumulate}", "trainer.grad_clip=0.5"]
    cfg = tiny_config(*options)
    summary, metrics, activations = train(cfg)
    assert summary["status"] == "finished"
    assert read_run(run_folder(cfg)).environment["precision"] == precision
    for split in ("train", "valid", "test"):
        assert column(metrics[split], "loss") == pytest.approx(column(exact[split], "loss"), rel=0.05)
        assert column(metrics[split], "loss") != column(exact[split], "loss")
    missing = {(row["step"], key) for row in activations for key, value in row.items() if value is None}
    assert missing == {(STEPS, "gradient_norm")}  # the last is measured without a backward pass
    assert all(weight.dtype == torch.float32 for weight in final_weights(cfg).values())


# -- the same figures again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", ["true", "false"])
@pytest.mark.parametrize("config", ["tiny_config", "cnn_config"])
def test_two_runs_are_identical(request, tmp_path, config, deterministic):
    options = ["network.dropout=0.2", f"trainer.deterministic={deterministic}"]
    make = request.getfixturevalue(config)
    first, second = (records(make(*options, f"output_root={tmp_path}/{n}")) for n in range(2))
    assert first == second
    assert torch.are_deterministic_algorithms_enabled() == (deterministic == "true")


class ProbeReLU(torch.nn.ReLU):
    """Notes the state of the generator that dropout draws from."""

    states: ClassVar[list[torch.Tensor]]

    def forward(self, x):
        if x.requires_grad and not x.is_meta:
            self.states.append(torch.get_rng_state())
        return super().forward(x)


def test_dropout_does_not_depend_on_how_many_weights_were_drawn(tiny_config, monkeypatch):
    states = []
    for option in ("init=he", "init=lsuv", "network.width=24"):
        monkeypatch.setattr(ProbeReLU, "states", [], raising=False)
        run(tiny_config(option, "activation=relu", f"activation._target_={__name__}.ProbeReLU"))
        states.append(ProbeReLU.states[0])
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


@pytest.mark.parametrize(
    "leave",
    [
        pytest.param(lambda: seed_all(7), id="seeds"),
        pytest.param(lambda: torch.set_default_dtype(torch.float64), id="default_dtype"),
        pytest.param(lambda: torch.use_deterministic_algorithms(True), id="deterministic"),
        pytest.param(lambda: torch.set_num_threads(2), id="threads"),
        pytest.param(lambda: torch.set_float32_matmul_precision("medium"), id="matmul_precision"),
    ],
)
def test_what_an_earlier_job_left_does_not_count(tiny_config, tmp_path, leave):
    wanted = records(tiny_config("network.dropout=0.2", f"output_root={tmp_path}/clean"))
    leave()
    assert records(tiny_config("network.dropout=0.2", f"output_root={tmp_path}/after")) == wanted


def test_a_run_leaves_the_next_one_alone(tiny_config, tmp_path):
    wanted = records(tiny_config(f"output_root={tmp_path}/clean"))
    options = ["trainer.deterministic=true", "trainer.precision=bfloat16", "network.dropout=0.5", "trainer.threads=2"]
    run(tiny_config(*options))
    assert records(tiny_config(f"output_root={tmp_path}/after")) == wanted


def test_seeds_give_different_curves(tiny_config):
    curves = [column(train(tiny_config(f"seed={seed}"))[1]["train"], "loss") for seed in range(3)]
    assert all(curves[i][k] != curves[j][k] for i, j in ((0, 1), (0, 2), (1, 2)) for k in range(len(curves[0])))


class WatchedTrainer(Trainer):
    def fit(self):
        self.seen = []
        return super().fit()

    def train_step(self, batch):
        self.seen.append(batch)
        super().train_step(batch)


def test_every_activation_sees_the_same_batches(tmp_path):
    """Of augmented images, with dropout drawing from the global generator in between."""
    seen = []
    options = [option for option in TINY if not option.startswith("dataset")]
    options += ["dataset=digits", "dataset.train_size=96", "dataset.augment={crop: 2, flip: true}"]
    for activation, dropout in (("relu", 0.0), ("belu", 0.5), ("tanh", 0.2)):
        cfg = sweep.compose([*options, f"activation={activation}", f"network.dropout={dropout}"])
        with trainer_for(cfg, tmp_path / activation, WatchedTrainer) as trainer:
            trainer.fit()
        seen.append(trainer.seen)
    assert len(seen[0]) == 6
    for others in seen[1:]:
        for (inputs, targets), (other_inputs, other_targets) in zip(seen[0], others, strict=True):
            assert torch.equal(inputs, other_inputs)
            assert torch.equal(targets, other_targets)
    assert not torch.equal(seen[0][0][0], seen[0][3][0])  # the next epoch is in another order


# -- speed -----------------------------------------------------------------------------------------------------------


class NoSynchronisation(TorchDispatchMode):
    """Fails wherever the host would wait for the device: .item(), bool(), a shape that depends on values."""

    WAITING = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in self.WAITING, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


def test_no_synchronisation_is_noticed():
    with NoSynchronisation(), pytest.raises(AssertionError, match="waits"):
        torch.ones(2).sum().item()
    with NoSynchronisation(), pytest.raises(AssertionError, match="waits"):
        bool(torch.ones(1) > 0)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("config", ["tiny_config", "cnn_config"])
def test_a_training_step_does_not_wait_for_the_device(request, tmp_path, config, accumulate):
    options = ["trainer.grad_clip=0.1", f"trainer.accumulate={accumulate}", "network.dropout=0.1"]
    cfg = request.getfixturevalue(config)(*options, "trainer.statistics_every=2")
    with trainer_for(cfg, tmp_path / "run") as trainer:
        batches = list(trainer.batches.train(0))
        before = [parameter.clone() for parameter in trainer.model.parameters()]
        with NoSynchronisation():
            for batch in batches[:3]:
                trainer.train_step(batch)
        assert [step for step, _ in trainer.pending] == [0, 2]
        assert trainer.step == 3
        assert not any(map(torch.equal, before, trainer.model.parameters()))


def test_images_per_second(tiny_config):
    summary, metrics, _ = train(tiny_config("trainer.log_every=3"))
    assert summary["images_per_second"] * summary["training_seconds"] == pytest.approx(32 * STEPS)
    steps = np.diff([0, *column(metrics["train"], "step")])
    seconds = 32 * steps / column(metrics["train"], "images_per_second")
    assert (seconds > 0).all()
    assert seconds.sum() <= summary["training_seconds"] <= summary["wall_seconds"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
class TestCompiled:
    def test_equals_eager(self, tiny_config):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        (_, eager, eager_activations), (summary, metrics, activations) = (
            train(tiny_config(f"trainer.compile={compiled}", "trainer.statistics_every=2"))
            for compiled in ("false", "true")
        )
        assert summary["status"] == "finished"
        assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # it did compile
        for split in ("train", "valid", "test"):
            assert column(metrics[split], "loss") == pytest.approx(column(eager[split], "loss"), rel=1e-4)
        assert column(activations, "step") == column(eager_activations, "step")
        for field in FIELDS:
            wanted = pytest.approx(numbers(eager_activations, field), rel=1e-3, abs=1e-4, nan_ok=True)
            assert numbers(activations, field) == wanted

    def test_many_different_runs_in_one_process_are_all_compiled(self, tiny_config):
        """A sweep: torch.compile gives up on a function after so many variants, unless each run starts afresh."""
        torch._dynamo.reset()
        options = ["trainer.compile=true", "trainer.max_steps=2", "trainer.statistics_every=2", "network.depth=1"]
        variants = 2  # that one run needs: steps with and without statistics
        with torch._dynamo.config.patch(recompile_limit=variants, fail_on_recompile_limit_hit=True):
            for width in (4, 5):
                assert run(tiny_config(*options, f"network.width={width}"))["status"] == "finished"


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": None}, "epochs and max_steps"),
        ({"epochs": -1}, "epochs=-1"),
        ({"max_steps": 1.5}, "max_steps=1.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 4, "accumulate": 5}, "accumulate=5.*4 samples"),
        ({"log_every": 0}, "log_every=0"),
        ({"evaluate_every": 0}, "evaluate_every=0"),
        ({"statistics_every": "often"}, "statistics_every='often'"),
        ({"statistics_every": -1}, "statistics_every=-1"),
        ({"grad_clip": 0}, "grad_clip=0"),
        ({"max_minutes": -1}, "max_minutes=-1"),
        ({"checkpoint_minutes": math.nan}, "checkpoint_minutes=nan"),
        ({"compile": "yes"}, "compile='yes'"),
        ({"precision": "bfloat"}, "did you mean 'bfloat16'"),
        ({"device": "gpu"}, "choose from auto, cpu"),
        ({"threads": True}, "threads=True"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainerOptions(**options)


def test_nothing_is_written_for_a_wrong_value(tiny_config):
    cfg = tiny_config("trainer.accumulate=33")
    with pytest.raises(ConfigError, match=r"trainer\.accumulate=33"):
        run(cfg)
    assert not Path(cfg.output_root).exists()


# -- what a review found ---------------------------------------------------------------------------------------------


def test_an_untrained_network_that_is_not_finite_has_diverged(tiny_config):
    summary, metrics, activations = train(tiny_config("trainer.max_steps=0", "init.weight_mean=1e30"))
    assert summary["status"] == "diverged"
    assert metrics["valid"][0]["loss"] is None
    assert summary["best"] == {}
    assert activations


def test_wall_seconds_count_all_parts_of_an_interrupted_run(tiny_config):
    cfg = tiny_config("trainer.max_minutes=1e-9")
    spent = []
    while (summary := run(cfg))["status"] == "interrupted":
        spent.append(summary["wall_seconds"])
    assert len(spent) > 3
    assert spent == sorted(spent)
    assert summary["wall_seconds"] >= max(spent[-1], summary["training_seconds"])


def test_wall_seconds_count_what_an_interrupted_part_spent_after_its_checkpoint(tiny_config):
    cfg = tiny_config()
    summary = run(cfg, lambda: "test")
    write_json(run_folder(cfg) / "summary.json", {**summary, "wall_seconds": 1e6})  # as if closing the files took long
    assert run(cfg)["wall_seconds"] > 1e6


def test_wall_seconds_of_a_killed_run_are_those_of_its_checkpoint_and_more(tiny_config):
    cfg = tiny_config()
    run(cfg, lambda: "test")
    (run_folder(cfg) / "summary.json").unlink()
    saved = checkpoint.load(run_folder(cfg) / "checkpoint.pt")["wall_seconds"]
    assert saved < run(cfg)["wall_seconds"] < saved + 600


@pytest.mark.parametrize("channels_last", [True, False])
def test_channels_last_is_the_layout_of_images(channels_last):
    cfg = sweep.compose(["dataset=digits", f"trainer.channels_last={channels_last}"])
    batches = build.batches(cfg, build.arrays(cfg), torch.device("cpu"))
    # three channels, so that the two layouts differ
    inputs = batches._prepare(torch.zeros(4, 8, 8, 3, dtype=torch.uint8))
    assert inputs.is_contiguous() != channels_last
    assert inputs.is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ((), True),
        (("optimizer=adamw",), True),
        (("+optimizer.foreach=true",), None),
        (("+optimizer.fused=false",), False),
        (("optimizer._target_=torch.optim.Rprop", "~optimizer.momentum", "~optimizer.nesterov",
          "~optimizer.weight_decay"), None),
        # torch's fused SGD takes its first momentum from memory at random after a skipped step
        (("trainer.precision=float16",), None),
    ],
)  # fmt: skip
def test_all_weights_are_updated_in_one_call_where_that_can_be(tiny_config, options, fused):
    cfg = tiny_config(*options)
    made = build.optimizer(cfg, torch.nn.Linear(3, 2))
    assert made.param_groups[0].get("fused") is fused
