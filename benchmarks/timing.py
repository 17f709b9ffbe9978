"""Measuring: two sides in turn, again and again, and the median of the ratios of neighbours.

Neighbours in time share whatever else the machine does, so that a ratio is steadier than the times it is made of. The
side that goes first changes every time.
"""

from __future__ import annotations

import atexit
import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Action = Callable[[], Any]
Seconds = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """Something to be measured against something else that does the same."""

    name: str
    peer: str
    """What it is measured against, in words."""
    ours: Action
    theirs: Action
    target: float | None
    """Of `ratio`: at most this; of a speed-up at least this. None: for information."""
    speedup: bool = False
    """Report how many times as fast (their time / ours) instead of how many times as long."""
    moved: float = 0.0
    """Bytes that the work must at least read and write."""
    operations: float = 0.0
    """Floating-point operations that it must at least do."""
    at_most: float | None = None
    """Seconds that ours may take, where people wait for it: the target then, in place of one for the ratio."""
    times_itself: bool = False
    """The two actions return the seconds that count, instead of being timed from outside."""


@dataclass(frozen=True)
class Limits:
    """What the machine can do, measured in the same run: bytes/s copied in memory, operations/s of a large product."""

    bandwidth: float
    operations: float

    def seconds(self, case: Case) -> float:
        """The least time that the work of `case` can take on this machine, by its roofline."""
        return max(case.moved / self.bandwidth, case.operations / self.operations)


@dataclass(frozen=True)
class Measurement:
    group: str
    name: str
    peer: str
    ratio: float
    low: float
    """Lower quartile of the ratios."""
    high: float
    target: float | None
    speedup: bool
    seconds: float
    """Of one call of ours: the median."""
    peer_seconds: float
    repeats: int
    at_most: float | None
    fraction_of_limit: float | None
    """The least possible time / ours; above 1 where caches beat the memory that the limit is measured in."""

    @property
    def met(self) -> bool | None:
        if self.at_most is not None:
            return self.seconds <= self.at_most
        if self.target is None:
            return None
        return self.ratio >= self.target if self.speedup else self.ratio <= self.target

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


FEWEST, BUDGET = 3, 15.0
"""After so many seconds a case has enough pairs of samples, if it has so many."""


def measure(group: str, case: Case, limits: Limits, repeats: int, shortest: float) -> Measurement:
    """Measure a case.

    Args:
        repeats: pairs of samples, fewer where they take long.
        shortest: seconds; a sample repeats its action until it takes that long.
    """
    ours, theirs = (_timer(action, case.times_itself, shortest) for action in (case.ours, case.theirs))
    pairs = []
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        for turn in range(repeats):
            if turn >= FEWEST and time.perf_counter() - started > BUDGET:
                break
            if turn % 2:
                b, a = theirs(), ours()
            else:
                a, b = ours(), theirs()
            pairs.append((a, b))
    finally:
        gc.enable()
    ratios = [b / a if case.speedup else a / b for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    seconds = statistics.median(a for a, _ in pairs)
    least = limits.seconds(case)
    return Measurement(
        group=group, name=case.name, peer=case.peer, ratio=middle, low=low, high=high, target=case.target,
        speedup=case.speedup, seconds=seconds, peer_seconds=statistics.median(b for _, b in pairs), repeats=len(pairs),
        at_most=case.at_most,
        fraction_of_limit=least / seconds if least else None,
    )  # fmt: skip


def _timer(action: Action, times_itself: bool, shortest: float) -> Seconds:
    """A function that returns the seconds of one call of `action`, which it has warmed up."""
    if times_itself:
        return lambda: float(action())
    action()
    started = time.perf_counter()
    action()
    synchronize()
    calls = max(1, round(shortest / max(time.perf_counter() - started, 1e-9)))

    def sample() -> float:
        started = time.perf_counter()
        for _ in range(calls):
            action()
        synchronize()
        return (time.perf_counter() - started) / calls

    return sample


def scratch() -> Path:
    """A folder that is there until this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="bipolar-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def limits(quick: bool) -> Limits:
    """Measure what this machine can do, with as many threads as torch uses."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 2**24 if quick else 2**27  # floats: far above any cache
    source, target = torch.ones(size, device=device), torch.empty(size, device=device)
    n = 1024 if quick else 2048
    a, b, c = (torch.randn(n, n, device=device) for _ in range(3))
    copy = min(_timer(lambda: target.copy_(source), False, 0.0)() for _ in range(5))
    product = min(_timer(lambda: torch.mm(a, b, out=c), False, 0.0)() for _ in range(5))
    return Limits(bandwidth=2 * 4 * size / copy, operations=2 * n**3 / product)
