"""The trainer: one loop for every network, data set and activation.

A step counts an update of the weights: what is recorded at step s comes from the network after s updates, but for the
training loss and error, which are means over the steps since the line before. Activations at step 0 are those of the
network as initialised; after the last update one more forward pass (without an update) records those of the trained
network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bipolar import checkpoint
from bipolar.data.batches import Batch, Batches
from bipolar.data.streams import TextBatches
from bipolar.device import DEVICES, PRECISIONS, autocast
from bipolar.errors import ConfigError, check_bool, check_choice, check_float, check_int
from bipolar.recording.folder import FileRecorder, Record
from bipolar.recording.loggers import Logger
from bipolar.schedules import Schedule, parse_interval
from bipolar.statistics import FIELDS, ActivationStatistics

Outcome = tuple[str, str | None]
"""How a training ended: its status, and of an interrupted one the reason."""

FIGURES = ("loss", "bits_per_character", "error")
"""What lines of metrics.jsonl say of a split; bits per character of texts alone."""


@dataclass(frozen=True)
class TrainerOptions:
    """See `configs/trainer/default.yaml` for what each option means."""

    epochs: int | None = 10
    max_steps: int | None = None
    batch_size: int = 128
    accumulate: int = 1
    ensemble: int = 1
    grad_clip: float | None = None
    precision: str = "auto"
    compile: bool = False
    channels_last: bool = True
    deterministic: bool = False
    device: str = "auto"
    threads: int | None = None
    log_every: int = 10
    evaluate_every: int | None = None
    statistics_every: int | str = 50
    checkpoint_minutes: float = 5.0
    max_minutes: float | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.epochs is None and self.max_steps is None:
            raise ConfigError("epochs and max_steps are both null; give one of them")
        for name in ("epochs", "max_steps"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 0)
        for name in ("batch_size", "accumulate", "ensemble", "log_every"):
            check_int(name, getattr(self, name))
        for name in ("evaluate_every", "threads"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name))
        if self.accumulate > self.batch_size:
            raise ConfigError(f"accumulate={self.accumulate} is not allowed; a batch has {self.batch_size} samples")
        for name in ("grad_clip", "max_minutes"):
            if getattr(self, name) is not None:
                check_float(name, getattr(self, name), open_low=True)
        check_float("checkpoint_minutes", self.checkpoint_minutes)
        for name in ("compile", "channels_last", "deterministic", "progress"):
            check_bool(name, getattr(self, name))
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("device", self.device, DEVICES)
        parse_interval("statistics_every", self.statistics_every)

    def total_steps(self, steps_per_epoch: int) -> int:
        """The number of updates: `max_steps` where it is given, else `epochs`."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.epochs is not None
        return self.epochs * steps_per_epoch


class Trainer:
    """Trains `model` and records what happens.

    Args:
        model: the network, on the device, initialised.
        batches: the data.
        optimizer: its parameter groups' learning rates are the base rates that `schedule` scales.
        schedule: the learning-rate schedule.
        options: see `TrainerOptions`; device and threads are the caller's business.
        precision: float32, bfloat16 or float16 (with loss scaling).
        files: where the records go first.
        loggers: fed with the same records.
        checkpoint_path: where checkpoints are written; resumed from with `resume()`.
        should_stop: asked after every step (keep it cheap); a reason to stop, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches | TextBatches,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        options: TrainerOptions,
        *,
        precision: str,
        files: FileRecorder,
        loggers: list[Logger],
        checkpoint_path: Path,
        should_stop: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.model = model
        self.batches = batches
        self.optimizer = optimizer
        self.schedule = schedule
        self.options = options
        self.precision = precision
        self.files = files
        self.loggers = loggers
        self.checkpoint_path = checkpoint_path
        self.should_stop = should_stop

        self.device = batches.device
        self.total_steps = options.total_steps(batches.steps_per_epoch)
        self.evaluate_every = options.evaluate_every or batches.steps_per_epoch
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        self.is_measured = parse_interval("statistics_every", options.statistics_every)
        self.statistics = ActivationStatistics(model, batches.sample(2), always_hooked=options.compile)
        # Hooks come before compilation, or they would never fire. Evaluation runs the plain model: its batches have
        # other shapes, and compiling for each would cost more than it saves.
        self.training_model: Callable[..., Any] = model
        if options.compile:
            torch.compiler.reset()  # or many different jobs of one process would use up the limit on recompilations
            self.training_model = torch.compile(model)

        self.step = 0
        self.state: Tensor | None = None  # of a recurrent network, carried from step to step within an epoch
        self.totals = torch.zeros(2, device=self.device)  # sums of loss and error since the last line of metrics
        self.steps_in_totals = 0
        self.pending: list[tuple[int, Tensor]] = []  # (step, sums on the device) not yet written
        self.last: Record = {}
        self.best: Record = {}
        self.samples_seen = 0  # images, or characters
        self.samples_in_records = 0  # those of samples_seen that an images_per_second already speaks of
        self.clock = _Stopwatch(self.device)
        self._made_at, self._earlier_wall_seconds = time.monotonic(), 0.0

    def wall_seconds(self) -> float:
        """Since the run began, the time that it was interrupted left out."""
        return self._earlier_wall_seconds + time.monotonic() - self._made_at

    # -- the loop ----------------------------------------------------------------------------------------------------

    def fit(self) -> Outcome:
        """Train to the end."""
        loop = self.loop()
        while True:
            try:
                batch = next(loop)
            except StopIteration as ended:
                outcome: Outcome = ended.value
                return outcome
            self.train_step(batch)

    def loop(self) -> Generator[Batch, None, Outcome]:
        """Everything but the training steps: yields the batch of each, and goes on when that is done."""
        started = saved = time.monotonic()
        self.model.train()
        self.clock.start()
        diverged = False
        while self.step < self.total_steps and not diverged:
            epoch, offset = divmod(self.step, self.batches.steps_per_epoch)
            if offset == 0:
                self.state = None
            for batch in self.batches.train(epoch, offset):
                yield batch
                ended = self.step == self.total_steps
                evaluate = ended or self.step % self.evaluate_every == 0
                if evaluate or self.step % self.options.log_every == 0:
                    diverged = not self.write_records()
                if evaluate and not diverged:
                    diverged = not self.validate()
                if ended or diverged:
                    break
                reason = self.should_stop()
                now = time.monotonic()
                if reason is None and self.options.max_minutes and now - started > 60 * self.options.max_minutes:
                    reason = "max_minutes"
                if reason is not None or now - saved > 60 * self.options.checkpoint_minutes:
                    self.save()
                    saved = time.monotonic()
                if reason is not None:
                    return "interrupted", reason
        if diverged:
            return "diverged", None
        # Saved before the test set is read: if the process dies from here on, the end is made again, once.
        self.save()
        finite = self.total_steps > 0 or self.validate()
        finite &= math.isfinite(self.evaluate_and_record("test")["loss"])
        self.measure_final_state()
        return ("finished" if finite else "diverged"), None

    def train_step(self, batch: Batch) -> None:
        """One update. Nothing in here waits for the device (but float16's loss scale, to know whether to update)."""
        self.set_learning_rates()
        measure = self.is_measured(self.step)
        with self.statistics.measuring(measure):
            self.forward_and_backward(batch)
        if self.options.grad_clip is not None or measure:
            self.scaler.unscale_(self.optimizer)
        if measure:
            self.keep_statistics()
        if self.options.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.count_step(batch)

    def set_learning_rates(self) -> None:
        factor = self.schedule.factor(self.step, self.total_steps)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor

    def keep_statistics(self) -> None:
        self.pending.append((self.step, self.statistics.snapshot()))

    def count_step(self, batch: Batch) -> None:
        self.steps_in_totals += 1
        self.samples_seen += batch[1].numel()
        self.step += 1

    def forward_and_backward(self, batch: Batch) -> None:
        inputs, targets = (part.chunk(self.options.accumulate) for part in batch)
        size = batch[1].numel()
        given = [None] * len(inputs) if self.state is None else self.state.chunk(self.options.accumulate, dim=1)
        carried = []
        for x, y, state in zip(inputs, targets, given, strict=True):
            with autocast(self.device, self.precision):
                logits, state = self.predict(self.training_model, x, state)
                loss = F.cross_entropy(logits, y.flatten(), reduction="sum") / size
            self.scaler.scale(loss).backward()
            with torch.no_grad():
                errors = (logits.argmax(1) != y.flatten()).sum() / size
                self.totals += torch.stack([loss.detach().float(), errors])
            carried.append(state)
        self.state = torch.cat(carried, dim=1) if self.batches.is_text else None

    def predict(self, model: Callable[..., Any], x: Tensor, state: Tensor | None) -> tuple[Tensor, Any]:
        """Logits [N, classes], N counting images or characters; of a recurrent network also the state to carry on."""
        if not self.batches.is_text:
            return model(x), None
        logits, state = model(x, state)
        assert state is not None
        return logits.flatten(0, 1), state.detach()

    # -- records -----------------------------------------------------------------------------------------------------

    def write_records(self) -> bool:
        """Write what was gathered on the device since the last time; the one place where the loop waits for it.

        Returns False if the loss is not finite.
        """
        loss, error = (self.totals / max(1, self.steps_in_totals)).tolist()
        with self.clock.paused():
            seconds, samples = self.clock.lap(), self.samples_seen - self.samples_in_records
            self.write_statistics()
            self.write_metrics(
                {
                    **self.position("train"),
                    **self.figures(loss, error),
                    "learning_rate": self.optimizer.param_groups[0]["lr"],
                    f"{self.batches.unit}_per_second": samples / seconds if seconds > 0 else None,
                }
            )
            self.totals.zero_()
            self.steps_in_totals = 0
            self.samples_in_records = self.samples_seen
        return math.isfinite(loss)

    def position(self, split: str) -> Record:
        return {"step": self.step, "epoch": self.step / self.batches.steps_per_epoch, "split": split}

    def figures(self, loss: float, error: float) -> Record:
        """Mean cross-entropy in nats, for text in bits per character too, and the fraction of wrong predictions."""
        bits = {"bits_per_character": loss / math.log(2)} if self.batches.is_text else {}
        return {"loss": loss, **bits, "error": error}

    def write_metrics(self, record: Record) -> None:
        self.last |= {f"{record['split']}_{key}": record[key] for key in FIGURES if key in record}
        self.files.metrics(record)
        for logger in self.loggers:
            logger.metrics(record)

    def write_statistics(self) -> None:
        if not self.pending:
            return
        steps = [step for step, _ in self.pending]
        tables = self.statistics.tables([sums for _, sums in self.pending]).tolist()
        self.pending.clear()
        for step, table in zip(steps, tables, strict=True):
            epoch = step / self.batches.steps_per_epoch
            records = [
                {"step": step, "epoch": epoch, "layer": name, "index": index} | dict(zip(FIELDS, row, strict=True))
                for index, (name, row) in enumerate(zip(self.statistics.names, table, strict=True), start=1)
            ]
            self.files.activations(records)
            for logger in self.loggers:
                logger.activations(records)

    def measure_final_state(self) -> None:
        """Statistics of the trained network on the first batch of an epoch, in training mode, without an update."""
        inputs, _ = next(iter(self.batches.train(self.step // self.batches.steps_per_epoch)))
        with torch.no_grad(), self.statistics.measuring(), autocast(self.device, self.precision):
            self.predict(self.model, inputs, None)
        self.keep_statistics()
        self.write_statistics()

    # -- evaluation --------------------------------------------------------------------------------------------------

    def validate(self) -> bool:
        """Evaluate on the validation split. Returns False if the loss is not finite."""
        record = self.evaluate_and_record("valid")
        if not math.isfinite(record["loss"]):
            return False
        self.schedule.observe(record["loss"])
        if not self.best or record["loss"] < self.best["valid_loss"]:
            self.best = {"step": self.step} | {f"valid_{key}": record[key] for key in FIGURES if key in record}
        return True

    def evaluate_and_record(self, split: str) -> Record:
        with self.clock.paused():
            loss, error = self.evaluate(split)
            record = {**self.position(split), **self.figures(loss, error)}
            self.write_metrics(record)
        return record

    @torch.no_grad()
    def evaluate(self, split: str) -> tuple[float, float]:
        """Mean cross-entropy (in nats) and error (fraction) over all of a split."""
        self.model.eval()
        totals = torch.zeros(2, device=self.device)
        size, state = 0, None
        for inputs, targets in self.batches.evaluation(split):
            targets = targets.flatten()
            with autocast(self.device, self.precision):
                logits, state = self.predict(self.model, inputs, state)
                loss = F.cross_entropy(logits, targets, reduction="sum")
            totals += torch.stack([loss.float(), (logits.argmax(1) != targets).sum().float()])
            size += targets.numel()
        self.model.train()
        loss_sum, errors = totals.tolist()
        return loss_sum / size, errors / size

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        with self.clock.paused():
            self.write_statistics()
            checkpoint.save(
                self.checkpoint_path,
                {
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "random": checkpoint.random_state(),
                    "step": self.step,
                    "state": self.state,
                    "totals": self.totals,
                    "steps_in_totals": self.steps_in_totals,
                    "last": self.last,
                    "best": self.best,
                    "samples_seen": self.samples_seen,
                    "training_seconds": self.clock.total,
                    "wall_seconds": self.wall_seconds(),
                    "files": self.files.positions(),
                },
            )

    def resume(self, state: dict[str, Any], spent: float = 0.0) -> None:
        """Continue from a checkpoint: the records written after it are dropped and made again.

        `spent` are the seconds that the run is known to have taken so far, where that is more than the checkpoint says.

        Bit for bit the same as without the interruption on the same machine with as many threads; on a GPU only with
        `trainer.deterministic=true`.
        """
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        checkpoint.restore_random_state(state["random"])
        self.step = state["step"]
        self.state = None if state["state"] is None else state["state"].to(self.device)
        self.totals.copy_(state["totals"])
        self.steps_in_totals = state["steps_in_totals"]
        self.last, self.best = state["last"], state["best"]
        self.samples_seen = self.samples_in_records = state["samples_seen"]
        self.clock.total = state["training_seconds"]
        self._earlier_wall_seconds = max(state["wall_seconds"], spent)
        self.files.rewind(state["files"])


class _Stopwatch:
    """Seconds of training. It stands still inside `paused()`: evaluation and saving do not count."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total = 0.0
        self._lap = 0.0
        self._mark = time.perf_counter()

    def start(self) -> None:
        self._mark = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # rare: work that is still queued belongs to the training
        elapsed = time.perf_counter() - self._mark
        self.total += elapsed
        self._lap += elapsed
        try:
            yield
        finally:
            self.start()

    def lap(self) -> float:
        """Seconds since the last call; to be called while paused."""
        seconds, self._lap = self._lap, 0.0
        return seconds
