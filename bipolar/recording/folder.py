"""The run folder: one training, complete in itself.

    config.yaml           the resolved configuration
    environment.json      versions, commit, device, threads, command
    changes.diff          what the code had beyond that commit, if anything
    initialization.json   what the initialization did, layer by layer
    metrics.jsonl         a line per logged step and split: step, epoch, split, loss, error; for split=train also
                          learning_rate and images_per_second (of a text: bits_per_character, characters_per_second)
    activations.jsonl     a line per measured step and layer, see bipolar/statistics.py
    checkpoint.pt         model, optimizer and all else that a resumed run needs
    summary.json          status, final and best figures, wall time; absent while a run is going on or was killed

Numbers that are not finite are written as null, which every JSON reader understands.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

Record = dict[str, Any]

METRICS, ACTIVATIONS, SUMMARY = "metrics.jsonl", "activations.jsonl", "summary.json"
STATUSES = ("finished", "diverged", "failed", "interrupted")
DONE = ("finished", "diverged")
"""Statuses of runs that have nothing left to do: diverging is a result."""


def jsonable(value: Any) -> Any:
    """`value` with every float that is not finite replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[Record]:
    """The records of a .jsonl file; a last line that a killed process left incomplete is passed over."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1] if line]


def read_summary(folder: Path) -> Record | None:
    """The summary of a run folder, or None where there is none (the run is going on, was killed, or never began)."""
    path = folder / SUMMARY
    return read_json(path) if path.exists() else None


class FileRecorder:
    """Appends records to the run folder's .jsonl files; each line is handed to the operating system at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, FileIO] = {}

    def __enter__(self) -> FileRecorder:
        self._files = {name: (self.folder / name).open("ab", buffering=0) for name in (METRICS, ACTIVATIONS)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def metrics(self, record: Record) -> None:
        self._append(METRICS, [record])

    def activations(self, records: list[Record]) -> None:
        self._append(ACTIVATIONS, records)

    def _append(self, name: str, records: Iterable[Record]) -> None:
        file = self._files[name]
        file.write("".join(json.dumps(jsonable(record), allow_nan=False) + "\n" for record in records).encode())

    def positions(self) -> dict[str, int]:
        """The length of each file in bytes, for a checkpoint: so much of it is safely on the disk."""
        for file in self._files.values():
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def rewind(self, positions: dict[str, int]) -> None:
        """Drop all that was written after `positions`: a resumed run writes it again."""
        for name, file in self._files.items():
            file.truncate(positions.get(name, 0))
            file.seek(0, 2)
