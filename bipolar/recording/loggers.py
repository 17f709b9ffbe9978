"""Loggers: they watch a run's records. The framework's own files do not depend on any of them.

A logger has the four methods of `Logger`. To add one: write it here or elsewhere, and make `make_loggers` know it.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bipolar.errors import ConfigError, check_choice, prefixed
from bipolar.recording.folder import ACTIVATIONS, METRICS, Record, jsonable, read_jsonl
from bipolar.sweep import VARIABLE, is_worker

WANDB_MODES = ("online", "offline", "disabled")


@dataclass(frozen=True)
class RunInfo:
    """What a logger is told when a run starts."""

    run_id: str
    experiment: str
    folder: Path
    config: dict[str, Any]
    total_steps: int
    first_step: int


class Logger(Protocol):
    def start(self, info: RunInfo) -> None: ...
    def metrics(self, record: Record) -> None: ...
    def activations(self, records: list[Record]) -> None: ...
    def finish(self, status: str, summary: Record) -> None: ...


def flat_metrics(record: Record) -> dict[str, float]:
    """`{"train/loss": ...}` and so on for the figures of a line of metrics.jsonl, without those that are null there."""
    skip = ("step", "split")
    return {
        key if key == "epoch" else f"{record['split']}/{key}": value
        for key, value in record.items()
        if key not in skip and jsonable(value) is not None
    }


def flat_activations(records: list[Record]) -> dict[str, float]:
    """`{"activations/mean/conv3": ...}`: names that make a dashboard group one quantity of all layers in a panel.

    What is null in activations.jsonl, such as the norm of a gradient that there is not, is left out.
    """
    skip = ("step", "epoch", "layer", "index")
    return {
        f"activations/{key}/{record['layer']}": value
        for record in records
        for key, value in record.items()
        if key not in skip and jsonable(value) is not None
    }


def _require(package: str) -> None:
    """Say before anything is written that a logger's package is missing, without importing it."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"logger={package} needs {package}: pip install {package}, or choose logger=files")


class WandbLogger:
    """Weights & Biases. Imported only when a run with this logger starts.

    Every run is a wandb run of its own, named by the run id and resumed under it. Its history's axis is our `step`.
    """

    def __init__(
        self,
        mode: str = "online",
        project: str = "bipolar",
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
    ) -> None:
        check_choice("mode", mode, WANDB_MODES)
        self.options: dict[str, Any] = {"mode": mode, "project": project, "entity": entity, "tags": tags or None}
        self.group = group
        self._run: Any = None

    def start(self, info: RunInfo) -> None:
        import wandb

        # An earlier job in this process may have left a run open (it crashed outside our reach): close it as failed
        # here, or this job would log into it.
        if wandb.run is not None:
            wandb.finish(exit_code=1)
        try:
            self._run = wandb.init(
                **self.options,
                group=self.group or info.experiment,
                name=info.run_id,
                # unique among all experiments of the project, and the same when the run is resumed
                id=f"{info.experiment.replace('/', '-')}-{info.run_id}"[-128:],
                resume="allow" if self.options["mode"] == "online" else None,
                dir=str(info.folder),
                config=info.config,
                settings=wandb.Settings(console="off", quiet=True),
            )
        except wandb.errors.Error as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"logger=wandb could not start ({reason}); logger.wandb.mode=offline needs no account and no network"
            ) from error
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def metrics(self, record: Record) -> None:
        self._run.log({"step": record["step"], **flat_metrics(record)})

    def activations(self, records: list[Record]) -> None:
        if records:
            self._run.log({"step": records[0]["step"], **flat_activations(records)})

    def finish(self, status: str, summary: Record) -> None:
        if self._run is None:
            return
        self._run.summary["status"] = status
        for group in ("final", "best"):
            for key, value in (summary.get(group) or {}).items():
                if jsonable(value) is not None:
                    self._run.summary[f"{group}/{key}"] = value
        self._run.finish(exit_code=1 if status == "failed" else 0)
        self._run = None


class TensorBoardLogger:
    """TensorBoard event files in the run folder: `tensorboard --logdir outputs`."""

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, info: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Made again from the run folder's files, which a resumed run has just cut back to its checkpoint.
        folder = info.folder / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        for record in read_jsonl(info.folder / METRICS):
            self.metrics(record)
        for _, records in itertools.groupby(read_jsonl(info.folder / ACTIVATIONS), key=lambda record: record["step"]):
            self.activations(list(records))

    def metrics(self, record: Record) -> None:
        self._write(flat_metrics(record), record["step"])

    def activations(self, records: list[Record]) -> None:
        if records:
            self._write(flat_activations(records), records[0]["step"])

    def _write(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def finish(self, status: str, summary: Record) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Progress:
    """A tqdm bar with loss, error, images/s and the remaining time; silent where the output is no terminal."""

    def __init__(self, show: bool = True) -> None:
        self.show = show and sys.stderr.isatty() and not is_worker()
        self._bar: Any = None

    def start(self, info: RunInfo) -> None:
        if self.show and info.total_steps:
            from tqdm import tqdm

            self._bar = tqdm(
                total=info.total_steps,
                initial=info.first_step,
                desc=info.run_id,
                unit="step",
                leave=False,
                dynamic_ncols=True,
                position=1 if VARIABLE in os.environ else 0,  # below the sweep's bar
            )

    def metrics(self, record: Record) -> None:
        if self._bar is None:
            return
        self._bar.update(record["step"] - self._bar.n)
        if record["split"] == "train":
            unit = "characters" if "characters_per_second" in record else "images"
            bits = f"{_text(record['bits_per_character'], '.3f')} bits/character, " if unit == "characters" else ""
            self._bar.set_postfix_str(
                f"epoch {record['epoch']:.1f}, loss {_text(record['loss'], '.4f')}, {bits}"
                f"error {_text(record['error'], '.2%')}, {_text(record[f'{unit}_per_second'], ',.0f')} {unit}/s"
            )

    def activations(self, records: list[Record]) -> None:
        pass

    def finish(self, status: str, summary: Record) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _text(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def make_loggers(config: Mapping[str, Any], *, progress: bool) -> list[Logger]:
    """The loggers of the configuration group `logger`: `{"wandb": {...} or None, "tensorboard": {...} or None}`."""
    loggers: list[Logger] = [Progress(progress)]
    known = {"wandb": WandbLogger, "tensorboard": TensorBoardLogger}
    for name, options in config.items():
        check_choice("logger", name, known)
        if options is not None and options.get("mode") != "disabled":
            _require(name)
            with prefixed(f"logger.{name}"):
                loggers.append(known[name](**options))
    return loggers
