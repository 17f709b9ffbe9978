"""From finished runs to `results/<profile>/`: figures, tables, report. All text with numbers is made from the runs."""

from __future__ import annotations

import csv
import hashlib
import importlib
import inspect
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from bipolar.recording.folder import SUMMARY, write_json
from bipolar.runs import Run, read_run
from experiments.plots import style
from experiments.summaries import CONFIDENCE
from experiments.tables import Row

PROVENANCE = "provenance.json"


def digest(folders: list[Path]) -> str:
    """Of all that the report is made from: the runs' summaries and the code in this folder."""
    parts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    parts += [folder.name.encode() + (folder / SUMMARY).read_bytes() for folder in folders]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def is_current(results: Path, folders: list[Path]) -> bool:
    """Whether `results` was made from just these runs by just this code, and is whole."""
    path = results / PROVENANCE
    if not path.exists():
        return False
    provenance = json.loads(path.read_text(encoding="utf-8"))
    return provenance["digest"] == digest(folders) and all((results / name).exists() for name in provenance["files"])


def write(profile: str, claims: dict[str, list[Path]], results: Path, command: str) -> list[Path]:
    """Write figures, tables and `report.md` for the runs of each claim. Returns the files written."""
    import matplotlib.pyplot as plt

    results.mkdir(parents=True, exist_ok=True)
    sections, files = [], []
    runs_of = {claim: [read_run(folder) for folder in folders] for claim, folders in claims.items()}
    for claim, runs in runs_of.items():
        module = importlib.import_module(f"experiments.{claim}")
        folder = results / claim
        folder.mkdir(exist_ok=True)
        with style():
            drawn = module.figure(runs)
            for suffix in ("png", "svg"):
                # no date in the file: the same runs give the same bytes
                metadata = {"Date": None} if suffix == "svg" else {"Software": None}
                drawn.savefig(folder / f"figure.{suffix}", dpi=160, metadata=metadata)
        plt.close(drawn)
        rows = module.table(runs)
        (folder / "table.csv").write_text(_csv(rows), encoding="utf-8")
        (folder / "table.md").write_text(_markdown(rows) + "\n", encoding="utf-8")
        files += [folder / f"{stem}" for stem in ("figure.png", "figure.svg", "table.csv", "table.md")]
        sections.append(_section(profile, claim, module, runs, rows))
    everything = [run for runs in runs_of.values() for run in runs]
    provenance = {
        "profile": profile,
        "command": command,
        **_environment(everything),
        "runs": len(everything),
        "digest": digest([run.folder for run in everything]),
        "files": [str(file.relative_to(results)) for file in files] + ["report.md"],
    }
    report = results / "report.md"
    report.write_text("\n".join([_head(profile, provenance), *sections, _tail(provenance)]), encoding="utf-8")
    write_json(results / PROVENANCE, provenance)
    return [*files, report, results / PROVENANCE]


def title(module: ModuleType) -> str:
    return (module.__doc__ or module.__name__).split("\n", 1)[0]


def _section(profile: str, claim: str, module: ModuleType, runs: list[Run], rows: list[Row]) -> str:
    text = inspect.cleandoc((module.__doc__ or "").split("\n", 1)[1])
    return f"""## {title(module)}

{text}

**What was run.** {_what_was_run(runs)}

![{title(module)}: the curves are described by the panels' titles; the numbers are in the table](\
{claim}/figure.png)

Dashed: base activations; solid: their bipolar versions. Lines are means over seeds, bands reach from the smallest to
the largest run.

{_markdown(rows)}

Values are means over runs ± half the width of a {CONFIDENCE:.0%} confidence interval (Student's t). \
|layer mean| is the mean over layers of the absolute mean activation.

Again: `python scripts/train.py -m experiment={profile}/{claim}`
"""


def _what_was_run(runs: list[Run]) -> str:
    """In words, from the runs' configurations."""
    config = runs[0].config
    seeds = sorted({run.seed for run in runs})
    activations = list(dict.fromkeys(run.activation for run in runs))
    network = ", ".join(f"{key} {value}" for key, value in config.network.items() if key not in ("name", "_target_"))
    steps = sorted({run.summary["total_steps"] for run in runs})
    training = (
        "not trained"
        if steps == [0]
        else f"{_listed(steps)} updates of {config.trainer.batch_size} samples, {config.optimizer.name} at learning "
        f"rate {config.optimizer.lr:g} ({config.scheduler.name}), the same for every activation"
    )
    return (
        f"{len(runs)} runs: {_listed(activations)}, each with seeds {_listed(seeds)}. Network {config.network.name} "
        f"({network}); data {config.dataset.name}; initialization {config.init.name}; {training}."
    )


def _listed(items: list[Any]) -> str:
    return ", ".join(map(str, items))


def _environment(runs: list[Run]) -> dict[str, Any]:
    """What the runs ran on; a list where they differ."""

    def common(key: str) -> Any:
        found = list({json.dumps(run.environment[key], sort_keys=True): run.environment[key] for run in runs}.values())
        return found[0] if len(found) == 1 else found

    return {key: common(key) for key in ("commit", "dirty", "versions", "machine", "device", "precision", "threads")}


def _head(profile: str, provenance: dict[str, Any]) -> str:
    return f"""# Results, profile `{profile}`

Made by `{provenance["command"]}` from {provenance["runs"]} runs. Every number below is computed from their records.
"""


def _tail(provenance: dict[str, Any]) -> str:
    rows = [
        {"": key, "value": json.dumps(provenance[key]) if not isinstance(provenance[key], str) else provenance[key]}
        for key in ("commit", "dirty", "versions", "machine", "device", "precision", "threads")
    ]
    return f"## Environment of the runs\n\n{_markdown(rows)}\n"


def _csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(rows: list[Row]) -> str:
    escape = lambda value: value.replace("|", "\\|")
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(escape(value) for value in line) + " |" for line in lines)
