"""From the archives in `results/<profile>/<claim>/` to figures, tables, verdicts and the report: from those alone."""

from __future__ import annotations

import csv
import importlib
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bipolar.errors import ConfigError, DataError
from bipolar.recording.folder import Record, jsonable, write_json
from bipolar.runs import Run
from experiments import ordered
from experiments.analysis.inference import NOT_TESTED, Verdict
from experiments.analysis.plots import style
from experiments.analysis.summaries import Row
from experiments.reporting import forest, html, markdown, provenance, readme, records
from experiments.reporting.markdown import Claim, figures_of

ROOT = Path(__file__).resolve().parents[2]
DIGITS = 9
"""Significant digits in verdict.json: the last ones differ between machines."""


def write(profile: str, results: Path, command: str, workers: int = 1) -> list[Path]:
    """Write all that is made of the archives in `results`, a profile's folder. Returns the files written.

    The README's block is written too, where `results` are the repository's own and the README shows this profile.

    Args:
        workers: processes that draw; with more than one, all else is made in this one meanwhile.

    Raises:
        ConfigError: an archive is missing, damaged, or of a claim that has no file here.
    """
    with _drawing(results, workers) as drawn:
        claims = load(results)
        written = _save(_forest(claims), results / "claims")
        record = _provenance(profile, command, claims)
        for path, text in texts(results, claims, record).items():
            path.write_text(text, encoding="utf-8")
            written.append(path)
        written += drawn(claims)
    page = results / "report.html"
    page.write_text(html.page((results / "report.md").read_text(encoding="utf-8"), results), encoding="utf-8")
    written.append(page)
    archives = [results / claim.name / records.RECORDS for claim in claims]
    names = [path.relative_to(results).as_posix() for path in (*archives, *written)]
    write_json(results / provenance.PROVENANCE, {**record, "files": sorted(names)})
    if _is_in_readme(profile, results):
        (ROOT / "README.md").write_text(readme.text(ROOT / "README.md", results, claims), encoding="utf-8")
    return [*written, results / provenance.PROVENANCE]


def check(profile: str, results: Path) -> list[str]:
    """What of `results`, or of the README, is not as archives and code make it: a line per file.

    Of figures it is looked only whether they exist: another version of a library draws them otherwise.
    """
    claims = load(results)
    record = _provenance(profile, command_of(profile, results), claims)
    wrong = []
    figures = [results / claim.name / f"{name}.{kind}" for claim in claims for name in claim.figures for kind in KINDS]
    if _has_forest(claims):
        figures += [results / f"claims.{kind}" for kind in KINDS]
    missing = [path for path in (*figures, results / provenance.PROVENANCE) if not path.exists()]
    wrong += [f"{path} is missing" for path in missing]
    expected = texts(results, claims, record)
    if not missing:
        expected[results / "report.html"] = html.page(expected[results / "report.md"], results)
    if _is_in_readme(profile, results):
        expected[ROOT / "README.md"] = readme.text(ROOT / "README.md", results, claims)
    for path, text in expected.items():
        if not path.exists():
            wrong.append(f"{path} is missing")
        elif path.read_text(encoding="utf-8") != text:
            wrong.append(f"{path} is not what the records and the code make")
    return wrong


def command_of(profile: str, results: Path) -> str:
    """The command that made the runs of these results."""
    return str(provenance.read(results).get("command") or f"make reproduce PROFILE={profile}")


def load(results: Path) -> list[Claim]:
    """The claims whose archives are in `results`, in the report's order.

    Raises:
        ConfigError: there is none; or one is damaged, or of a claim that has no file here.
    """
    names = [path.parent.name for path in results.glob(f"*/{records.RECORDS}")]
    if not names:
        raise DataError(
            f"{results} has no archive of runs, <claim>/{records.RECORDS}; scripts/reproduce.py writes them"
        )
    return [_claim(name, records.read(results / name)) for name in ordered(names)]


def _claim(name: str, runs: list[Run]) -> Claim:
    module = _module(name)
    verdict = module.verdict(runs) if hasattr(module, "verdict") else _unjudged(module)
    return Claim(name=name, module=module, runs=runs, rows=module.table(runs), verdict=verdict)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"experiments.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"experiments.{name}":
            raise
        raise ConfigError(f"{name} has an archive of runs but no experiments/{name}.py that reads them") from error


def _unjudged(module: Any) -> Verdict:
    """For an experiment that describes and does not judge."""
    title = (module.__doc__ or module.__name__).split("\n", 1)[0]
    return Verdict(claim=title, verdict=NOT_TESTED, reason="This experiment describes what happens.", rule="none.")


def texts(results: Path, claims: Sequence[Claim], record: Record) -> dict[Path, str]:
    """Every file of text and its content, but for the page, into which figures go."""
    made: dict[Path, str] = {}
    for claim in claims:
        folder = results / claim.name
        verdict = _rounded({"profile": record["profile"], **claim.verdict.record()})
        made[folder / records.TABLE] = records.table(claim.runs)
        made[folder / "verdict.json"] = json.dumps(jsonable(verdict), indent=2, ensure_ascii=False) + "\n"
        made[folder / "table.csv"] = _csv(claim.rows)
        made[folder / "table.md"] = markdown.table(claim.rows) + "\n" if claim.rows else ""
    caption = forest.CAPTION if _has_forest(claims) else None
    made[results / "report.md"] = markdown.report(claims, record, caption)
    return made


def _provenance(profile: str, command: str, claims: Sequence[Claim]) -> Record:
    # one that several grids share was made once
    runs = list({run.folder.name: run for claim in claims for run in claim.runs}.values())
    return {
        "profile": profile,
        "command": command,
        **provenance.environment(runs),
        "runs": len(runs),
        "wall_seconds": round(sum(run.summary.get("wall_seconds") or 0 for run in runs), 1),
        "digest": provenance.of_runs(run for claim in claims for run in claim.runs),
    }


def _is_in_readme(profile: str, results: Path) -> bool:
    """Whether the README shows these results: it knows the repository's own only."""
    own = ROOT / "results"
    return results.resolve() == own / profile and readme.shown_profile(own) == profile


# --- figures

KINDS = ("png", "svg")


@contextmanager
def _drawing(results: Path, workers: int) -> Iterator[Callable[[Sequence[Claim]], list[Path]]]:
    """Gives a function that draws the claims' figures, or waits until they are drawn, and returns their files.

    With several workers these begin at once, each with an archive of its own, the largest first.
    """
    archives = sorted(results.glob(f"*/{records.RECORDS}"), key=lambda path: (-path.stat().st_size, path))
    if min(workers, len(archives)) < 2:
        draw = lambda claim: _draw(results / claim.name, claim.figures, claim.runs)
        yield lambda claims: [path for claim in claims for path in draw(claim)]
        return
    from joblib import Parallel, delayed

    pool = Parallel(n_jobs=workers, batch_size=1, pre_dispatch="all", return_as="generator")
    figures = pool(delayed(_draw_archive)(path.parent) for path in archives)
    try:
        yield lambda claims: [path for written in figures for path in written]
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # after an error: that tasks are cancelled
            figures.close()


def _draw_archive(folder: Path) -> list[Path]:
    return _draw(folder, figures_of(_module(folder.name)), records.read(folder))


def _draw(folder: Path, figures: Mapping[str, Callable[[list[Run]], Any]], runs: list[Run]) -> list[Path]:
    written = []
    for name, function in figures.items():
        with style():
            written += _save(function(runs), folder / name)
    return written


def _has_forest(claims: Sequence[Claim]) -> bool:
    return any(forest.is_drawn(each) for claim in claims for each in claim.verdict.primary)


def _forest(claims: Sequence[Claim]) -> Any:
    return forest.claims_figure([(claim.title, claim.verdict) for claim in claims])


def _save(figure: Any, stem: Path) -> list[Path]:
    """Write a figure (None: nothing) in each format; the same figure gives the same bytes."""
    import matplotlib.pyplot as plt

    if figure is None:
        return []
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in KINDS]
    with style():
        _lay_out(figure)
    with style(layout=False):
        for path in paths:
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    plt.close(figure)
    return paths


def _lay_out(figure: Any) -> None:
    """Find the places of axes and legends once for all formats: it takes as long as drawing does."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        with style(layout=False):
            figure.set_layout_engine(None)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
