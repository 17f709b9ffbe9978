"""Measurements as JSON and as a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.timing import Limits, Measurement
from bipolar.environment import commit, machine, versions
from bipolar.recording.folder import Record, read_json, write_json

JSON, TABLE = "bench.json", "bench.md"


def line(each: Measurement) -> str:
    met = {True: "met", False: "NOT met", None: "for information"}[each.met]
    return f"{each.group}: {each.name} against {each.peer}: {_ratio(each)} ({met})"


def write(root: Path, made: Sequence[Measurement], limits: Limits, threads: int, quick: bool) -> Path:
    """Write both files; groups that were not measured now are kept as they were. Returns the machine's folder."""
    on = _environment(limits, threads, quick)
    folder = root / slug(on)
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, Record] = read_json(folder / JSON)["groups"] if (folder / JSON).exists() else {}
    for each in made:
        groups[each.group] = {"environment": on, "measurements": []}
    for each in made:
        groups[each.group]["measurements"].append(each.record())
    write_json(folder / JSON, {"groups": groups})
    (folder / TABLE).write_text(table(groups), encoding="utf-8")
    return folder


def _environment(limits: Limits, threads: int, quick: bool) -> Record:
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": machine(), "accelerator": accelerator, "threads": threads, "versions": versions(), "quick": quick,
        "commit": commit()["commit"], "dirty": commit()["dirty"], "limits": asdict(limits),
    }  # fmt: skip


def slug(on: Record) -> str:
    """A folder's name for a machine."""
    text = f"{on['accelerator'] or on['machine']['processor']} {on['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def table(groups: dict[str, Record]) -> str:
    """All groups as Markdown."""
    parts = ["# Benchmarks", _explanation()]
    for group, content in groups.items():
        on = content["environment"]
        limits, revision = on["limits"], (on["commit"] or "?")[:12]
        parts.append(f"## {group}")
        parts.append(
            f"{on['accelerator'] or on['machine']['processor']}, {on['threads']} threads, torch "
            f"{on['versions'].get('torch', '?')}, Python {on['versions']['python']}, commit {revision}"
            + (f" with changes {on['dirty']}" if on["dirty"] else "")
            + (", quick: no figures to quote" if on["quick"] else "")
            + f". Limits: copy {limits['bandwidth'] / 1e9:.1f} GB/s, products {limits['operations'] / 1e9:.0f} GFLOP/s."
        )
        rows = ["| what | against | ratio [quartiles] | target | met | time | fraction of limit |", "|" + "---|" * 7]
        for record in content["measurements"]:
            each = Measurement(**{key: value for key, value in record.items() if key != "met"})
            target = _target(each)
            met = {True: "yes", False: "**no**", None: "–"}[each.met]
            fraction = "–" if each.fraction_of_limit is None else f"{each.fraction_of_limit:.0%}"
            cells = [each.name, each.peer, _ratio(each), target, met, _seconds(each.seconds), fraction]
            rows.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _target(each: Measurement) -> str:
    if each.at_most is not None:
        return f"≤ {each.at_most:g} s"
    return "–" if each.target is None else f"{'≥' if each.speedup else '≤'} {each.target:g}"


def _explanation() -> str:
    return (
        "Made by `make bench`. Both sides of a row are measured in turn in one process: the median of the ratios of "
        "neighbours, with its quartiles. `x` is a speed-up (their time / ours); other ratios are ours / theirs. The "
        "limit is the least time that the bytes moved or the products need at this machine's measured rates (those of "
        "memory, so that what stays in a cache can be above 100 %)."
    )


def _ratio(each: Measurement) -> str:
    unit = "x" if each.speedup else ""
    return f"{each.ratio:.2f}{unit} [{each.low:.2f}, {each.high:.2f}]"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"
