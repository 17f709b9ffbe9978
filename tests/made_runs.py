"""Runs made up for tests of what is made from finished runs: real configurations, invented figures."""

from __future__ import annotations

import copy
import random
from functools import cache
from pathlib import Path
from typing import Any

from conftest import compose
from omegaconf import DictConfig, OmegaConf

from bipolar.runs import Run

DATA = "/secret/place/cifar10-heldout.npz"


def made_run(
    activation: str = "relu",
    seed: int = 0,
    experiment: str = "quick/fake",
    *overrides: str,
    status: str = "finished",
    run_id: str | None = None,
) -> Run:
    """A run of two logged steps and two layers; the same arguments make the same run."""
    config = copy.deepcopy(_composed(activation, *overrides))
    config.seed, config.experiment_name = seed, experiment
    chance = random.Random(f"{activation} {seed} {experiment} {overrides}")
    metrics: list[dict[str, Any]] = []
    for step in (10, 20):
        train = {"loss": chance.random(), "error": 0.5, "learning_rate": 0.1, "images_per_second": chance.random()}
        metrics.append({"step": step, "epoch": step / 10, "split": "train", **train})
        metrics.append({"step": step, "epoch": step / 10, "split": "valid", "loss": chance.random(), "error": None})
    statistics = ("mean", "variance", "channel_mean_norm", "zero_fraction", "max_abs", "pre_mean", "pre_variance")
    activations = [
        {"step": step, "epoch": step / 10, "layer": f"conv{index}", "index": index}
        | {key: chance.random() for key in statistics}
        for step in (0, 20)
        for index in (1, 2)
    ]
    figures = {"train_loss": metrics[-2]["loss"], "valid_error": chance.random(), "test_error": chance.random()}
    return Run(
        folder=Path("/secret/outputs", experiment, run_id or f"{activation}-cnn-seed{seed}-{len(overrides)}"),
        options=OmegaConf.to_container(config),
        summary={
            "status": status, "reason": None, "steps": 20, "total_steps": 20, "parameters": 72442, "final": figures,
            "best": {"step": 10, "valid_loss": None}, "images_per_second": 5.0, "training_seconds": 3.0,
            "wall_seconds": 60.0, "run_id": "overwritten",
        },
        environment={
            "command": "python /secret/scripts/train.py", "commit": "c0ffee", "dirty": None,
            "versions": {"python": "3.11.7", "hydra-core": "1.3.8"}, "machine": {"processor": "A", "cores": 2},
            "device": "cpu", "accelerator": None, "precision": "float32", "threads": 1 + seed % 2,
        },
        metrics=metrics,
        activations=activations,
    )  # fmt: skip


@cache
def _composed(activation: str, *overrides: str) -> DictConfig:
    """By way of YAML, as a run folder has it."""
    places = [f"dataset.path={DATA}", "output_root=/secret/outputs"]
    config = compose(f"activation={activation}", "network=cnn", "dataset=npz", *places, *overrides)
    return OmegaConf.create(OmegaConf.to_yaml(config, resolve=True))


def made_runs(*activations: str, seeds: int = 3, experiment: str = "quick/fake") -> list[Run]:
    """A small grid."""
    return [made_run(name, seed, experiment) for name in activations or ("relu", "brelu") for seed in range(seeds)]
