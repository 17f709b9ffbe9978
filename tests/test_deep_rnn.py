"""The claim about deep RNNs: what it makes of runs whose figures are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_runs import made_run
from test_claims import BETTER, SAME, WORSE, diverged, trained

from bipolar.runs import Run
from experiments import deep_rnn
from experiments.analysis.inference import CONTRADICTED, NO_DIFFERENCE, SUPPORTED
from experiments.analysis.summaries import area, classes
from experiments.reporting import records

TEXT = {"digest": "0", "vocabulary": "abcdefgh", "entropy": 2.8}


def rnn(activation: str, seed: int, loss: float, *overrides: str, bits: float = 2.0, part: str = "", **options) -> Run:
    experiment = "quick/deep_rnn" + (f"-{part}" if part else "")
    run = trained(activation, seed, loss, "network=rnn", "dataset=text", *overrides, experiment=experiment, **options)
    figures = {**run.summary["final"], "test_bits_per_character": bits}
    activations = [{**row, "gradient_norm": row["index"] if row["step"] == 0 else None} for row in run.activations]
    return replace(
        run,
        environment={**run.environment, "text": TEXT},
        summary={**run.summary, "final": figures},
        activations=activations,
    )


def grid(losses: dict[str, float], *overrides: str, **options) -> list[Run]:
    return [
        rnn(name, seed, loss + 0.004 * seed, f"network.layers={depth}", *overrides, bits=2 + loss / 10, **options)
        for depth in (4, 12)
        for name, loss in losses.items()
        for seed in range(5)
    ]


@pytest.mark.parametrize(("losses", "verdict"), [(SAME, NO_DIFFERENCE), (BETTER, SUPPORTED), (WORSE, CONTRADICTED)])
def test_verdict_follows_the_runs(losses: dict[str, float], verdict: str) -> None:
    found = deep_rnn.verdict(grid(losses))
    assert found.verdict.startswith(verdict)
    assert len(found.primary) == 4
    assert all(each.n == (5, 5) for each in found.primary)
    assert "every activation at every depth (4 layers, 12 layers)" in found.reason


def test_every_part_is_looked_at_and_none_but_the_main_one_decides() -> None:
    runs = grid(BETTER)
    parts = {
        "tanh": grid({"tanh": 2.0}, part="tanh"),
        "he": grid(SAME, part="he"),
        "recurrent": grid(SAME, "init=identity", part="recurrent"),
        "text8": grid(WORSE, part="text8"),
        "pilot": grid(SAME, part="pilot"),
        "twins": [
            replace(run, options={**run.options, "twin": twin})
            for run in grid({"brelu": 1.0, "belu": 1.0}, part="twins")
            for twin in (False, True)
        ],
    }
    alone = deep_rnn.verdict(runs)
    for name, members in parts.items():
        changed = deep_rnn.verdict(runs + members)
        assert changed.verdict == alone.verdict
        assert (changed.secondary, changed.reason) != (alone.secondary, alone.reason), name


def test_runs_that_diverged_count_as_guessing_and_as_not_learning() -> None:
    run = diverged(rnn("relu", 0, 1.0))
    assert classes(run) == 8
    assert area(run) == pytest.approx(np.log(8))
    assert deep_rnn.bits(run) == 3
    assert not deep_rnn.learns(run)
    assert deep_rnn.learns(rnn("relu", 0, 1.0, bits=2.69))
    assert not deep_rnn.learns(rnn("relu", 0, 1.0, bits=2.71))


def test_where_an_activation_stops_learning_is_said() -> None:
    runs = grid(SAME)
    lost = [diverged(run) if run.activation == "relu" and run.config.network.layers == 12 else run for run in runs]
    assert "every run but: ReLU at 12 layers in 5 of 5 runs" in deep_rnn.verdict(lost).reason
    rows = {(row["network"], row["activation"]): row["learn"] for row in deep_rnn.table(lost)}
    assert rows["12 layers", "ReLU"] == "0 of 5"
    assert rows["4 layers", "ReLU"] == rows["12 layers", "BReLU"] == "5 of 5"


def test_gradients_are_those_of_the_last_update_that_was_measured() -> None:
    steps, norms = deep_rnn.last_gradient(rnn("relu", 0, 1.0))
    assert list(steps) == [1, 2]
    assert list(norms) == [1, 2]
    (row,) = deep_rnn.table([rnn("relu", 0, 1.0)])
    assert row["gradient, first / last layer"] == "0.5"


def test_figures_are_drawn_from_an_archive(tmp_path) -> None:
    runs = grid(BETTER) + grid({"tanh": 2.0}, part="tanh")
    named = [replace(run, folder=run.folder.with_name(f"run{index}")) for index, run in enumerate(runs)]
    records.write(tmp_path, named)
    back = records.read(tmp_path)
    for draw in (deep_rnn.figure, *deep_rnn.more_figures.values()):
        assert draw(back).axes
    assert deep_rnn.verdict(back) == deep_rnn.verdict(runs)


def test_runs_on_images_have_the_classes_of_their_data() -> None:
    assert classes(made_run()) == 10
