"""Sweeps: what jobs a command line stands for, and watching them run.

Hydra and its launchers run the jobs; they may do so in other processes. Each job leaves a small file in a temporary
folder, named by the environment variable BIPOLAR_SWEEP, when it ends; from these the parent process shows the
progress and knows the exit status. A file `stop` in the same folder asks every job to save itself and end.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bipolar.errors import ConfigError
from bipolar.runs import ensemble_size
from bipolar.workers import POLL_SECONDS, STOP_SIGNALS, cores, deaf

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
VARIABLE = "BIPOLAR_SWEEP"


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of one run, as the command line composes it."""
    import hydra

    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("train", list(overrides))


def expand(overrides: Sequence[str], extra_configs: str | None = None) -> list[DictConfig]:
    """The configurations of all jobs that `train.py -m` runs for these overrides: see `plan`."""
    return plan(overrides, extra_configs)[0]


def plan(overrides: Sequence[str], extra_configs: str | None = None) -> tuple[list[DictConfig], int | None]:
    """What `train.py -m` is to do for these overrides.

    The grid of an experiment or sweep file (`hydra.sweeper.params`) counts, and the overrides go before it.

    Args:
        overrides: as on the command line.
        extra_configs: a folder of further configurations, as `--config-dir` names it.

    Returns:
        The configurations of all jobs, in order; and in how many processes they are to run, None if Hydra's launcher
        has to see to that, because it is another than its basic one and joblib's, or has options of its own.

    Raises:
        ConfigError: a sweep over experiments, whose grids Hydra would silently leave out.
    """
    import hydra
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if extra_configs is not None:
        overrides = [f"hydra.searchpath=[file://{Path(extra_configs).absolute()}]", *overrides]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        fixed = []
        for text, parsed in zip(overrides, parser.parse_overrides(list(overrides)), strict=True):
            if not parsed.is_sweep_override():
                fixed.append(text)
            elif parsed.key_or_group in ("experiment", "sweep"):
                raise ConfigError(f"{text} is not allowed; each has a grid of its own: give one at a time")
        base = hydra.compose("train", fixed, return_hydra_config=True)
        grid = [f"{key}={value}" for key, value in (base.hydra.sweeper.get("params") or {}).items()]
        (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides([*grid, *overrides]), None)
        return _compose_all(jobs, parser), _processes(base.hydra.launcher)


def _processes(launcher: DictConfig) -> int | None:
    """In how many processes jobs are to run, if that is all that this launcher is asked: several if it is joblib's."""
    name = launcher._target_.rpartition(".")[2]
    if name == "BasicLauncher":
        return 1
    if name != "JoblibLauncher":
        return None
    from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf

    asked = {key: value for key, value in launcher.items() if value != getattr(JobLibLauncherConf, str(key), None)}
    count = asked.pop("n_jobs", -1)
    if asked:
        return None
    if count == 0:
        raise ConfigError("hydra.launcher.n_jobs=0 is not allowed; give the number of processes, -1 for all cores")
    return int(count) if count > 0 else max(1, cores() + 1 + int(count))


def _compose_all(jobs: list[list[str]], parser: Any) -> list[DictConfig]:
    """The configuration of each job, as hydra.compose makes it, but composing once for many.

    Composing takes a tenth of a second. Jobs that differ in plain values alone (a seed, a learning rate) share one
    composition, to which Hydra's own function then applies their values.
    """
    import hydra
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    composed: dict[tuple[str, ...], DictConfig] = {}
    configs = []
    for job in jobs:
        choices, values = _choices_and_values(job, parser)
        if choices not in composed:
            composed[choices] = hydra.compose("train", list(choices))
        config = copy.deepcopy(composed[choices])
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        configs.append(config)
    return configs


def _choices_and_values(job: Sequence[str], parser: Any) -> tuple[tuple[str, ...], list[Any]]:
    """The overrides with which a job has to be composed, and the parsed plain values, which can be applied later."""
    from hydra.core.override_parser.types import OverrideType

    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    choices, values = [], []
    overrides = parser.parse_overrides(list(job))
    # an addition or a deletion may speak of what another override sets: their order counts then
    is_plain = all(parsed.type == OverrideType.CHANGE for parsed in overrides)
    for text, parsed in zip(job, overrides, strict=True):
        is_value = parsed.package is None and parsed.key_or_group not in groups
        if is_plain and is_value and not parsed.key_or_group.startswith(("hydra", "/")):
            values.append(parsed)
        else:
            choices.append(text)
    return tuple(choices), values


def but_for_seed(cfg: DictConfig) -> str:
    """A text that is the same for configurations that differ in their seed alone."""
    description = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(description, dict)
    return json.dumps({**description, "seed": None}, sort_keys=True, default=str)


def ensembles(jobs: Sequence[DictConfig]) -> list[list[int]]:
    """The numbers of jobs that are to be trained together, in order: those that differ in their seed alone."""
    alike: dict[str, list[int]] = defaultdict(list)
    for number, cfg in enumerate(jobs):
        alike[str(number) if ensemble_size(cfg) == 1 else but_for_seed(cfg)].append(number)
    return [
        numbers[start : start + ensemble_size(jobs[numbers[0]])]
        for numbers in alike.values()
        for start in range(0, len(numbers), ensemble_size(jobs[numbers[0]]))
    ]


def report_job(number: int, record: dict[str, Any]) -> None:
    """Tell the process that watches the sweep, if there is one, how a job ended."""
    folder = os.environ.get(VARIABLE)
    if folder:
        temporary = Path(folder, f"{number}.new")
        temporary.write_text(json.dumps(record))
        temporary.replace(Path(folder, f"{number}.json"))


def is_worker() -> bool:
    """Whether this is a process that a launcher started: the terminal is its parent's."""
    folder = os.environ.get(VARIABLE)
    return folder is not None and Path(folder, "pid").read_text() != str(os.getpid())


class StopFile:
    """Callable that gives the reason to stop once the sweep was asked to; looks at the disk twice a second at most."""

    def __init__(self) -> None:
        folder = os.environ.get(VARIABLE)
        self._path = Path(folder, "stop") if folder else None
        self._reason: str | None = None
        self._next_look = 0.0

    def __call__(self) -> str | None:
        if self._path is not None and self._reason is None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + 0.5
            if self._path.exists():
                self._reason = self._path.read_text()
        return self._reason

    def request(self, reason: str) -> None:
        if self._path is not None:
            self._path.write_text(reason)


class Monitor:
    """Shows the jobs of a sweep as they end, and turns SIGINT and SIGTERM into a request to all jobs to stop."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.records: list[dict[str, Any]] = []
        self.stopped_by: str | None = None
        self._started = time.monotonic()
        self._is_stopping = False

    def __enter__(self) -> Monitor:
        self._folder = Path(tempfile.mkdtemp(prefix="bipolar-sweep-"))
        (self._folder / "pid").write_text(str(os.getpid()))
        os.environ[VARIABLE] = str(self._folder)
        self._seen: set[Path] = set()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, desc="sweep", unit="run", dynamic_ncols=True, position=0)
        self._previous = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        # Hydra's launchers start their workers from here on. This process still hears of signals, through the thread.
        self._deaf = deaf()
        self._deaf.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deaf.__exit__(kind, value, trace)
        self._ended.set()
        self._thread.join()
        self._collect()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        stop = self._folder / "stop"
        self.stopped_by = stop.read_text() if stop.exists() else None
        if self._bar is not None:
            self._bar.close()
        del os.environ[VARIABLE]
        shutil.rmtree(self._folder, ignore_errors=True)

    def _stop(self, number: int, frame: Any) -> None:
        if self._is_stopping:
            raise KeyboardInterrupt  # the second one does not wait
        self._is_stopping = True
        (self._folder / "stop").write_text(signal.Signals(number).name)
        self._write("stopping: every running job saves a checkpoint first (once more to stop at once)")

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self._collect()

    def _collect(self) -> None:
        for path in sorted(self._folder.glob("*.json"), key=lambda path: int(path.stem)):
            if path not in self._seen:
                self._seen.add(path)
                self.records.append(json.loads(path.read_text()))
                self._write(f"[{len(self.records)}/{self.total}] {self.records[-1]['line']}")
                if self._bar is not None:
                    self._bar.update(1)
                    self._bar.set_postfix_str(self.records[-1].get("figures", ""))

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def report(self) -> int:
        """Print how the sweep ended; returns the exit status: 0, 1 (a run failed), 2 (a wrong value), 130 or 143."""
        counts: dict[str, int] = {}
        for record in self.records:
            counts[record["status"]] = counts.get(record["status"], 0) + 1
        text = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        print(f"{len(self.records)} of {self.total} runs: {text or 'none'} ({time.monotonic() - self._started:.1f} s)")
        for record in self.records:
            if record["status"] in ("failed", "refused"):
                print(f"  {record['line']}", file=sys.stderr)
        if self.stopped_by:
            return 128 + signal.Signals[self.stopped_by]
        if "failed" in counts or len(self.records) < self.total:
            return 1
        return 2 if "refused" in counts else 0
