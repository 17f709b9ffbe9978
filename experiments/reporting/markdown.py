"""The report's text. Every number in it is made from the runs; a claim's words come from its file's docstrings."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from matplotlib.figure import Figure

from bipolar.recording.folder import Record
from bipolar.runs import Run
from experiments.analysis import inference
from experiments.analysis.inference import Effect, Verdict
from experiments.analysis.plots import label
from experiments.analysis.summaries import Row
from experiments.reporting import records

DATA_FILES = {"cifar10-heldout.npz": "CIFAR-10, batch 5 held out"}
DATA_SETS = {
    "digits": "scikit-learn's digits",
    "gaussian": "synthetic normal inputs",
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "ptb": "Penn Treebank as characters",
    "text8": "Text8",
    "python_docs": "the documentation that ships with Python, as characters",
}


@dataclass(frozen=True)
class Claim:
    """A claim's file, its runs, and what the one makes of the other."""

    name: str
    module: ModuleType
    runs: list[Run]
    rows: list[Row]
    verdict: Verdict

    @property
    def title(self) -> str:
        return (self.module.__doc__ or self.name).split("\n", 1)[0]

    @property
    def statement(self) -> str:
        return inspect.cleandoc((self.module.__doc__ or "").partition("\n")[2])

    @property
    def figures(self) -> dict[str, Callable[[list[Run]], Figure]]:
        return figures_of(self.module)

    def caption(self, name: str) -> str:
        return first_paragraph(self.figures[name]) or self.title


def figures_of(module: ModuleType) -> dict[str, Callable[[list[Run]], Figure]]:
    """A claim's functions that draw, by the names of their files; the main figure first."""
    return {"figure": module.figure, **getattr(module, "more_figures", {})}


def first_paragraph(function: Callable[..., Any]) -> str:
    """Of a function's docstring, in one line."""
    return " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def table(rows: Sequence[Row]) -> str:
    cell = lambda value: " ".join(value.replace("|", "\\|").split())
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def summary(claims: Sequence[Claim], report: str = "") -> str:
    """The table of claims; the links lead to their sections in `report` (a path; empty: the same page)."""
    rows = []
    for claim in claims:
        key = key_effect(claim.verdict)
        rows.append(
            {
                "claim": f"[{claim.verdict.claim}]({report}#{slug(claim.title)})",
                "verdict": f"**{claim.verdict.verdict}**",
                "n": size(key) if key else "–",
                "key effect": f"{key.name}, {key.figure}" if key else "–",
                "estimate [95 % interval]": interval(key) if key else "–",
            }
        )
    return table(rows)


def key_effect(verdict: Verdict) -> Effect | None:
    """The first primary effect that says what the claim's verdict says; else the first."""
    word = next(word for word in inference.VERDICTS if verdict.verdict.startswith(word))
    return next((each for each in verdict.primary if each.verdict.startswith(word)), next(iter(verdict.primary), None))


def report(claims: Sequence[Claim], provenance: Record, forest: str | None) -> str:
    """The whole of `report.md`.

    Args:
        forest: caption of the figure `claims.png`, where there is one.
    """
    profile = provenance["profile"]
    overview = [
        f"# Results, profile `{profile}`",
        f"Made by `{provenance['command']}` from {provenance['runs']} runs. Every number below is computed from their "
        f"records (`<claim>/{records.RECORDS}`); `python scripts/report.py --profile {profile}` does it again.",
        "## Claims and verdicts",
        summary(claims),
        "The key effect is the first of a claim's primary effects with that verdict; n: the runs on its two sides, or "
        "pairs of twins.",
        *([image(forest, "claims.png")] if forest else []),
    ]
    rule = ["## How a verdict is reached", _rule()]
    sections = [part for claim in claims for part in section(profile, claim)]
    return "\n\n".join([*overview, *rule, *sections, *environment(provenance)]) + "\n"


def _rule() -> str:
    """The rule that all claims share, as the file that carries it out states it."""
    return inspect.cleandoc((inference.__doc__ or "").partition("\n")[2])


def image(caption: str, path: str) -> str:
    return f"![{caption}]({path})\n\n{caption}"


def section(profile: str, claim: Claim) -> list[str]:
    verdict = claim.verdict
    note = first_paragraph(claim.module.table)
    return [
        f"## {claim.title}",
        claim.statement,
        "### What was run",
        what_was_run(claim.runs),
        "### Verdict",
        f"**{verdict.verdict}** {verdict.claim}",
        verdict.reason,
        f"Rule, fixed before the runs: {verdict.rule}",
        *([effects(verdict.primary)] if verdict.primary else []),
        *([_folded(verdict.secondary)] if verdict.secondary else []),
        "### Figures",
        *(image(claim.caption(name), f"{claim.name}/{name}.png") for name in claim.figures),
        "### Numbers",
        *([note] if note else []),
        *([table(claim.rows)] if claim.rows else []),
        *(["±: half the width of a 95 % confidence interval of the mean over runs (Student's t)."]
          if any("±" in value for row in claim.rows for value in row.values()) else []),
        "### Again",
        "```sh\n" + "\n".join(commands(profile, claim.runs)) + "\n```",
    ]  # fmt: skip


def commands(profile: str, runs: Sequence[Run]) -> list[str]:
    """That make these runs, and all of the profile's."""
    experiments = dict.fromkeys(run.options["experiment_name"] for run in runs)
    return [
        *(f"python scripts/train.py -m experiment={experiment}" for experiment in experiments),
        f"make reproduce PROFILE={profile}   # these and the others of the profile, and this report",
    ]


# --- effects


def effects(members: Sequence[Effect]) -> str:
    """A row per effect; p values and verdicts where the effects were tested together."""
    tested = any(math.isfinite(each.adjusted_p) for each in members)
    return table([_effect(each, tested) for each in members])


def _effect(each: Effect, tested: bool) -> Row:
    wanted = "lower" if each.favourable == inference.LOWER else "higher"
    verdict = f"**{each.verdict}**" + ("; open" if inference.is_open(each) else "")
    tests = {
        "p of a difference (Holm)": p_value(each.adjusted_p),
        "p of equivalence (Holm)": p_value(each.adjusted_equivalence_p),
    }
    return {
        "effect": each.name,
        "figure": each.figure,
        "estimate [95 % interval]": interval(each),
        "smallest of interest": f"{each.shown(each.smallest, signed=False)} {wanted}",
        **({"verdict": verdict} if tested else {}),
        "n": size(each),
        "design": each.design,
        **(tests if tested else {"p (uncorrected)": p_value(each.p)}),
    }


def _folded(members: Sequence[Effect]) -> str:
    """In the page only once asked for."""
    title = f"Secondary effects ({len(members)}): described, with no say in the verdict"
    return f"<details>\n<summary>{title}</summary>\n\n{effects(members)}\n\n</details>"


def interval(each: Effect) -> str:
    return each.interval() if math.isfinite(each.estimate) else "–"


def size(each: Effect) -> str:
    return f"{each.n[0]} pairs" if each.design == "paired twins" else f"{each.n[0]} + {each.n[1]}"


def p_value(p: float) -> str:
    if not math.isfinite(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


# --- what was run, from the configurations


def what_was_run(runs: Sequence[Run]) -> str:
    """A list with an item per part of the claim's grids."""
    return "\n".join(_part(name, members) for name, members in records.parts(runs).items())


def _part(name: str, runs: list[Run]) -> str:
    configs = [run.options for run in runs]
    diverged = sum(run.summary["status"] == "diverged" for run in runs)
    steps = _distinct(run.summary["total_steps"] for run in runs)
    end = "overflowed" if steps == [0] else "diverged"
    count = f"{len(runs)} runs" + (f", {diverged} of them {end}" if diverged else "")
    batch = _listed(_distinct(config["trainer"]["batch_size"] for config in configs)) + " samples"
    if "sequence_length" in configs[0]["dataset"]:
        lengths = _listed(_distinct(config["dataset"]["sequence_length"] for config in configs))
        batch = batch.replace(" samples", f" sequences of {lengths} characters")
    training = (
        f"none: the networks as initialized, one batch of {batch}"
        if steps == [0]
        else f"{_listed(steps)} updates of {batch}; {_choice(configs, 'optimizer')}; learning rate schedule "
        f"{_listed(_distinct(config['scheduler']['name'] for config in configs))}"
    )
    activations = _listed(_distinct(label(run.activation) for run in runs))
    how = _options([config["activation"] for config in configs], only={"pattern"})
    lines = [
        f"activations: {activations}" + (f" ({how})" if how else ""),
        f"seeds: {_seeds(_distinct(run.seed for run in runs))}",
        f"network: {_choice(configs, 'network')}",
        f"data: {_data(runs)}",
        f"initialization: {_choice(configs, 'init')}",
        f"training: {training}",
    ]
    if others := _others(runs):
        lines.append(f"also varied: {others}")
    return f"- **{name.replace('_', ' ') or 'main grid'}**: {count}\n" + "\n".join(f"  - {line}" for line in lines)


def _choice(configs: Sequence[Any], group: str) -> str:
    """The choices made of a configuration group, each with its options."""
    names = _distinct(config[group]["name"] for config in configs)
    texts = []
    for name in names:
        options = _options([config[group] for config in configs if config[group]["name"] == name])
        texts.append(f"{name} ({options})" if options else name)
    return "; ".join(texts)


def _data(runs: Sequence[Run]) -> str:
    texts = []
    for name in _distinct(data_name(run.options) for run in runs):
        those = [run for run in runs if data_name(run.options) == name]
        members = [run.options["dataset"] for run in those]
        options = _options(members, only={"train_size", "shape", "separation", "mean", "evaluation_size"})
        augmented = _options([member.get("augment", {}) for member in members], leave={"padding_mode"})
        digests = _listed(_distinct(run.environment["text"]["digest"] for run in those if "text" in run.environment))
        found = {"{}": options, "augmented: {}": augmented, "digest of the text {}": digests}
        details = "; ".join(form.format(value) for form, value in found.items() if value)
        texts.append(f"{name} ({details})" if details else name)
    return "; ".join(texts)


def data_name(options: Mapping[str, Any]) -> str:
    """What a run's data set is called everywhere."""
    dataset = options["dataset"]
    if dataset.get("path"):
        file = Path(dataset["path"]).name
        return DATA_FILES.get(file, file)
    return DATA_SETS.get(dataset["name"], dataset["name"])


def _options(groups: Sequence[Any], only: set[str] | None = None, leave: Iterable[str] = ()) -> str:
    """The options of a group with the values that occur; those that are off everywhere are left out."""
    texts = []
    for key in dict.fromkeys(key for group in groups for key in group):
        if key in ("name", "_target_", *leave) or (only is not None and key not in only):
            continue
        values = _distinct(group[key] for group in groups if key in group)
        if any(value not in (None, False, 0) for value in values):
            name = "learning rate" if key == "lr" else key.replace("_", " ")
            texts.append(
                name if values[0] is True and len(values) == 1 else f"{name} {' / '.join(map(_value, values))}"
            )
    return ", ".join(texts)


def _others(runs: Sequence[Run]) -> str:
    """What the runs differ in beyond the groups that are listed anyway."""
    shown = ("activation", "network", "dataset", "init", "optimizer", "scheduler")
    found: dict[str, list[Any]] = {}
    for own in records.options(runs):
        for name, value in own.items():
            if name.partition(".")[0] not in shown and name != "trainer.batch_size":
                found.setdefault(name, []).append(value)
    return "; ".join(f"`{name}` {' / '.join(map(_value, _distinct(values)))}" for name, values in found.items())


def _distinct(values: Iterable[Any]) -> list[Any]:
    """In the order of their first occurrence; numbers in their own."""
    found = list({str(value): value for value in values}.values())
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in found)
    return sorted(found) if numbers else found


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "-".join(map(str, value)) if hasattr(value, "__iter__") and not isinstance(value, str) else str(value)


def _seeds(seeds: list[int]) -> str:
    whole = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]} to {seeds[-1]}" if whole else _listed(seeds)


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items))


# --- environment


def environment(provenance: Record) -> list[str]:
    texts = {
        "commit": _listed(_each(provenance["commit"])),
        "changes beyond it": _listed(each or "none" for each in _each(provenance["dirty"])),
        "versions": "; ".join(_pairs(each) for each in _each(provenance["versions"])),
        "machine": "; ".join(_pairs(each) for each in _each(provenance["machine"])),
        "device": _listed(_each(provenance["device"])),
        "accelerator": _listed(each or "none" for each in _each(provenance["accelerator"])),
        "precision": _listed(_each(provenance["precision"])),
        "threads per run": _listed(_each(provenance["threads"])),
        "all runs took": duration(provenance["wall_seconds"]) + ", the sum over runs",
    }
    return ["## Environment of the runs", table([{"what": key, "value": value} for key, value in texts.items()])]


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _pairs(value: Any) -> str:
    return ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, dict) else json.dumps(value)


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
