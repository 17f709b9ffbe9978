"""What a user waits for: starting a run, help, skipping a finished run; and a sweep in parallel against one in turn.

The peer of a start is `import torch` in the same Python, below which no start of a training can go.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.timing import Case, scratch

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("network.depth=4", "network.width=64", "trainer.epochs=40")


def seconds(*command: str) -> Callable[[], float]:
    def action() -> float:
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return time.perf_counter() - started

    return action


def cases(quick: bool) -> Iterator[Case]:
    root = scratch()
    train = (sys.executable, "scripts/train.py")
    bare = seconds(sys.executable, "-c", "import torch")
    fresh = iter(range(10**6))

    def first_step() -> float:
        return seconds(*train, "trainer.max_steps=1", f"output_root={root}/{next(fresh)}")()

    skipped = seconds(*train, "trainer.max_steps=1", f"output_root={root}/done")
    if not quick:
        skipped()
    for name, action, at_most in (
        ("from shell to the end of a run of one step", first_step, 8.0),
        ("--help", seconds(*train, "--help"), 5.0),
        *([] if quick else [("skipping a finished run", skipped, 3.0)]),
    ):
        yield Case(name, "import torch", action, bare, None, at_most=at_most, times_itself=True)
    if quick:
        return

    def sweep(*launcher: str) -> Callable[[], float]:
        grid = ("-m", "seed=range(8)", *SMALL)
        return lambda: seconds(*train, *grid, *launcher, f"output_root={root}/{next(fresh)}")()

    parallel = sweep("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    yield Case("8 runs, joblib launcher", "one after another", parallel, sweep(), 1.7, speedup=True, times_itself=True)
