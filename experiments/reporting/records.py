"""The archive of a claim's finished runs: small enough to commit, whole enough to redraw every figure from it.

    runs.csv            for people: a row per run with the options that differ, its status and its final figures
    records.jsonl.xz    for the report: all of `bipolar.runs.Run`, but for times (`wall_seconds` is kept), paths, and
                        statistics of activations that no figure shows

The first line of the records is what the runs share of configuration and environment; a line per run follows, with
what is its own. Metrics keep every digit, since equal losses are a result; statistics of activations have six.
The same runs give the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bipolar.errors import DataError
from bipolar.recording.folder import ACTIVATIONS, METRICS, SUMMARY, Record, jsonable, write_json
from bipolar.runs import Run
from experiments import part_of

RECORDS, TABLE = "records.jsonl.xz", "runs.csv"
FORMAT = 1
TIMES = ("training_seconds", "images_per_second", "characters_per_second")
"""Left out wherever they stand: they differ each time the same run is made."""
PLACES = ("output_root", "data", "logger")
"""Options that say where a run is carried out and reported."""
FIELDS = (
    "step", "layer", "index", "mean", "variance", "channel_mean_norm", "zero_fraction", "pre_mean", "pre_variance",
    "gradient_norm",
)  # fmt: skip
"""Columns of activations.jsonl that are kept; the epoch follows from the step."""


def write(folder: Path, runs: Sequence[Run]) -> list[Path]:
    """Write the archive of `runs`, in their order, into `folder`. Returns the files written."""
    kept = [_kept(run) for run in runs]
    shared = {key: _shared([record[key] for record in kept]) for key in ("config", "environment")}
    lines = [{"format": FORMAT, "runs": len(kept), **shared}]
    for record in kept:
        own = {key: _difference(record[key], shared[key]) for key in shared}
        tables = {key: _columns(record[key]) for key in ("metrics", "activations")}
        lines.append({**own, "summary": record["summary"], **tables})
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORDS).write_bytes(lzma.compress(text.encode(), preset=6))
    (folder / TABLE).write_text(table(runs), encoding="utf-8")
    return [folder / RECORDS, folder / TABLE]


def read(folder: Path) -> list[Run]:
    """The runs of an archive. `Run.folder` is a name only: `<experiment name>/<run id>`.

    Raises:
        DataError: there is no archive, or it is damaged.
    """
    path = folder / RECORDS
    try:
        head, *lines = [json.loads(line) for line in lzma.decompress(path.read_bytes()).splitlines()]
        if head["format"] != FORMAT:
            raise DataError(f"{path} has format {head['format']}; this code reads format {FORMAT}")
        if len(lines) != head["runs"]:
            raise DataError(f"{path} is damaged: {len(lines)} of {head['runs']} runs")
        return [_run(head, line) for line in lines]
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there; scripts/reproduce.py writes it") from error
    except (OSError, EOFError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def restore(folder: Path, output_root: Path) -> int:
    """Make run folders of an archive's runs below `output_root`, where they then count as finished.

    So an experiment can be extended on another machine without making its runs again. What is in a run folder and not
    in the archive (checkpoints, times, paths) does not come back. Run folders that are there are left alone.

    Returns:
        How many run folders were made.

    Raises:
        DataError: as `read`.
    """
    made = 0
    for run in read(folder):
        target = output_root / run.folder
        if target.exists():
            continue
        temporary = target.with_name(target.name + ".new")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        OmegaConf.save(run.config, temporary / "config.yaml")
        write_json(temporary / "environment.json", run.environment)
        for name, rows in ((METRICS, run.metrics), (ACTIVATIONS, run.activations)):
            text = "".join(json.dumps(jsonable(row), allow_nan=False) + "\n" for row in rows)
            (temporary / name).write_text(text, encoding="utf-8")
        write_json(temporary / SUMMARY, run.summary)
        temporary.rename(target)
        made += 1
    return made


def _run(head: Record, line: Record) -> Run:
    options = _merged(head["config"], line["config"])
    return Run(
        folder=Path(options["experiment_name"], line["summary"]["run_id"]),
        options=options,
        summary=line["summary"],
        environment=_merged(head["environment"], line["environment"]),
        metrics=_rows(line["metrics"]),
        activations=_rows(line["activations"]),
    )


def part(run: Run) -> str:
    """The part of the claim's grids that a run is of; an empty text for the main one."""
    return part_of(run.options["experiment_name"])


def parts(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each part, in order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(part(run), []).append(run)
    return groups


def options(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each run, the options in which the runs differ, by their names on the command line (`optimizer.lr`)."""
    flat = [_flat(_config(run)) for run in runs]
    names = [name for name in set().union(*flat) if not _is_given(name)]
    names.sort(key=lambda name: name.removesuffix(".name"))  # a choice before its options
    differ = [name for name in names if len({_text(each[name]) if name in each else None for each in flat}) > 1]
    return [{name.removesuffix(".name"): each[name] for name in differ if name in each} for each in flat]


def table(runs: Sequence[Run]) -> str:
    """`runs.csv`: empty where a run has no such option or figure, `null` for a figure that was not finite."""
    rows = []
    for run, own in zip(runs, options(runs), strict=True):
        figures = _flat({key: run.summary.get(key) or {} for key in ("final", "best")})
        counts = {key: run.summary.get(key) for key in ("steps", "parameters")}
        head = {"run": run.folder.name, "part": part(run), **own, "seed": run.seed, "status": run.summary["status"]}
        rows.append({key: _text(value) for key, value in {**head, **counts, **figures}.items()})
    text = io.StringIO()
    writer = csv.DictWriter(text, _names(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _names(rows: list[dict[str, str]]) -> list[str]:
    """The columns: what all runs have frames the options that only some have."""
    ends = ("seed", "status", "steps", "parameters")
    names = list(dict.fromkeys(name for row in rows for name in row))
    figures = [name for name in names if name.startswith(("final.", "best."))]
    return [name for name in names if name not in ends and name not in figures] + [*ends, *figures]


def _is_given(name: str) -> bool:
    """Whether an option follows from what the table says anyway."""
    return name.endswith("_target_") or name in ("experiment_name", "seed")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _config(run: Run) -> Record:
    """The configuration without the places of one machine."""
    return _without_paths({key: value for key, value in run.options.items() if key not in PLACES})


def _kept(run: Run) -> Record:
    return {
        "config": _config(run),
        "environment": _without_paths({key: value for key, value in run.environment.items() if key != "command"}),
        "summary": {**_without(run.summary, TIMES), "run_id": run.folder.name},
        "metrics": [_without(row, TIMES) for row in run.metrics],
        "activations": [{key: _rounded(row[key]) for key in FIELDS if key in row} for row in run.activations],
    }


def _without(record: Record, keys: Iterable[str]) -> Record:
    return {key: value for key, value in record.items() if key not in keys}


def _without_paths(value: Any) -> Any:
    """`value` with each path that leads out of the current folder replaced by the file's name; keys in order."""
    if isinstance(value, dict):
        return {key: _without_paths(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("../", "~"))):
        return Path(value).name
    return value


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _flat(record: Record, prefix: str = "") -> Record:
    """Nested dictionaries as one with dotted names."""
    flat: Record = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _shared(records: Sequence[Record]) -> Record:
    """What all the (nested) dictionaries have in common."""
    if not records:
        return {}
    shared: Record = {}
    for key, value in records[0].items():
        if not all(key in record for record in records):
            continue
        values = [record[key] for record in records]
        if all(isinstance(each, dict) for each in values):
            shared[key] = _shared(values)
        elif len({json.dumps(each) for each in values}) == 1:  # by their text: 1 is not 1.0 is not true
            shared[key] = value
    return shared


def _difference(record: Record, shared: Record) -> Record:
    """What of `record` is not in `shared`."""
    own: Record = {}
    for key, value in record.items():
        if key not in shared:
            own[key] = value
        elif isinstance(value, dict) and (rest := _difference(value, shared[key])):
            own[key] = rest
    return own


def _merged(shared: Record, own: Record) -> Record:
    """The inverse of `_difference`."""
    merged = dict(shared)
    for key, value in own.items():
        merged[key] = _merged(shared[key], value) if isinstance(shared.get(key), dict) else value
    return merged


def _columns(rows: list[Record]) -> Record:
    """Rows as columns. `kinds`: the sets of keys that occur; `rows`: the kind of each row."""
    kinds = list(dict.fromkeys(tuple(row) for row in rows))
    keys = dict.fromkeys(key for kind in kinds for key in kind)
    values = {key: [row[key] for row in rows if key in row] for key in keys}
    return {"kinds": kinds, "rows": [kinds.index(tuple(row)) for row in rows], "values": values}


def _rows(columns: Record) -> list[Record]:
    """The inverse of `_columns`."""
    values = {key: iter(column) for key, column in columns["values"].items()}
    return [{key: next(values[key]) for key in columns["kinds"][kind]} for kind in columns["rows"]]
