"""Tests of the files in configs/: every one of them can be used."""

from __future__ import annotations

import importlib
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from bipolar import build, sweep
from bipolar.errors import ConfigError
from bipolar.run import run
from bipolar.runs import read_run, run_folder

GROUPS = ("activation", "network", "dataset", "init", "optimizer", "scheduler", "trainer", "logger", "sweep")


def choices(group: str) -> list[str]:
    folder = sweep.CONFIGS / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


ALL = [(group, name) for group in GROUPS for name in choices(group)]
NAMED = [(group, name) for group, name in ALL if group not in ("trainer", "logger", "sweep")]
EXPERIMENTS = choices("experiment")


def test_every_folder_is_tested():
    assert {path.name for path in sweep.CONFIGS.iterdir() if path.is_dir()} == {*GROUPS, "hydra", "experiment"}


TEXTS = [name for name in choices("dataset") if "sequence_length" in sweep.compose([f"dataset={name}"]).dataset]


def with_its_like(group: str, name: str) -> list[str]:
    """The choice, and what goes with it: a text is read by a recurrent network."""
    if group == "dataset" and name in TEXTS:
        return [f"dataset={name}", "network=rnn"]
    if (group, name) == ("network", "rnn"):
        return ["network=rnn", "dataset=ptb"]
    return [f"{group}={name}"]


def test_the_texts_are_known():
    assert TEXTS == ["ptb", "python_docs", "text", "text8"]


@pytest.mark.parametrize(("group", "name"), ALL)
def test_every_choice_composes_and_passes_the_check(group, name):
    build.check(sweep.compose(with_its_like(group, name)))


@pytest.mark.parametrize(("group", "name"), NAMED)
def test_every_choice_is_called_as_its_file(group, name):
    assert sweep.compose([f"{group}={name}"])[group].name == name


@pytest.mark.parametrize(("group", "name"), NAMED)
def test_every_target_is_there(group, name):
    module, _, target = sweep.compose([f"{group}={name}"])[group]._target_.rpartition(".")
    assert callable(getattr(importlib.import_module(module), target))


@pytest.mark.parametrize("activation", choices("activation"))
@pytest.mark.parametrize("network", choices("network"))
def test_every_activation_goes_with_every_network(activation, network):
    dataset = "ptb" if network == "rnn" else "cifar10"
    build.check(sweep.compose([f"activation={activation}", f"network={network}", f"dataset={dataset}"]))


@pytest.mark.parametrize("sweep_name", choices("sweep"))
def test_every_job_of_a_ready_made_grid_passes_the_check(sweep_name):
    jobs = sweep.expand([f"sweep={sweep_name}"])
    assert len(jobs) > 1
    for cfg in jobs:
        build.check(cfg)


@pytest.mark.parametrize("dataset", ["digits", "gaussian", "python_docs"])
def test_data_sets_that_need_no_download_train_as_they_are(dataset, tmp_path):
    options = with_its_like("dataset", dataset) + ["dataset.evaluation_size=500"] * (dataset in TEXTS)
    assert run(sweep.compose([*options, "trainer.max_steps=1", f"output_root={tmp_path}"]))["steps"] == 1


def test_without_a_choice_the_run_is_complete():
    cfg = sweep.compose()
    assert OmegaConf.missing_keys(cfg) == set()
    build.check(cfg)


def test_data_is_looked_for_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("BIPOLAR_DATA", "/elsewhere")
    assert sweep.compose(["dataset=cifar10"]).dataset.root == "/elsewhere"
    monkeypatch.delenv("BIPOLAR_DATA")
    assert sweep.compose(["dataset=cifar10"]).dataset.root == "data"


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=quick/cnn"],
        ["experiment=quick/resnet-bipolar"],
        ["experiment=cpu/cnn-twins", "seed=0,1"],
        ["sweep=activations", "network.width=8,16", "seed=range(2)"],
        ["activation=relu,belu", "optimizer=sgd,adam", "optimizer.lr=1e-3,0.2", "trainer.max_steps=null"],
        ["network=cnn,resnet", "+network.extra=1", "experiment_name='a, b'", "~network.name", "seed=3"],
        ["activation=brelu", "activation.pattern=halves,interleaved", "network.dropout=0.1", "dataset=gaussian",
         "dataset.shape=[8],[16]"],
    ],
)  # fmt: skip
def test_composing_once_for_many_jobs_gives_what_hydra_gives_for_each(overrides, monkeypatch):
    many = sweep.expand(overrides)
    monkeypatch.setattr(sweep, "_compose_all", lambda jobs, parser: [hydra.compose("train", job) for job in jobs])
    assert many == sweep.expand(overrides)
    assert len(many) > 1 or overrides[-1] == "seed=3"


def test_a_network_that_was_tried_does_not_hide_one_that_is_wrong():
    build.check(sweep.compose(["network=cnn", "dataset=cifar10"]))
    with pytest.raises(ConfigError, match="network"):
        build.check(sweep.compose(["network=cnn", "dataset=cifar10", "network.kernel_size=2"]))
    with pytest.raises(ConfigError, match="dim"):
        build.check(sweep.compose(["network=cnn", "dataset=cifar10", "activation=belu", "activation.dim=7"]))
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        build.check(sweep.compose(["network=cnn", "dataset=cifar10", "optimizer.lr=-1"]))
    for _ in range(2):  # a network that failed counts as not tried
        with pytest.raises(ConfigError, match="images"):
            build.check(sweep.compose(["network=cnn", "dataset=gaussian", "dataset.shape=[5]"]))


# --- experiments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiments_runs_have_a_folder_of_their_own(experiment):
    assert sweep.compose([f"experiment={experiment}"]).experiment_name == experiment


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_job_of_an_experiment_passes_the_check(experiment):
    jobs = sweep.expand([f"experiment={experiment}", "seed=0,1"])
    assert len(jobs) > 1
    assert len({run_folder(cfg) for cfg in jobs}) == len(jobs)
    for cfg in {sweep.but_for_seed(cfg): cfg for cfg in jobs}.values():
        build.check(cfg)


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name.startswith("quick/")])
def test_a_job_of_every_quick_experiment_runs(experiment, tmp_path):
    cfg = sweep.expand([f"experiment={experiment}", f"output_root={tmp_path}"])[0]
    steps = 0 if cfg.trainer.max_steps == 0 else 2  # some measure networks as initialised
    cfg.trainer.max_steps = steps
    summary = run(cfg)
    assert (summary["status"], summary["steps"]) == ("finished", steps)
    saved = read_run(Path(tmp_path, experiment, summary["run_id"]))
    assert {row["split"] for row in saved.metrics} == {"valid", "test"} | ({"train"} if steps else set())
    assert saved.activations
