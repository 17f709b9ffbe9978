"""The archive of runs: what comes back is what was put in, to the digit, and nothing of the machine but its name."""

from __future__ import annotations

import csv
import lzma
from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import made_run, made_runs
from omegaconf import OmegaConf

from bipolar.errors import DataError
from bipolar.runs import Run, is_done, read_run
from experiments.reporting import records


@pytest.fixture
def runs() -> list[Run]:
    return [
        *made_runs("relu", "brelu", seeds=2),
        made_run("elu", 7, "quick/fake-pilot", "optimizer.lr=0.3", status="diverged"),
        made_run("belu", 7, "quick/fake-pilot", "network=mlp", "network.depth=3"),
    ]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / records.TABLE).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_read_is_what_was_written(runs: list[Run], tmp_path: Path) -> None:
    records.write(tmp_path, runs)
    for before, after in zip(runs, records.read(tmp_path), strict=True):
        assert after.folder.name == before.folder.name
        assert (after.activation, after.seed) == (before.activation, before.seed)
        for group in ("activation", "network", "init", "optimizer", "scheduler", "trainer", "experiment_name"):
            assert after.config[group] == before.config[group]
        assert after.environment == {key: value for key, value in before.environment.items() if key != "command"}
        for key in ("status", "steps", "total_steps", "parameters", "final", "best", "wall_seconds"):
            assert after.summary[key] == before.summary[key]
        assert after.curve("train", "loss") == before.curve("train", "loss")
        assert after.curve("valid", "error") == before.curve("valid", "error")
        for key in ("mean", "variance", "pre_variance"):
            assert after.layers(key) == pytest.approx(before.layers(key), rel=1e-5)
            assert after.layers(key, 0) == pytest.approx(before.layers(key, 0), rel=1e-5)


def test_metrics_keep_every_digit_and_rows_their_order(tmp_path: Path) -> None:
    run = replace(made_run(), metrics=[{"step": 1, "split": "a", "loss": 0.1 + 0.2}, {"step": 1, "split": "b"},
                                       {"step": 2, "split": "a", "loss": None}])  # fmt: skip
    records.write(tmp_path, [run])
    assert records.read(tmp_path)[0].metrics == run.metrics


def test_statistics_have_six_digits_and_none_stays_none(tmp_path: Path) -> None:
    row = {"step": 0, "layer": "fc1", "index": 1, "mean": 123456.789, "variance": None, "pre_mean": -1.23456789e-30}
    records.write(tmp_path, [replace(made_run(), activations=[row])])
    assert records.read(tmp_path)[0].activations == [row | {"mean": 123457.0, "pre_mean": -1.23457e-30}]


def test_values_of_another_type_are_not_taken_for_equal(tmp_path: Path) -> None:
    values = [1, 1.0, True, None, "1", {}, {"a": {}}]
    runs = [made_run(seed=seed) for seed in range(len(values))]
    for run, value in zip(runs, values, strict=True):
        run.options["network"]["extra"] = value
    records.write(tmp_path, runs)
    back = [run.options["network"]["extra"] for run in records.read(tmp_path)]
    assert [repr(value) for value in back] == [repr(value) for value in values]


def test_same_runs_give_the_same_bytes_also_from_an_archive(runs: list[Run], tmp_path: Path) -> None:
    first = [path.read_bytes() for path in records.write(tmp_path / "a", runs)]
    assert [path.read_bytes() for path in records.write(tmp_path / "b", records.read(tmp_path / "a"))] == first


def test_no_path_and_no_speed_gets_in(runs: list[Run], tmp_path: Path) -> None:
    records.write(tmp_path, runs)
    text = lzma.decompress((tmp_path / records.RECORDS).read_bytes()).decode()
    text += (tmp_path / records.TABLE).read_text(encoding="utf-8")
    assert "secret" not in text
    assert "images_per_second" not in text
    assert "training_seconds" not in text
    assert records.read(tmp_path)[0].config.dataset.path == "cifar10-heldout.npz"


def test_runs_of_two_parts_may_have_the_same_id(tmp_path: Path) -> None:
    runs = [made_run(experiment=name, run_id="same") for name in ("quick/fake", "quick/fake-twins")]
    records.write(tmp_path, runs)
    back = records.read(tmp_path)
    assert [records.part(run) for run in back] == ["", "twins"]
    assert len({run.folder for run in back}) == 2
    assert [row["part"] for row in rows_of(tmp_path)] == ["", "twins"]


def test_table_names_the_options_that_differ_and_the_figures(runs: list[Run], tmp_path: Path) -> None:
    records.write(tmp_path, runs)
    rows = rows_of(tmp_path)
    assert [row["run"] for row in rows] == [run.folder.name for run in runs]
    assert [row["activation"] for row in rows] == ["relu", "relu", "brelu", "brelu", "elu", "belu"]
    assert [row["part"] for row in rows] == [""] * 4 + ["pilot"] * 2
    assert [row["status"] for row in rows] == ["finished"] * 4 + ["diverged", "finished"]
    assert rows[4]["optimizer.lr"] == "0.3"
    assert [row["network.depth"] for row in rows] == [""] * 5 + ["3"]
    assert "optimizer.momentum" not in rows[0]
    assert "init" not in rows[0]
    for row, run in zip(rows, runs, strict=True):
        assert float(row["final.test_error"]) == run.summary["final"]["test_error"]
        assert (int(row["seed"]), int(row["steps"]), int(row["parameters"])) == (run.seed, 20, 72442)
        assert row["best.valid_loss"] == "null"


def test_archive_of_many_runs_is_smaller_than_a_tenth_of_their_text(tmp_path: Path) -> None:
    runs = made_runs("relu", "brelu", "elu", "belu", seeds=5)
    plain = sum(len(OmegaConf.to_yaml(run.config)) + len(str((run.metrics, run.activations))) for run in runs)
    records.write(tmp_path, runs)
    assert (tmp_path / records.RECORDS).stat().st_size < plain / 10


@pytest.mark.parametrize("damage", ["cut", "replaced", "a bit flipped"])
def test_damaged_archive_is_named_in_one_line(damage: str, tmp_path: Path) -> None:
    records.write(tmp_path, made_runs())
    path = tmp_path / records.RECORDS
    data = path.read_bytes()
    flipped = data[:500] + bytes([data[500] ^ 1]) + data[501:]
    path.write_bytes({"cut": data[:-20], "replaced": b"no archive", "a bit flipped": flipped}[damage])
    with pytest.raises(DataError, match=r"records\.jsonl\.xz is damaged") as error:
        records.read(tmp_path)
    assert "\n" not in str(error.value)


def test_archive_with_a_run_too_few_or_of_another_format_is_refused(tmp_path: Path) -> None:
    records.write(tmp_path, made_runs())
    path = tmp_path / records.RECORDS
    lines = lzma.decompress(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(lzma.compress(b"".join(lines[:-1])))
    with pytest.raises(DataError, match="5 of 6 runs"):
        records.read(tmp_path)
    path.write_bytes(lzma.compress(b"".join([lines[0].replace(b'"format":1', b'"format":99'), *lines[1:]])))
    with pytest.raises(DataError, match="format 99"):
        records.read(tmp_path)
    with pytest.raises(DataError, match="is not there"):
        records.read(tmp_path / "nowhere")


def test_restored_runs_are_finished_and_archived_as_they_were(runs: list[Run], tmp_path: Path) -> None:
    before = [path.read_bytes() for path in records.write(tmp_path / "archive", runs)]
    assert records.restore(tmp_path / "archive", tmp_path / "outputs") == len(runs)
    folders = [tmp_path / "outputs" / run.config.experiment_name / run.folder.name for run in runs]
    assert all(is_done(folder) for folder in folders)
    again = records.write(tmp_path / "again", [read_run(folder) for folder in folders])
    assert [path.read_bytes() for path in again] == before


def test_restoring_leaves_what_is_there_alone(runs: list[Run], tmp_path: Path) -> None:
    records.write(tmp_path / "archive", runs)
    first = runs[0]
    mine = tmp_path / "outputs" / first.config.experiment_name / first.folder.name
    mine.mkdir(parents=True)
    assert records.restore(tmp_path / "archive", tmp_path / "outputs") == len(runs) - 1
    assert list(mine.iterdir()) == []
    assert records.restore(tmp_path / "archive", tmp_path / "outputs") == 0
