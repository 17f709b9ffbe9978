"""Run folders: where the run of a configuration lives, and reading what it left. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bipolar.recording.folder import ACTIVATIONS, DONE, METRICS, Record, read_json, read_jsonl, read_summary

NOT_IDENTITY = (
    "experiment_name",
    "output_root",
    "data",
    "dataset.download",
    "logger",
    "trainer.checkpoint_minutes",
    "trainer.ensemble",
    "trainer.max_minutes",
    "trainer.progress",
    "trainer.threads",
)
"""Options that say where or how a run is carried out, not what is computed (but for rounding, where threads and
ensembles change the order of sums): they do not change its id."""


def run_id(cfg: DictConfig) -> str:
    """A readable name derived from the configuration: the same configuration has the same id, on any machine.

    Interpolations are left unresolved in the hash: `${data.root}/x.npz` names the same data wherever the root is.
    """
    identity = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(identity, dict)
    for key in NOT_IDENTITY:
        *parents, last = key.split(".")
        node = identity
        for parent in parents:
            node = node.get(parent, {})
        node.pop(last, None)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    names = [cfg[group].name for group in ("activation", "network", "dataset", "init")]
    if cfg.twin:
        names.insert(1, "twin")
    return "-".join([*names, f"lr{cfg.optimizer.lr}", f"seed{cfg.seed}", digest])


def run_folder(cfg: DictConfig) -> Path:
    return Path(cfg.output_root) / cfg.experiment_name / run_id(cfg)


def ensemble_size(cfg: DictConfig) -> int:
    """How many runs of a sweep may be trained together; 1 too for configurations from before there was the option."""
    return int(cfg.trainer.get("ensemble", 1))


@dataclass(frozen=True)
class Run:
    """A run read back from its folder."""

    folder: Path
    options: dict[str, Any]
    """The configuration, resolved, as plain dictionaries: making one of OmegaConf's takes longer than all else."""
    summary: Record
    environment: Record
    metrics: list[Record]
    activations: list[Record]

    @cached_property
    def config(self) -> DictConfig:
        return OmegaConf.create(self.options)

    @property
    def activation(self) -> str:
        return str(self.options["activation"]["name"])

    @property
    def seed(self) -> int:
        return int(self.options["seed"])

    def curve(self, split: str, key: str) -> tuple[list[int], list[float | None]]:
        """Steps and values of one figure of metrics.jsonl, e.g. `curve("train", "loss")`."""
        rows = [row for row in self.metrics if row["split"] == split]
        return [row["step"] for row in rows], [row[key] for row in rows]

    def layers(self, key: str, step: int | None = None) -> list[float | None]:
        """One figure of activations.jsonl for every layer, first to last; at the last measured step by default."""
        if step is None:
            step = max((row["step"] for row in self.activations), default=0)
        rows = sorted((row for row in self.activations if row["step"] == step), key=lambda row: row["index"])
        return [row[key] for row in rows]


def read_run(folder: Path) -> Run:
    summary = read_summary(folder)
    if summary is None:
        raise FileNotFoundError(f"{folder} holds no finished run (no summary.json)")
    options = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
    assert isinstance(options, dict)
    return Run(
        folder=folder,
        options={str(key): value for key, value in options.items()},
        summary=summary,
        environment=read_json(folder / "environment.json"),
        metrics=read_jsonl(folder / METRICS),
        activations=read_jsonl(folder / ACTIVATIONS),
    )


def reuse(folder: Path) -> bool:
    """Take over a finished run of the same id from another experiment of the same profile, if there is one.

    The id says all that is computed, so that run would be made again to the last bit. Its files are copied; the
    configuration gets this experiment's name.

    Args:
        folder: where the run would be, `<output root>/<profile>/<experiment>/<run id>`.

    Returns:
        Whether it was taken over. What is there already, finished or not, is left alone.
    """
    if folder.exists():
        return False
    for other in sorted(folder.parents[1].glob(f"*/{folder.name}")):
        if other == folder or not is_done(other):
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(folder.name + ".new")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(other, temporary, ignore=shutil.ignore_patterns(".lock", "checkpoint.pt"))
        config = OmegaConf.load(temporary / "config.yaml")
        config.experiment_name = f"{folder.parents[1].name}/{folder.parent.name}"
        OmegaConf.save(config, temporary / "config.yaml")
        temporary.rename(folder)
        return True
    return False


def is_done(folder: Path) -> bool:
    """Whether the run has nothing left to do."""
    summary: Any = read_summary(folder)
    return summary is not None and summary["status"] in DONE
