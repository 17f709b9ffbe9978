"""One run: from a configuration to a finished run folder."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from bipolar.errors import ConfigError, prefixed
from bipolar.recording.folder import SUMMARY, FileRecorder, Record, read_summary, write_json
from bipolar.runs import is_done, run_folder

if TYPE_CHECKING:
    from bipolar.trainer import Trainer

StopCheck = Callable[[], str | None]


def run(cfg: DictConfig, stop: StopCheck = lambda: None) -> Record:
    """Train what `cfg` describes and return the run's summary.

    A run that is done already is not repeated; one that was interrupted or killed is resumed. Whatever is wrong with
    the configuration or the data is raised before anything is written.

    Args:
        cfg: the composed configuration (`configs/train.yaml`).
        stop: asked after every step; a reason to stop (the run is then saved and `interrupted`), or None.

    Raises:
        ConfigError: a wrong value, or data that is not there.
        Exception: whatever the training raised, after the run was recorded as failed.
    """
    folder = run_folder(cfg)
    if is_done(folder):
        return {**(read_summary(folder) or {}), "skipped": True}

    # Imported here: a finished run is skipped, and --help answered, without waiting for torch.
    import torch

    from bipolar import build, checkpoint
    from bipolar.device import choose_device, choose_precision, set_threads
    from bipolar.environment import describe
    from bipolar.recording.loggers import RunInfo, make_loggers
    from bipolar.seeding import derive_seed, seed_everything
    from bipolar.trainer import Trainer

    build.check(cfg)
    options = build.trainer_options(cfg)
    threads = set_threads(options.threads)
    with prefixed("trainer"):
        device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    # The generators of an earlier job in this process, or flags it set, have no say in this one.
    seed_everything(derive_seed(cfg.seed, "global"), deterministic=options.deterministic)

    batches = build.batches(cfg, build.arrays(cfg), device)
    model = build.network(cfg, batches.input_shape, batches.classes).to(device)
    initialize = build.initialization(cfg)
    checkpoint_path = folder / "checkpoint.pt"
    resuming = checkpoint_path.exists()
    torch.manual_seed(derive_seed(cfg.seed, "weights"))
    report = None if resuming else initialize(model, batches.sample(cfg.init.samples))
    torch.manual_seed(derive_seed(cfg.seed, "training"))
    if options.channels_last and any(parameter.ndim == 4 for parameter in model.parameters()):
        model = model.to(memory_format=torch.channels_last)
    loggers = make_loggers(OmegaConf.to_container(cfg.logger, resolve=True) or {}, progress=options.progress)  # type: ignore[arg-type]

    with _locked(folder):
        for name in (SUMMARY, "error.txt"):
            (folder / name).unlink(missing_ok=True)
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
        write_json(folder / "environment.json", describe(device, precision, threads))
        if report is not None:
            write_json(folder / "initialization.json", report)
        started = time.monotonic()
        with FileRecorder(folder) as files, _signals(stop) as should_stop:
            trainer = Trainer(
                model,
                batches,
                build.optimizer(cfg, model),
                build.schedule(cfg),
                options,
                precision=precision,
                files=files,
                loggers=loggers,
                checkpoint_path=checkpoint_path,
                should_stop=should_stop,
            )
            if resuming:
                trainer.resume(checkpoint.load(checkpoint_path, device))
            else:
                files.rewind({})
            summary: Record = {"status": "failed", "run_id": folder.name}
            try:
                info = RunInfo(
                    run_id=folder.name,
                    experiment=cfg.experiment_name,
                    folder=folder,
                    config=OmegaConf.to_container(cfg, resolve=True),  # type: ignore[arg-type]
                    total_steps=trainer.total_steps,
                    first_step=trainer.step,
                )
                for logger in loggers:
                    logger.start(info)
                status, reason = trainer.fit()
                summary = _summary(folder, trainer, status, reason)
            except KeyboardInterrupt:
                summary = _summary(folder, trainer, "interrupted", "SIGINT")
                raise
            except BaseException as error:
                summary = {**_summary(folder, trainer, "failed", None), "error": _last_line(error)}
                (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
                raise
            finally:
                summary["wall_seconds"] = time.monotonic() - started
                write_json(folder / SUMMARY, summary)
                for logger in loggers:
                    logger.finish(summary["status"], summary)
    return summary


def _summary(folder: Path, trainer: Trainer, status: str, reason: str | None) -> Record:
    return {
        "status": status,
        "run_id": folder.name,
        "reason": reason,
        "steps": trainer.step,
        "total_steps": trainer.total_steps,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "final": trainer.last,
        "best": trainer.best,
        "images_per_second": trainer.images_seen / trainer.clock.total if trainer.clock.total else None,
        "training_seconds": trainer.clock.total,
    }


def _last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the run folder and keep other processes out of it."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"{folder} is being trained by another process; wait for it or choose another seed") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _signals(stop: StopCheck) -> Iterator[StopCheck]:
    """SIGINT and SIGTERM become a reason to stop after the current step; the handlers are put back afterwards."""
    received: list[str] = []

    def handler(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt  # the second one does not wait
        received.append(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else stop()
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
