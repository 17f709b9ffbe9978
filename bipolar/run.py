"""One run: from a configuration to a finished run folder."""

from __future__ import annotations

import shutil
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from omegaconf import DictConfig, OmegaConf

from bipolar.errors import ConfigError, throw
from bipolar.recording.folder import SUMMARY, FileRecorder, Record, read_summary, write_json
from bipolar.runs import is_done, run_folder

if TYPE_CHECKING:
    from bipolar.recording.loggers import Logger
    from bipolar.trainer import Outcome, Trainer

StopCheck = Callable[[], str | None]
Ending = Callable[[], Record]
Running: TypeAlias = "Generator[Trainer, Outcome, Record]"


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
    running = _running(cfg, stop, _signals)
    trainer = _go_on(partial(next, running))
    return trainer if isinstance(trainer, dict) else _end(running, trainer.fit)


def run_together(cfgs: Sequence[DictConfig], stop: StopCheck = lambda: None) -> Iterator[tuple[int, Ending]]:
    """The same for several runs that are trained as one, see `bipolar.ensemble`.

    Yields each run's number as it ends, with a function that returns its summary or raises what `run` would have.
    """
    from bipolar import ensemble

    with _signals(stop) as should_stop:
        started: dict[int, tuple[Running, Trainer]] = {}
        for number, cfg in enumerate(cfgs):
            running = _running(cfg, should_stop, nullcontext, shows_progress=not started)
            try:
                trainer = _go_on(partial(next, running))
            except Exception as error:
                yield number, partial(throw, error)
                continue
            if isinstance(trainer, dict):
                yield number, partial(dict, trainer)
            else:
                started[number] = running, trainer
        numbers = list(started)
        try:
            for index, ended in ensemble.train([started[number][1] for number in numbers]):
                running, _ = started.pop(numbers[index])
                yield numbers[index], partial(_end, running, ended)
        except BaseException as error:  # of all that are left
            for number, (running, _) in started.items():
                yield number, partial(_end, running, partial(throw, error))


def _end(running: Running, train: Callable[[], Outcome]) -> Record:
    """Train, and let the run record how that ended."""
    try:
        outcome = train()
    except BaseException as error:
        summary = _go_on(partial(running.throw, error))
    else:
        summary = _go_on(partial(running.send, outcome))
    assert isinstance(summary, dict)
    return summary


def _go_on(action: Callable[[], Trainer]) -> Trainer | Record:
    """What a generator yields, or returns in the end."""
    try:
        return action()
    except StopIteration as ended:
        summary: Record = ended.value
        return summary


def _running(
    cfg: DictConfig, stop: StopCheck, signals: Callable[[StopCheck], Any], shows_progress: bool = True
) -> Running:
    """A run around its training: yields its trainer, is sent how the training ended, and returns the summary."""
    folder = run_folder(cfg)
    if is_done(folder):
        return {**(read_summary(folder) or {}), "skipped": True}

    # Imported here: a finished run is skipped, and --help answered, without waiting for torch.
    from bipolar import build, checkpoint
    from bipolar.environment import commit
    from bipolar.recording.loggers import Progress, RunInfo

    build.check(cfg)
    loggers = [logger for logger in build.loggers(cfg) if shows_progress or not isinstance(logger, Progress)]
    try:
        prepared = _prepare(cfg)
    except ConfigError:
        raise
    except Exception as error:
        with _locked(folder):
            _write_head(folder, cfg)
            _record_failure(folder, error)
        raise

    with _locked(folder), FileRecorder(folder) as files, signals(stop) as should_stop:
        if is_done(folder):  # by another process, since we looked
            return {**(read_summary(folder) or {}), "skipped": True}
        checkpoint_path = folder / "checkpoint.pt"
        resuming = checkpoint_path.exists()
        # After its checkpoint an interrupted part still spends time, which its summary alone knows of.
        spent = (read_summary(folder) or {}).get("wall_seconds") or 0.0
        _write_head(folder, cfg)
        write_json(folder / "environment.json", prepared.environment)
        if diff := commit()["diff"]:
            (folder / "changes.diff").write_text(diff, encoding="utf-8")
        if not resuming:
            write_json(folder / "initialization.json", prepared.report)
        summary: Record = {}
        try:
            trainer = prepared.trainer(files, loggers, checkpoint_path, should_stop)
            if resuming:
                trainer.resume(checkpoint.load(checkpoint_path), spent)
            else:
                files.rewind({})
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
            try:
                summary = _summary(trainer, *(yield trainer))
            except KeyboardInterrupt:
                summary = _summary(trainer, "interrupted", should_stop() or "SIGINT")
                raise
            except Exception:
                summary = _summary(trainer, "failed", None)
                raise
        except ConfigError as error:  # a logger that cannot start: nothing was trained, so nothing is left
            summary = _record_failure(folder, error, {"wall_seconds": spent})
            if not resuming:
                shutil.rmtree(folder)
            raise
        except Exception as error:
            summary = _record_failure(folder, error, summary)
            raise
        except BaseException:  # before or in fit: a second signal, or an exit
            summary = summary or {"status": "interrupted", "reason": should_stop() or "SIGINT"}
            raise
        finally:
            summary["run_id"] = folder.name
            if folder.exists():
                write_json(folder / SUMMARY, summary)
            for logger in loggers:
                try:
                    logger.finish(summary["status"], summary)
                except Exception as error:  # the run is what it is, and the other loggers want to finish too
                    warnings.warn(f"{type(logger).__name__} did not finish: {error}", stacklevel=2)
    return summary


@dataclass(frozen=True)
class _Prepared:
    """All that a run needs and that can be had before anything is written."""

    trainer: Callable[..., Trainer]
    report: list[Record]
    environment: Record


def _prepare(cfg: DictConfig) -> _Prepared:
    import torch

    from bipolar import build
    from bipolar.data.streams import TextBatches
    from bipolar.device import choose_device, choose_precision, keep_memory, set_threads
    from bipolar.environment import describe
    from bipolar.seeding import derive_seed, seed_everything
    from bipolar.trainer import Trainer

    options = build.trainer_options(cfg)
    keep_memory()
    threads = set_threads(options.threads)
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    # The generators of an earlier job in this process, or flags it set, have no say in this one.
    seed_everything(derive_seed(cfg.seed, "global"), deterministic=options.deterministic)
    batches = build.batches(cfg, build.arrays(cfg), device)
    model = build.network(cfg, batches.input_shape, batches.classes).to(device)
    torch.manual_seed(derive_seed(cfg.seed, "weights"))
    report = build.initialization(cfg)(model, batches.sample(build.init_samples(cfg)))
    model = build.twin(cfg, model)
    torch.manual_seed(derive_seed(cfg.seed, "training"))
    if options.channels_last and any(parameter.ndim == 4 for parameter in model.parameters()):
        model = model.to(memory_format=torch.channels_last)

    environment = describe(device, precision, threads)
    if isinstance(batches, TextBatches):
        environment["text"] = batches.text

    def trainer(files: FileRecorder, loggers: list[Logger], checkpoint_path: Path, should_stop: StopCheck) -> Trainer:
        return Trainer(
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

    return _Prepared(trainer, report, environment)


def _write_head(folder: Path, cfg: DictConfig) -> None:
    """The configuration; what an earlier try left of its end is removed."""
    for name in (SUMMARY, "error.txt"):
        (folder / name).unlink(missing_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)


def _record_failure(folder: Path, error: Exception, summary: Record | None = None) -> Record:
    """Write error.txt and summary.json for a run that raised `error`; returns the summary."""
    text = traceback.format_exception(error)
    (folder / "error.txt").write_text("".join(text), encoding="utf-8")
    summary = {"status": "failed", "run_id": folder.name, **(summary or {}), "error": text[-1].strip()}
    write_json(folder / SUMMARY, summary)
    return summary


def _summary(trainer: Trainer, status: str, reason: str | None) -> Record:
    return {
        "status": status,
        "reason": reason,
        "steps": trainer.step,
        "total_steps": trainer.total_steps,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "final": trainer.last,
        "best": trainer.best,
        f"{trainer.batches.unit}_per_second": trainer.samples_seen / trainer.clock.total
        if trainer.clock.total
        else None,
        "training_seconds": trainer.clock.total,
        "wall_seconds": trainer.wall_seconds(),
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the run folder and keep other processes out of it."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder} cannot be made: {error.strerror}; choose another output_root"
        ) from error
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
