"""From an experiment's grid to results: the command, and that the report's numbers are the runs' numbers."""

from __future__ import annotations

import csv
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bipolar.run import run
from bipolar.runs import Run, read_run, run_folder
from bipolar.sweep import CONFIGS, expand
from experiments import claim_of, deep_mlp
from experiments.analysis.summaries import by_activation, cell, mean_interval, percent, significant
from experiments.reporting import provenance, records, report

ROOT = CONFIGS.parent
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment" / "quick").glob("*.yaml"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The runs of a small version of quick/deep_mlp."""
    root = tmp_path_factory.mktemp("outputs")
    small = ["trainer.max_steps=8", "network.depth=3", "network.width=16", "trainer.log_every=2", "optimizer.lr=0.01"]
    grid = expand(["experiment=quick/deep_mlp", f"output_root={root}", *small])
    for cfg in grid:
        run(cfg)
    return [run_folder(cfg) for cfg in grid]


@pytest.fixture
def runs(folders: list[Path]) -> list[Run]:
    return [read_run(folder) for folder in folders]


def test_every_experiment_of_a_grid_has_a_file_that_reads_it() -> None:
    for path in (CONFIGS / "experiment").glob("*/*.yaml"):
        assert (ROOT / "experiments" / f"{claim_of(path.stem)}.py").exists(), path


def test_grid_is_four_activations_with_three_seeds_on_the_same_data(runs: list[Run]) -> None:
    groups = by_activation(runs)
    assert list(groups) == ["relu", "brelu", "elu", "belu"]
    assert all([run.seed for run in members] == [0, 1, 2] for members in groups.values())


def test_interval_is_students_t() -> None:
    values = [1.0, 2.0, 4.0, 4.5]
    mean, half = mean_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean == pytest.approx(statistics.mean(values))
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))


def test_cell_leaves_out_what_is_not_finite_and_says_nothing_of_nothing() -> None:
    assert cell([0.25, float("nan")], percent) == "25.00 % (n = 1)"
    assert cell([float("nan")], significant) == "–"


def test_table_holds_the_runs_figures(runs: list[Run]) -> None:
    row = next(row for row in deep_mlp.table(runs) if row["activation"] == "BELU")
    errors = [run.summary["final"]["test_error"] for run in runs if run.activation == "belu"]
    assert row["held-out error"].startswith(f"{100 * np.mean(errors):.2f} %")
    assert row["runs"] == "3 of 3"


def test_report_is_made_from_the_runs_and_known_to_be_current(folders: list[Path], tmp_path: Path) -> None:
    results = tmp_path / "quick"
    assert not provenance.is_current(results, folders)
    records.write(results / "deep_mlp", [read_run(folder) for folder in folders])
    written = report.write("quick", results, "make reproduce")
    assert provenance.is_current(results, folders)
    assert not provenance.is_current(results, folders[:-1])
    assert all(path.stat().st_size > 0 for path in written)
    text = (results / "report.md").read_text(encoding="utf-8")
    with (results / "deep_mlp" / "table.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            assert all(value.replace("|", "\\|") in text for value in row.values())
    record = json.loads((results / "provenance.json").read_text(encoding="utf-8"))
    assert record["runs"] == 12
    assert record["threads"] == 1
    assert not re.search(r"(^|[\s\"'`(])/(home|root|tmp|work)", text + json.dumps(record))


def test_archive_of_real_runs_gives_the_same_table(runs: list[Run], tmp_path: Path) -> None:
    records.write(tmp_path, runs)
    assert deep_mlp.table(records.read(tmp_path)) == deep_mlp.table(runs)


def reproduce(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "scripts" / "reproduce.py")
    return subprocess.run([sys.executable, script, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def test_reproduce_runs_what_is_missing_and_then_has_nothing_to_do(tmp_path: Path) -> None:
    # from a folder that is not the repository's, to which the paths are relative
    places = ["--output-root", "out", "--results", "results", "--workers", "1"]
    places[3] += "/"  # not the default's very text: with other options a folder has to be named
    small = ["trainer.max_steps=1", "trainer.grad_clip=100", "seed=0"]
    readme = (ROOT / "README.md").read_bytes()
    first = reproduce(*places, *small, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    made: dict[str, list[str]] = {}
    for name in EXPERIMENTS:
        # fewer than all where runs of another experiment are taken over
        assert re.search(rf"^quick/{name}: [1-9]\d* of \d+ runs to do$", first.stdout, re.MULTILINE)
        made.setdefault(claim_of(name), []).append(f"quick/{name}")
    for claim, names in made.items():
        folder = tmp_path / "results" / "quick" / claim
        assert list(dict.fromkeys(run.config.experiment_name for run in records.read(folder))) == names
        assert (folder / "figure.png").exists()
    assert (ROOT / "README.md").read_bytes() == readme
    second = reproduce(*places, *small, cwd=tmp_path)
    assert second.returncode == 0
    assert second.stdout.startswith("nothing to do: all ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "quik"], "did you mean 'quick'"),
        (["--workers", "0"], "at least 1"),
        (["trainer.max_steps=0"], "--results"),
    ],
)
def test_reproduce_refuses_wrong_arguments_in_one_line(arguments: list[str], message: str) -> None:
    done = reproduce(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_reproduce_from_the_archive_runs_only_what_it_lacks(tmp_path: Path) -> None:
    # a profile of two experiments: the list of them is looked up in a folder of this test
    for name in ("batch_axis", "symmetry"):
        (tmp_path / "experiments" / "quick").mkdir(parents=True, exist_ok=True)
        (tmp_path / "experiments" / "quick" / f"{name}.yaml").touch()
    run_it = f"import reproduce; reproduce.EXPERIMENTS = reproduce.Path({str(tmp_path / 'experiments')!r}); "
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); {run_it}sys.exit(reproduce.main())"
    small = ["trainer.max_steps=1", "optimizer.momentum=0.5", "seed=0", "optimizer.lr=0.01", "network.pool=max"]

    def again(output_root: str, *arguments: str) -> str:
        command = [sys.executable, "-c", code, "--output-root", output_root, "--results", "results/", "--workers", "1"]
        done = subprocess.run([*command, *arguments, *small], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    again("first")
    archives = {path: path.read_bytes() for path in (tmp_path / "results").rglob(records.RECORDS)}
    assert len(archives) == 2
    assert re.match(
        r"7 runs taken over from the archives in results/quick\nnothing to do", again("second", "--from-archive")
    )
    symmetry = tmp_path / "results" / "quick" / "symmetry" / records.RECORDS
    symmetry.unlink()
    assert re.findall(r"^(\S+): \d+ of \d+ runs to do$", again("third", "--from-archive"), re.MULTILINE) == [
        "quick/symmetry"
    ]
    assert symmetry.exists()
    assert all(path.read_bytes() == content for path, content in archives.items() if path != symmetry)
