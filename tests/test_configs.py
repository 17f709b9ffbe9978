"""Tests of the files in configs/: every one of them can be used."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from bipolar import build, sweep
from bipolar.run import run
from bipolar.runs import read_run, run_folder

GROUPS = ("activation", "network", "dataset", "init", "optimizer", "scheduler", "trainer", "logger", "sweep")


def choices(group: str) -> list[str]:
    folder = sweep.CONFIGS / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


ALL = [(group, name) for group in GROUPS for name in choices(group)]
NAMED = [(group, name) for group, name in ALL if group not in ("trainer", "logger", "sweep")]
EXPERIMENTS = choices("experiment")


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """A run sets torch's flags and threads for itself; the other tests shall not notice."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def test_every_folder_is_tested():
    assert {path.name for path in sweep.CONFIGS.iterdir() if path.is_dir()} == {*GROUPS, "hydra", "experiment"}


@pytest.mark.parametrize(("group", "name"), ALL)
def test_every_choice_composes_and_passes_the_check(group, name):
    build.check(sweep.compose([f"{group}={name}"]))


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
    build.check(sweep.compose([f"activation={activation}", f"network={network}", "dataset=cifar10"]))


@pytest.mark.parametrize("sweep_name", choices("sweep"))
def test_every_job_of_a_ready_made_grid_passes_the_check(sweep_name):
    jobs = sweep.expand([f"sweep={sweep_name}"])
    assert len(jobs) > 1
    for cfg in jobs:
        build.check(cfg)


@pytest.mark.parametrize("dataset", ["digits", "gaussian"])
def test_data_sets_that_need_no_download_train_as_they_are(dataset, tmp_path):
    assert run(sweep.compose([f"dataset={dataset}", "trainer.max_steps=1", f"output_root={tmp_path}"]))["steps"] == 1


def test_without_a_choice_the_run_is_complete():
    cfg = sweep.compose()
    assert OmegaConf.missing_keys(cfg) == set()
    build.check(cfg)


def test_data_is_looked_for_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("BIPOLAR_DATA", "/elsewhere")
    assert sweep.compose(["dataset=cifar10"]).dataset.root == "/elsewhere"
    monkeypatch.delenv("BIPOLAR_DATA")
    assert sweep.compose(["dataset=cifar10"]).dataset.root == "data"


# --- experiments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiments_runs_have_a_folder_of_their_own(experiment):
    assert sweep.compose([f"experiment={experiment}"]).experiment_name == experiment


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_job_of_an_experiment_passes_the_check(experiment):
    jobs = sweep.expand([f"experiment={experiment}", "seed=0,1"])
    assert len(jobs) > 1
    assert len({run_folder(cfg) for cfg in jobs}) == len(jobs)
    for cfg in jobs:
        build.check(cfg)


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name.startswith("quick/")])
def test_a_job_of_every_quick_experiment_runs(experiment, tmp_path):
    cfg = sweep.expand([f"experiment={experiment}", "trainer.max_steps=2", f"output_root={tmp_path}"])[0]
    summary = run(cfg)
    assert (summary["status"], summary["steps"]) == ("finished", 2)
    saved = read_run(Path(tmp_path, experiment, summary["run_id"]))
    assert {row["split"] for row in saved.metrics} == {"train", "valid", "test"}
    assert saved.activations
