"""Whether `results/<profile>/` is made from just these runs by just this code. Imports nothing that takes time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bipolar.recording.folder import Record, read_summary
from bipolar.runs import Run

PROVENANCE = "provenance.json"
CODE = ("*.py", "*.html")
TIMES = ("wall_seconds", "training_seconds", "images_per_second", "characters_per_second")
ENVIRONMENT = ("commit", "dirty", "versions", "machine", "device", "accelerator", "precision", "threads")


def digest(summaries: Iterable[tuple[str, Record]]) -> str:
    """Of all that a report is made from: run ids, the runs' summaries without their times, the code in `experiments/`.

    It is the same whether the summaries come from run folders or from an archive of them, in whatever order.
    """
    code = sorted(path for pattern in CODE for path in Path(__file__).parents[1].rglob(pattern))
    parts = [path.read_bytes() for path in code]
    for name, summary in sorted(summaries, key=lambda pair: pair[0]):
        lasting = {key: value for key, value in summary.items() if key not in TIMES}
        parts.append(f"{name} {json.dumps(lasting, sort_keys=True)}".encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def of_runs(runs: Iterable[Run]) -> str:
    """The digest of runs."""
    return digest((_name(run.folder), run.summary) for run in runs)


def is_current(results: Path, folders: Sequence[Path]) -> bool:
    """Whether `results` was made from the runs in these folders by this code, and no file of it is missing."""
    provenance = read(results)
    return (
        provenance.get("digest") == digest((_name(folder), read_summary(folder) or {}) for folder in folders)
        and all((results / name).exists() for name in provenance["files"])
    )  # fmt: skip


def read(results: Path) -> Record:
    """The provenance of a profile's results; empty where there is none or it cannot be read."""
    try:
        provenance = json.loads((results / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return provenance if isinstance(provenance, dict) else {}


def environment(runs: Sequence[Run]) -> dict[str, Any]:
    """What the runs ran on; a list where they differ."""

    def common(key: str) -> Any:
        found = {json.dumps(run.environment.get(key), sort_keys=True): run.environment.get(key) for run in runs}
        values = list(found.values())
        return values[0] if len(values) == 1 else values

    return {key: common(key) for key in ENVIRONMENT}


def _name(folder: Path) -> str:
    """Of a run: a part of a claim may hold a run of the same id as another part."""
    return f"{folder.parent.name}/{folder.name}"
