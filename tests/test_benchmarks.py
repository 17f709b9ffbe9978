"""The benchmarks: that they measure what they say, and that all of them run."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import GROUPS, report
from benchmarks.timing import Case, Limits, Measurement, measure
from bipolar.sweep import CONFIGS

ROOT = CONFIGS.parent
LIMITS = Limits(bandwidth=1e9, operations=1e9)


def case(ours: list[float], theirs: list[float], **options: object) -> Case:
    """A case whose sides take these seconds in turn."""
    sides = [itertools.cycle(ours), itertools.cycle(theirs)]
    actions = [lambda side=side: next(side) for side in sides]
    return Case("what", "whom", *actions, times_itself=True, **{"target": None, **options})  # type: ignore[arg-type]


def test_ratio_is_the_median_of_the_ratios_of_neighbours() -> None:
    made = measure("group", case([1.0, 10.0, 3.0], [1.0, 5.0, 1.0]), LIMITS, repeats=3, shortest=0)
    assert made.ratio == 2
    assert (made.low, made.high) == (1.5, 2.5)
    assert (made.seconds, made.peer_seconds) == (3, 1)
    assert measure("group", case([1.0], [4.0], speedup=True), LIMITS, 1, 0).ratio == 4


def test_sides_take_turns_in_going_first() -> None:
    order: list[str] = []
    actions = [lambda name=name: order.append(name) or 1.0 for name in "ab"]
    measure("group", Case("what", "whom", *actions, None, times_itself=True), LIMITS, 4, 0)
    assert "".join(order) == "abbaabba"


@pytest.mark.parametrize(
    ("speedup", "target", "met"), [(False, 2.0, True), (False, 1.9, False), (True, 0.5, True), (True, 0.6, False)]
)
def test_a_target_is_met_at_it(speedup: bool, target: float, met: bool) -> None:
    assert measure("group", case([2.0], [1.0], target=target, speedup=speedup), LIMITS, 1, 0).met is met


def test_fraction_of_the_limit_is_of_whatever_binds() -> None:
    options = {"moved": 1e9, "operations": 5e8}
    assert measure("group", case([4.0], [1.0], **options), LIMITS, 1, 0).fraction_of_limit == 0.25
    assert measure("group", case([4.0], [1.0]), LIMITS, 1, 0).fraction_of_limit is None


def test_short_actions_are_repeated_and_times_are_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], [0]

    def action() -> None:
        calls[0] += 1
        now[0] += 0.001

    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: now[0])
    made = measure("group", Case("what", "whom", action, action, None), LIMITS, repeats=1, shortest=0.1)
    assert made.seconds == pytest.approx(0.001)
    assert calls[0] == pytest.approx(2 * (2 + 100), abs=4)


def made(group: str, ratio: float) -> Measurement:
    return Measurement(group, "what", "whom", ratio, ratio, ratio, 2.0, False, 1.0, 1.0, 3, None, None)


def test_groups_that_are_not_measured_again_stay(tmp_path: Path) -> None:
    report.write(tmp_path, [made("a", 1.0), made("b", 3.0)], LIMITS, 1, True)
    folder = report.write(tmp_path, [made("b", 1.5)], LIMITS, 1, True)
    groups = json.loads((folder / report.JSON).read_text())["groups"]
    assert {name: group["measurements"][0]["ratio"] for name, group in groups.items()} == {"a": 1.0, "b": 1.5}
    assert groups["b"]["measurements"][0]["met"] is True
    text = (folder / report.TABLE).read_text()
    assert "| what | whom | 1.50 [1.50, 1.50] | ≤ 2 | yes | 1.00 s | – |" in text


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *arguments]
    return subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_group_runs(tmp_path: Path) -> None:
    done = benchmark("--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    groups = json.loads((folder / report.JSON).read_text())["groups"]
    assert set(groups) == set(GROUPS)
    assert all(each["ratio"] > 0 for group in groups.values() for each in group["measurements"])
    assert "quick: no figures to quote" in (folder / report.TABLE).read_text()


def test_wrong_arguments_are_named_in_one_line() -> None:
    done = benchmark("activation")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "did you mean 'activations'" in done.stderr
