"""Tests of training several runs as one: each run's records are those that it has when it is trained alone."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from conftest import TINY, compose

from bipolar import build, sweep
from bipolar.errors import ConfigError
from bipolar.recording.folder import read_summary
from bipolar.run import run, run_together
from bipolar.runs import read_run, run_folder

PLAIN = ["network=mlp", "activation=brelu"]


@pytest.fixture
def configs(tmp_path):
    """Configurations of the same run with several seeds, in folders of its own for each `name`."""

    def make(name, *overrides, seeds=range(3), size=3):
        shared = [*TINY, *PLAIN, f"output_root={tmp_path}/{name}", f"trainer.ensemble={size}", *overrides]
        return [compose(*shared, f"seed={seed}") for seed in seeds]

    return make


class StopFrom:
    """Asks whoever asks to stop, from the n-th time on."""

    def __init__(self, n):
        self.left = n

    def __call__(self):
        self.left -= 1
        return "requested" if self.left < 1 else None


def together(cfgs, stop=lambda: None):
    """The summaries, or what was raised, in the order of the configurations."""
    results = {}
    for number, ending in run_together(cfgs, stop):
        try:
            results[number] = ending()
        except (Exception, KeyboardInterrupt) as error:
            results[number] = error
    return [results[number] for number in range(len(cfgs))]


def without_times(rows):
    return [{key: value for key, value in row.items() if not key.endswith("_per_second")} for row in rows]


def assert_alike(found, wanted, rel=1e-4):
    """Within rounding, which many steps make larger."""
    assert len(found) == len(wanted)
    for row, other in zip(found, wanted, strict=True):
        assert row.keys() == other.keys()
        for key, value in other.items():
            if isinstance(value, float):
                assert row[key] == pytest.approx(value, rel=rel, abs=1e-5, nan_ok=True), (key, row)
            else:
                assert row[key] == value


def assert_same_runs(mine, alone, rel=1e-4):
    for cfg, other in zip(mine, alone, strict=True):
        assert run_folder(cfg).name == run_folder(other).name
        found, wanted = read_run(run_folder(cfg)), read_run(run_folder(other))
        assert_alike(without_times(found.metrics), without_times(wanted.metrics), rel)
        assert_alike(found.activations, wanted.activations, rel)
        times = ("training_seconds", "wall_seconds", "samples_per_second", "images_per_second")
        kept = [{key: value for key, value in each.summary.items() if key not in times} for each in (found, wanted)]
        assert kept[0]["status"] == kept[1]["status"] == "finished"
        assert kept[0]["steps"] == kept[1]["steps"]
        assert_alike([kept[0]["final"]], [kept[1]["final"]], rel)


OPTIONS = {
    "brelu": [],
    "belu, halves": ["activation=belu", "activation.pattern=halves"],
    "tanh": ["activation=tanh", "init=glorot"],
    "adamw": ["optimizer=adamw"],
    "clipped": ["trainer.grad_clip=0.05"],
    "without momentum": ["optimizer.momentum=0", "optimizer.nesterov=false"],
    "warm-up": ["scheduler=cosine", "scheduler.warmup_steps=5"],
    "twin": ["twin=true"],
    "lsuv": ["init=lsuv"],
    "bfloat16": ["trainer.precision=bfloat16"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_run_is_as_if_trained_alone(configs, options):
    mine, alone = configs("together", *options), configs("alone", *options, size=1)
    summaries = together(mine)
    for cfg in alone:
        run(cfg)
    assert [summary["status"] for summary in summaries] == ["finished"] * 3
    assert_same_runs(mine, alone, rel=0.1 if "trainer.precision=bfloat16" in options else 1e-4)
    curves = [[row["loss"] for row in read_run(run_folder(cfg)).metrics] for cfg in mine]
    assert all(a != b for a, b in itertools.combinations(curves, 2))


def test_weights_and_optimizers_are_saved_as_those_of_the_run(configs):
    mine, alone = configs("together", "optimizer=adamw"), configs("alone", "optimizer=adamw", size=1)
    for cfg in alone:
        run(cfg, StopFrom(7))
    together(mine, StopFrom(3 * 6 + 1))
    for cfg, other in zip(mine, alone, strict=True):
        found, wanted = (torch.load(run_folder(each) / "checkpoint.pt", weights_only=True) for each in (cfg, other))
        assert found["step"] == wanted["step"] == 7
        for name, value in wanted["model"].items():
            assert found["model"][name].is_contiguous()
            assert found["model"][name].untyped_storage().nbytes() == value.untyped_storage().nbytes()
            torch.testing.assert_close(found["model"][name], value, rtol=1e-4, atol=1e-6)
        states = found["optimizer"]["state"], wanted["optimizer"]["state"]
        assert states[0].keys() == states[1].keys()
        for key, state in states[1].items():
            for name, value in state.items():
                torch.testing.assert_close(states[0][key][name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("asked", [13, 14, 5], ids=str)
@pytest.mark.parametrize("goes_on_together", [True, False])
def test_interrupted_runs_go_on(configs, asked, goes_on_together):
    """Together or alone; where they stopped at different steps, those that are behind catch up."""
    options = ["optimizer=adamw", "trainer.grad_clip=0.5"]
    mine, alone = configs("together", *options), configs("alone", *options, size=1)
    first = together(mine, StopFrom(asked))
    assert {summary["status"] for summary in first} == {"interrupted"}
    if goes_on_together:
        together(mine)
    else:
        for cfg in mine:
            run(cfg)
    for cfg in alone:
        run(cfg)
    assert_same_runs(mine, alone)


def test_a_run_that_diverges_leaves_the_others_alone(configs):
    """At this rate some seeds diverge, as they do alone."""
    options = ["optimizer.lr=30", "activation=relu", "trainer.epochs=3", "optimizer.momentum=0.5"]
    mine, alone = configs("together", *options, seeds=range(6), size=6), configs("alone", *options, seeds=range(6))
    found = [summary["status"] for summary in together(mine)]
    wanted = [run(cfg)["status"] for cfg in alone]
    assert found == wanted
    assert set(wanted) == {"diverged", "finished"}
    for cfg, other in zip(mine, alone, strict=True):
        ends = [read_run(run_folder(each)).metrics[-1]["step"] for each in (cfg, other)]
        assert ends[0] == ends[1]


def test_finished_runs_are_skipped_and_the_others_trained(configs):
    mine, alone = configs("together"), configs("alone", size=1)
    run(mine[1])
    summaries = together(mine)
    assert [bool(summary.get("skipped")) for summary in summaries] == [False, True, False]
    for cfg in alone:
        run(cfg)
    assert_same_runs(mine, alone)


def test_a_run_that_cannot_start_does_not_stop_the_others(configs):
    mine = configs("together")
    run_folder(mine[2]).parent.mkdir(parents=True)
    run_folder(mine[2]).write_text("in the way")
    results = together(mine)
    assert isinstance(results[2], ConfigError)
    assert [result["status"] for result in results if result is not results[2]] == ["finished"] * 2


def test_a_run_whose_records_cannot_be_written_fails_alone(configs, monkeypatch):
    from bipolar.trainer import Trainer

    original = Trainer.write_metrics

    def broken(self, record):
        if "seed1" in str(self.checkpoint_path) and record["step"] >= 6:
            raise OSError("disk full")
        original(self, record)

    monkeypatch.setattr(Trainer, "write_metrics", broken)
    results = together(configs("together"))
    assert isinstance(results[1], OSError)
    assert [result["status"] for result in results if result is not results[1]] == ["finished"] * 2
    assert read_summary(run_folder(configs("together")[1]))["status"] == "failed"


def test_a_second_signal_interrupts_all(configs):
    class Twice:
        calls = 0

        def __call__(self):
            self.calls += 1
            if self.calls == 10:
                raise KeyboardInterrupt

    results = together(configs("together"), Twice())
    assert all(isinstance(result, KeyboardInterrupt) for result in results)
    for cfg in configs("together"):
        assert read_summary(run_folder(cfg))["status"] == "interrupted"


# --- which runs -------------------------------------------------------------------------------------------------------


def test_groups_are_runs_that_differ_in_their_seed_alone():
    jobs = sweep.expand([*TINY, *PLAIN, "trainer.ensemble=3", "optimizer.lr=0.1,0.2", "seed=range(5)"])
    found = sweep.ensembles(jobs)
    assert sorted(itertools.chain(*found)) == list(range(10))
    assert sorted(map(len, found)) == [2, 2, 3, 3]
    for group in found:
        assert len({jobs[number].optimizer.lr for number in group}) == 1
        assert len({jobs[number].seed for number in group}) == len(group)


def test_without_the_option_each_is_alone():
    jobs = sweep.expand([*TINY, *PLAIN, "seed=range(5)"])
    assert sweep.ensembles(jobs) == [[0], [1], [2], [3], [4]]


def test_the_option_is_no_part_of_a_runs_identity(configs):
    names = {run_folder(configs("x", size=size)[0]).name for size in (1, 2, 8)}
    assert len(names) == 1


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["network=cnn", "dataset=digits"], "needs network=mlp, without normalization and dropout"),
        (["network.norm=batch"], "needs network=mlp, without normalization and dropout"),
        (["network.dropout=0.1"], "needs network=mlp, without normalization and dropout"),
        (["activation=batch_axis_relu"], "needs an element-wise activation .*, not BatchAxisReLU"),
        (["activation=relu", "activation._target_=torch.nn.PReLU"], "needs an element-wise activation .*, not PReLU"),
        (["scheduler=plateau"], "scheduler=plateau"),
        (["trainer.accumulate=2"], "trainer.accumulate"),
        (["trainer.compile=true"], "trainer.compile"),
        (["optimizer._target_=torch.optim.NAdam", "~optimizer.momentum", "~optimizer.nesterov"], "NAdam"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_in_one_line(options, what):
    dataset = [] if "dataset=digits" in options else TINY
    cfg = sweep.compose([*dataset, *PLAIN, "trainer.ensemble=2", *options])
    with pytest.raises(ConfigError, match=rf"^trainer\.ensemble=2 .*{what}") as raised:
        build.check(cfg)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [0, -1, 1.5, "many"])
def test_sizes_that_are_none(size):
    with pytest.raises(ConfigError, match=r"^trainer\.ensemble"):
        build.check(sweep.compose([*TINY, *PLAIN, f"trainer.ensemble={size}"]))


@pytest.mark.parametrize(
    "launcher", [[], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]], ids=["basic", "joblib"]
)
def test_a_sweep_on_the_command_line(train, tmp_path, launcher):
    arguments = [*TINY, *PLAIN, "-m", "seed=range(5)", "trainer.ensemble=3", f"output_root={tmp_path}", *launcher]
    ended = train(*arguments)
    assert ended.status == 0
    assert "5 of 5 runs: 5 finished" in ended.out
    folders = sorted(path.parent for path in tmp_path.rglob("summary.json"))
    assert len(folders) == 5
    for folder in folders:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert math.isfinite(rows[-1]["loss"])
    if not launcher:
        assert train(*arguments).out.count("skipped") == 5


def test_a_single_run_is_trained_as_ever(train, tmp_path):
    ended = train(*TINY, *PLAIN, "trainer.ensemble=3", f"output_root={tmp_path}")
    assert "finished" in ended.out
    assert ended.out.count("\n") == 1
