"""What the commands have in common: running one job, exit statuses, and errors as one line.

Exit statuses: 0 finished or diverged (that is a result), 1 failed, 2 wrong input, 130 and 143 after SIGINT and SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from bipolar import sweep, workers
from bipolar.errors import ConfigError, nearest
from bipolar.recording.folder import Record, read_summary
from bipolar.run import run, run_together
from bipolar.runs import ensemble_size, is_done, run_folder


def execute(cfg: DictConfig, number: int | None = None) -> float | None:
    """Run one job and report it. Returns the best validation loss, for sweepers that want a figure to minimise.

    Alone (`number` is None), it ends the process with the job's exit status. As a job of a sweep it never raises: what
    went wrong is recorded, and the other jobs go on.
    """
    stop = sweep.StopFile()
    if number is not None and stop():
        return None
    return _report(cfg, number, partial(run, cfg, stop), stop, time.monotonic())


def execute_together(cfgs: Sequence[DictConfig], numbers: Sequence[int]) -> None:
    """Run several jobs of a sweep as one, and report each."""
    stop = sweep.StopFile()
    if stop():
        return
    started = time.monotonic()
    for index, ending in run_together(cfgs, stop):
        _report(cfgs[index], numbers[index], ending, stop, started)


def _report(
    cfg: DictConfig, number: int | None, ending: Callable[[], Record], stop: sweep.StopFile, started: float
) -> float | None:
    """Report how a job ends."""
    in_sweep = number is not None
    summary: Record = {}
    try:
        summary = ending()
        status, line = summary["status"], _result_line(cfg, summary, time.monotonic() - started)
    except ConfigError as error:
        status, line = "refused", f"error: {error}"
    except OmegaConfBaseException as error:
        status, line = "refused", f"error: {explain(error)}"
    except KeyboardInterrupt:
        summary = read_summary(run_folder(cfg)) or {}
        if summary.get("status") != "interrupted":
            summary = {"reason": "SIGINT"}  # before anything was written
        status, line = "interrupted", f"interrupted  {run_folder(cfg)}  (at once, at the second signal)"
    except Exception:
        traceback.print_exc()
        status, line = "failed", f"failed {run_folder(cfg)}: {traceback.format_exc().strip().splitlines()[-1]}"
    reason = summary.get("reason")
    signalled = status == "interrupted" and reason in signal.Signals.__members__
    if in_sweep:
        assert number is not None
        if signalled:
            stop.request(str(reason))
        sweep.report_job(number, {"status": status, "line": line, "figures": _figures(summary)})
        return summary.get("best", {}).get("valid_loss")
    print(line, file=sys.stderr if status in ("refused", "failed") else sys.stdout, flush=True)
    exit_status = {"refused": 2, "failed": 1}.get(status, 0)
    if signalled:
        exit_status = 128 + signal.Signals[str(reason)]
    if exit_status:
        sys.exit(exit_status)
    return summary.get("best", {}).get("valid_loss")


def _result_line(cfg: DictConfig, summary: Record, seconds: float) -> str:
    figures = _figures(summary)
    parts = [
        "skipped (finished before)" if summary.get("skipped") else summary["status"],
        str(run_folder(cfg)),
        figures,
        "" if summary.get("skipped") else f"{seconds:.1f} s",
    ]
    line = "  ".join(part for part in parts if part)
    if summary["status"] == "interrupted":
        done = f"{summary['steps']} of {summary['total_steps']} steps"
        line += f"  ({summary['reason']} after {done}; the same command goes on)"
    return line


def _figures(summary: Record) -> str:
    final = summary.get("final") or {}
    texts = []
    if final.get("train_loss") is not None:
        texts.append(f"train loss {final['train_loss']:.4f}")
    for split in ("valid", "test"):
        if final.get(f"{split}_bits_per_character") is not None:
            texts.append(f"{split} {final[f'{split}_bits_per_character']:.3f} bits/character")
        elif final.get(f"{split}_error") is not None:
            texts.append(f"{split} error {final[f'{split}_error']:.2%}")
    return ", ".join(texts)


def main(job: Callable[[], Any], arguments: Sequence[str]) -> int:
    """Run Hydra's entry point `job` with errors as one line; for a sweep, look at every job before the first starts."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us instead of being printed by Hydra
    # argparse wants its flags before or after all overrides; people put -m between them as well
    flags = [argument for argument in arguments if argument in ("-m", "--multirun")][:1]
    arguments = flags + [argument for argument in arguments if argument not in ("-m", "--multirun")]
    sys.argv[1:] = arguments
    try:
        planned = _plan(arguments)
        if planned is None:
            job()
            return 0
        jobs, processes = planned
        # Hydra's launchers know nothing of ensembles, and joblib's workers each import torch
        is_hydras = processes is None or (processes == 1 and all(ensemble_size(cfg) == 1 for cfg in jobs))
        return _monitored(len(jobs), job if is_hydras else partial(_run_all, jobs, processes or 1))
    except ConfigError as error:
        message = str(error)
    except (HydraException, OmegaConfBaseException) as error:
        message = explain(error)
    except OSError as error:  # Hydra makes output_root
        message = f"{error.filename} cannot be written to: {error.strerror}"
    except ValueError as error:  # Hydra's too: what a job raises is dealt with in `execute`
        message = f"{explain(error)} (in: {' '.join(arguments)})"
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def _monitored(total: int, run_all: Callable[[], Any]) -> int:
    """Run a sweep's jobs, and watch them; returns the exit status."""
    try:
        with sweep.Monitor(total) as monitor:
            try:
                run_all()
            except (HydraException, OmegaConfBaseException):
                raise
            except Exception as error:  # the jobs' own are dealt with in `execute`: a worker died, of memory perhaps
                reason = str(error).strip().split("\n")[0]
                print(f"error: the launcher gave up: {type(error).__name__}: {reason}", file=sys.stderr)
        return monitor.report()
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on from the last checkpoints", file=sys.stderr)
        return 130


def run_jobs(jobs: Sequence[DictConfig], processes: int) -> int:
    """Run these jobs as one sweep, in up to `processes` processes at a time; returns the exit status.

    Raises:
        ConfigError: a wrong option in any of them; none is started then.
    """
    _check(jobs, min(processes, len(jobs)))
    return _monitored(len(jobs), partial(_run_all, jobs, processes))


def _check(jobs: Sequence[DictConfig], processes: int) -> None:
    """Raise a ConfigError if one of these jobs cannot be. With several processes, torch is imported in them alone."""
    if processes > 1:
        workers.prepare()
    problem = workers.call(partial(_problem, jobs)) if processes > 1 else _problem(jobs)
    if problem is not None:
        raise ConfigError(problem)


def _problem(jobs: Sequence[DictConfig]) -> str | None:
    from bipolar import build

    try:
        for cfg in jobs:
            build.check_seed(cfg)
        for cfg in {sweep.but_for_seed(cfg): cfg for cfg in jobs}.values():
            build.check(cfg)
    except ConfigError as error:
        return str(error)
    except OmegaConfBaseException as error:
        return explain(error)
    return None


def _run_all(jobs: Sequence[DictConfig], processes: int) -> None:
    tasks: list[workers.Task] = [
        partial(execute, jobs[group[0]], group[0])
        if len(group) == 1
        else partial(execute_together, [jobs[number] for number in group], group)
        for group in sweep.ensembles(jobs)
    ]
    # where there is nothing for a second process to do, none is worth its start
    if processes > 1 and len(tasks) > 1 and sum(not is_done(run_folder(cfg)) for cfg in jobs) > 1:
        workers.run_all(tasks, processes)
        return
    for task in tasks:
        task()


def _plan(arguments: Sequence[str]) -> tuple[list[DictConfig], int | None] | None:
    """The checked jobs of a sweep, and in how many processes they are to run; None if this is no sweep."""
    args, unknown = get_args_parser().parse_known_args(list(arguments))
    if unknown:
        raise ConfigError(f"there is no flag {unknown[0]}; options are written key=value, without dashes: see --help")
    if not args.multirun or args.help or args.hydra_help or args.cfg or args.info:
        return None
    if args.config_path or args.config_name:
        raise ConfigError("--config-path and --config-name do not go with -m; --config-dir does")
    jobs, processes = sweep.plan(args.overrides, args.config_dir)
    to_do = [cfg for cfg in jobs if not is_done(run_folder(cfg))]
    if to_do:  # without it, torch is not imported
        _check(to_do, min(processes or 1, len(to_do)))
    folders = [run_folder(cfg) for cfg in jobs]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise ConfigError(f"two jobs of this sweep are the same run, {twice}")
    return jobs, processes


def explain(error: Exception) -> str:
    """One line for an error of Hydra's or OmegaConf's: what was wrong, what is allowed, the nearest name."""
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read: {str(error).splitlines()[0]}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        path = str(error.missing_cfg_file)
        group, _, name = path.rpartition("/") if path.startswith("hydra/") else path.partition("/")
        options = _all_options(group) or list(error.options)
        return f"{group}={name} is not there; choose from {', '.join(options)}{nearest(name, options)}"
    text = " ".join(line.strip() for line in str(error).splitlines()[:2] if line.strip())
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, OmegaConfBaseException) and cause.full_key and isinstance(cause.parent_node, DictConfig):
        keys = [str(key) for key in cause.parent_node]
        if not keys:
            key = text.split("'")[1] if text.startswith("Could not override '") else cause.full_key
            return f"there is no option {key}{_of_which_choice(str(key))}"
        if str(cause.key) not in keys:
            hint = nearest(str(cause.key), keys)
            return f"there is no option {cause.full_key}; the options there are {', '.join(keys)}{hint}"
    if text.startswith("Ambiguous value"):
        return f"{text} To sweep over the values, add -m"
    if "No match in the defaults list" in text or "Could not find match for" in text:
        name = text.split("'")[1]
        groups = sorted(path.name for path in sweep.CONFIGS.iterdir() if path.is_dir())
        return f"there is no configuration group {name}; choose from {', '.join(groups)}{nearest(name, groups)}"
    return text


def _of_which_choice(key: str) -> str:
    """For an option of a group: that it may be one of another choice."""
    group = key.split(".")[0]
    choices = _all_options(group)
    return f" with this choice of {group}; the choices are {', '.join(choices)}" if choices else ""


def _all_options(group: str) -> list[str]:
    """The files of a configuration group, those in subfolders too (as `quick/cnn`)."""
    folder = sweep.CONFIGS / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
