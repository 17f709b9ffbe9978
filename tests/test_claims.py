"""The claims' files: what each makes of runs whose figures are known, and that all of them keep the same form."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_runs import made_run

from bipolar.runs import Run
from bipolar.sweep import CONFIGS
from experiments import ORDER, claim_of
from experiments.analysis import training
from experiments.analysis.inference import CONTRADICTED, NO_DIFFERENCE, NOT_TESTED, SUPPORTED
from experiments.analysis.summaries import area, at_chosen_rate, chosen_rate, error, steps_to, where

STEPS = (10, 20, 50)


def trained(
    activation: str,
    seed: int,
    loss: float,
    *overrides: str,
    experiment: str = "quick/cnn",
    error: float = 0.5,
    valid_loss: float = 1.0,
    status: str = "finished",
) -> Run:
    """A run whose training loss falls from 2.5 to `loss` and stays there."""
    run = made_run(activation, seed, experiment, *overrides)
    losses = [2.5, loss, loss]
    metrics = [
        {"step": step, "epoch": 1.0, "split": "train", "loss": value, "error": 0.5, "learning_rate": 0.1}
        for step, value in zip(STEPS, losses, strict=True)
    ]
    metrics += [{"step": step, "epoch": 1.0, "split": "valid", "loss": valid_loss, "error": 0.5} for step in STEPS]
    figures = {"train_loss": loss, "valid_loss": valid_loss, "valid_error": 0.5, "test_error": error}
    summary = {**run.summary, "status": status, "final": figures}
    return replace(run, metrics=metrics, summary=summary, folder=Path(f"{run.folder}-{'-'.join(overrides)}"))


def grid(losses: dict[str, float], *overrides: str, seeds: int = 5, errors: float = 0.0, **options) -> list[Run]:
    """Runs of each activation around a training loss; `errors` follow the loss."""
    return [
        trained(name, seed, loss + 0.004 * seed, *overrides, error=0.5 + errors * (loss - 1) + 0.001 * seed, **options)
        for name, loss in losses.items()
        for seed in range(seeds)
    ]


SAME = {"relu": 1.0, "brelu": 1.0, "elu": 1.0, "belu": 1.0}
BETTER = {"relu": 1.0, "brelu": 0.5, "elu": 1.0, "belu": 0.5}
WORSE = {"relu": 0.5, "brelu": 1.0, "elu": 0.5, "belu": 1.0}


# --- figures of runs --------------------------------------------------------------------------------------------------


def test_area_is_the_mean_loss_over_updates():
    run = trained("relu", 0, 1.0)
    assert area(run) == pytest.approx((10 * 2.5 + 10 * 1.0 + 30 * 1.0) / 50)
    assert np.isnan(area(replace(run, metrics=[])))


def diverged(run: Run) -> Run:
    return replace(run, summary={**run.summary, "status": "diverged"})


def test_a_run_that_diverged_counts_as_guessing():
    run = diverged(trained("relu", 0, 1.0))
    assert area(run) == pytest.approx(np.log(10))
    assert error(run) == pytest.approx(90)
    hundred = diverged(trained("relu", 0, 1.0, "+dataset.classes=100"))
    assert area(hundred) == pytest.approx(np.log(100))
    assert error(hundred) == pytest.approx(99)
    assert error(trained("relu", 0, 1.0, error=0.25)) == 25


def test_steps_are_counted_to_the_first_record_below():
    run = trained("relu", 0, 1.0)
    assert steps_to(run, 2.5) == 10
    assert steps_to(run, 1.5) == 20
    assert np.isnan(steps_to(run, 0.9))


def test_rate_is_chosen_on_validation_alone_and_not_where_a_run_diverged():
    rates = {0.01: 0.9, 0.1: 0.8, 1.0: 0.1}
    runs = [
        trained("relu", seed, 1.0, f"optimizer.lr={rate}", valid_loss=loss + 0.01 * seed, error=1 - loss)
        for rate, loss in rates.items()
        for seed in (1, 0)
    ]
    lost = where(runs, optimizer__lr=1.0, seed=1)[0]
    runs[runs.index(lost)] = diverged(lost)
    assert chosen_rate(runs) == 0.1
    assert [run.seed for run in at_chosen_rate(runs)] == [0, 1]
    assert {run.config.optimizer.lr for run in at_chosen_rate(runs)} == {0.1}


def test_where_runs_diverge_at_every_rate_the_fewest_decide():
    runs = [
        trained("relu", seed, 1.0, f"optimizer.lr={rate}", valid_loss=rate) for rate in (0.1, 1) for seed in range(3)
    ]
    runs = [diverged(run) if run.seed <= (run.config.optimizer.lr == 0.1) else run for run in runs]
    assert chosen_rate(runs) == 1


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("losses", "verdict"), [(SAME, NO_DIFFERENCE), (BETTER, SUPPORTED), (WORSE, CONTRADICTED)])
@pytest.mark.parametrize("claim", ["cnn", "deep_mlp", "normalization"])
def test_verdict_follows_the_runs(claim, losses, verdict):
    module = importlib.import_module(f"experiments.{claim}")
    if claim == "deep_mlp":
        runs = [
            run
            for depth in (8, 16)
            for run in grid(losses, "network=mlp", f"network.depth={depth}", experiment="quick/deep_mlp")
        ]
    else:
        runs = grid(losses, "network.pool=max", errors=0.2, experiment=f"quick/{claim}")
        if claim == "normalization":
            base = dict.fromkeys(("relu", "elu"), 0.4)
            runs += grid(base, "network.norm=batch", "network.pool=max", experiment="quick/normalization")
    found = module.verdict(runs)
    assert found.verdict.startswith(verdict)
    assert len(found.primary) >= 4
    assert all(each.n == (5, 5) for each in found.primary)


def test_runs_that_diverged_speak_against_the_activation_that_lost_them():
    """They are not left out: the others of their group may be the best of all."""
    runs = grid({**SAME, "brelu": 0.5, "belu": 0.5}, "network.pool=max", errors=0.2)
    lost = [diverged(run) if run.activation in ("brelu", "belu") and run.seed < 4 else run for run in runs]
    (area_of_brelu, *_) = importlib.import_module("experiments.cnn").verdict(lost).primary
    assert area_of_brelu.n == (5, 5)
    assert area_of_brelu.estimate > 0
    everywhere = [diverged(run) if run.activation in ("relu", "elu") else run for run in runs]
    assert importlib.import_module("experiments.cnn").verdict(everywhere).verdict == SUPPORTED


def test_every_part_of_a_claim_is_looked_at():
    cnn = importlib.import_module("experiments.cnn")
    runs = grid(BETTER, "network.pool=max")
    parts = {
        "pools": grid(SAME, "network.pool=average", experiment="cpu/cnn-pools"),
        "bipolar_max": grid({"brelu": 1.0, "belu": 1.0}, "network.pool=bipolar_max", experiment="cpu/cnn-bipolar_max"),
        "he": grid(SAME, "network.pool=max", "init=he", experiment="cpu/cnn-he"),
        "twins": [replace(run, folder=Path(f"{run.folder}-twins")) for run in twins("max", 0.1, "cpu/cnn-twins")],
        "pilot": grid(SAME, "network.pool=max", experiment="cpu/cnn-pilot"),
    }
    named = {path.stem.partition("-")[2] for path in (CONFIGS / "experiment").glob("*/cnn*.yaml")}
    assert named == {"", *parts}
    alone = cnn.verdict(runs)
    for name, members in parts.items():
        changed = cnn.verdict(runs + members)
        assert changed.verdict == alone.verdict
        assert (changed.secondary, changed.reason) != (alone.secondary, alone.reason), name


def test_cifar100_has_no_say_in_a_claim_about_cifar10():
    resnet = importlib.import_module("experiments.resnet")
    names = ["relu", "brelu"]
    ten = grid({name: BETTER[name] for name in names}, "network=resnet", errors=0.2, experiment="paper/resnet")
    hundred = grid(
        {name: WORSE[name] for name in names}, "network=resnet", errors=0.2, experiment="paper/resnet-cifar100"
    )
    for run in hundred:
        run.options["dataset"]["name"] = "cifar100"
    found = resnet.verdict(ten + hundred)
    assert found.verdict == SUPPORTED
    assert len(found.primary) == 1
    assert any("cifar100" in each.name and each.estimate > 0 for each in found.secondary)


def test_without_a_need_for_normalization_none_is_alleviated():
    normalization = importlib.import_module("experiments.normalization")
    runs = grid(BETTER, "network.pool=max", errors=0.2)
    runs += grid({"relu": 1.5, "elu": 1.5}, "network.norm=batch", "network.pool=max")
    assert normalization.verdict(runs).verdict == NOT_TESTED


def test_every_activation_is_taken_at_its_own_best_rate():
    slow, fast = "optimizer.lr=0.01", "optimizer.lr=0.1"
    runs = grid({"relu": 1.0}, fast, valid_loss=0.5) + grid({"relu": 0.1}, slow, valid_loss=0.9)
    runs += grid({"brelu": 2.0}, fast, valid_loss=2.0) + grid({"brelu": 0.5}, slow, valid_loss=0.4)
    (found,) = training.against_base(runs, "", [training.area_effect])
    base, changed = (area(trained("relu", 0, loss)) for loss in (1.0, 0.5))
    assert found.estimate == pytest.approx(np.log(changed / base), abs=0.01)


def test_batch_axis_report_is_supported_by_a_higher_loss():
    module = importlib.import_module("experiments.batch_axis")
    losses = {"relu": 1.0, "brelu": 1.0, "batch_axis_relu": 1.5}
    assert module.verdict(grid(losses, experiment="quick/batch_axis")).verdict == SUPPORTED
    losses["batch_axis_relu"] = 0.5
    assert module.verdict(grid(losses, experiment="quick/batch_axis")).verdict == CONTRADICTED


def twins(pool: str, difference: float, experiment: str = "quick/symmetry", seeds: int = 3) -> list[Run]:
    return [
        trained("brelu", seed, 1.0 + twin * difference, f"network.pool={pool}", f"twin={str(bool(twin)).lower()}",
                experiment=experiment)
        for seed in range(seeds)
        for twin in (0, 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("symmetric", "broken", "verdict"),
    [(0.0, 0.1, SUPPORTED), (1e-16 * 4, 0.1, CONTRADICTED), (0.0, 0.0, CONTRADICTED)],
)
def test_symmetry_is_a_matter_of_the_last_bit(symmetric, broken, verdict):
    module = importlib.import_module("experiments.symmetry")
    runs = twins("stride", symmetric) + twins("max", broken)
    found = module.verdict(runs)
    assert found.verdict == verdict
    rows = {row["network"]: row for row in module.table(runs)}
    assert rows["strides"]["symmetric"] == "yes"
    assert rows["max pooling"]["symmetric"] == "no"
    assert (rows["strides"]["largest difference of losses (nats)"] == "0") == (symmetric == 0)
    assert module.verdict(twins("stride", 0.0)).verdict == NOT_TESTED


def test_twins_that_diverge_alike_are_equal_and_one_that_does_alone_is_not():
    module = importlib.import_module("experiments.symmetry")
    lose = lambda run: replace(run, metrics=[{**run.metrics[0], "loss": None}])
    both = [lose(run) for run in twins("stride", 0.0)]
    assert module.verdict(both + twins("max", 0.1)).verdict == SUPPORTED
    one = [lose(run) if run.config.twin and run.seed == 1 else run for run in twins("stride", 0.0)]
    assert module.verdict(one + twins("max", 0.1)).verdict == CONTRADICTED
    module.figure(one + twins("max", 0.1))


def through_layers(activation: str, seed: int, growth: float, *overrides: str) -> Run:
    """An untrained run of 100 layers whose second moment grows by a factor a layer."""
    run = made_run(activation, seed, "quick/stability", "network=mlp", "network.depth=100", *overrides)
    rows = [
        {"step": 0, "layer": f"layer{index}", "index": index, "mean": 0.0, "pre_mean": 0.0, "pre_variance": 1.0,
         "variance": growth**index * (1 + 0.01 * seed), "channel_mean_norm": 0.0, "zero_fraction": 0.0}
        for index in range(1, 101)
    ]  # fmt: skip
    return replace(run, activations=rows)


def test_stability_counts_layers_within_the_limits():
    module = importlib.import_module("experiments.stability")
    growths = {"relu": 2.0, "brelu": 1.0, "elu": 0.5, "belu": 1.0}
    runs = [
        through_layers(name, seed, growth, f"init.weight_mean={mean}")
        for mean in (0.0, 0.01)
        for name, growth in growths.items()
        for seed in range(3)
    ]
    counts = {run.activation: module.stable_layers(run) for run in runs if run.seed == 0}
    assert counts == {"relu": 9.0, "brelu": 100.0, "elu": 9.0, "belu": 100.0}  # 2^9 < 1,000 < 2^10
    assert {run.activation: module.fate(run) for run in runs} == {
        "relu": "explodes", "brelu": "settles", "elu": "vanishes", "belu": "settles"
    }  # fmt: skip
    assert module.verdict(runs).verdict == SUPPORTED
    assert module.verdict([run for run in runs if run.activation in ("relu", "elu")]).verdict == NOT_TESTED


def test_activations_that_overflowed_have_left_the_limits():
    module = importlib.import_module("experiments.stability")
    run = through_layers("relu", 0, 1.0)
    broken = replace(
        run, activations=[{**row, "variance": None} if row["index"] > 40 else row for row in run.activations]
    )
    assert module.stable_layers(broken) == 40
    assert module.fate(broken) == "explodes"


def one_layer(activation: str, seed: int, m: float, mean: float) -> Run:
    run = made_run(activation, seed, "quick/mean_shift", "network=mlp", f"+dataset.mean={m}")
    row = {"step": 0, "layer": "layer1", "index": 1, "mean": mean + 0.001 * seed, "variance": 1.0, "pre_mean": m}
    return replace(run, activations=[row])


@pytest.mark.parametrize(("factor", "verdict"), [(0.5, SUPPORTED), (1.0, NO_DIFFERENCE), (1.5, CONTRADICTED)])
def test_mean_shift_is_measured_against_the_inputs_mean(factor, verdict):
    module = importlib.import_module("experiments.mean_shift")
    runs = [
        one_layer(name, seed, m, factor * m if name.startswith("b") else 2.0)
        for name in SAME
        for m in (-1.0, 1.0)
        for seed in range(3)
    ]
    assert module.verdict(runs).verdict.startswith(verdict)


# --- the form that all claims have ------------------------------------------------------------------------------------


def test_every_claim_of_the_profiles_is_listed():
    found = {claim_of(path.stem) for path in (CONFIGS / "experiment").glob("*/*.yaml")}
    assert found == set(ORDER)


@pytest.mark.parametrize("claim", ORDER)
def test_claim_has_the_parts_that_a_report_needs(claim):
    module = importlib.import_module(f"experiments.{claim}")
    title, _, text = (module.__doc__ or "").partition("\n")
    assert title
    assert not title.endswith(".")
    assert "For the " in text
    assert "Against:" in text
    assert "mallest effect of interest" in module.RULE or claim == "symmetry"
    for function in (module.figure, module.table, *getattr(module, "more_figures", {}).values()):
        assert inspect.getdoc(function)


def test_titles_differ():
    titles = [(importlib.import_module(f"experiments.{claim}").__doc__ or "").split("\n")[0] for claim in ORDER]
    assert len(set(titles)) == len(ORDER)
