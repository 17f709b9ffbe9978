"""Tests of what watches a run: the run folder's own files, Weights & Biases (offline, for real) and TensorBoard."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY
from torch import nn

from bipolar import sweep
from bipolar.errors import ConfigError
from bipolar.recording.folder import FileRecorder, read_json, read_jsonl, read_summary, write_json
from bipolar.recording.loggers import flat_activations, flat_metrics, make_loggers
from bipolar.run import run
from bipolar.runs import read_run, run_folder

ROOT = Path(__file__).resolve().parents[1]


def strict_json(text: str) -> Any:
    """Read JSON as other languages do, which know no NaN."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def by_step(folder: Path) -> tuple[list[dict], list[dict]]:
    """What a dashboard should show of a run: a row for each line of metrics.jsonl, and for each measurement.

    Where the files have null there is nothing to show.
    """
    saved = read_run(folder)
    metrics = [
        {"step": row["step"], "epoch": row["epoch"]}
        | {
            f"{row['split']}/{key}": value
            for key, value in row.items()
            if key not in ("step", "epoch", "split") and value is not None
        }
        for row in saved.metrics
    ]
    activations = [
        {"step": step}
        | {
            f"activations/{key}/{row['layer']}": value
            for row in rows
            for key, value in row.items()
            if key not in ("step", "epoch", "layer", "index") and value is not None
        }
        for step, rows in itertools.groupby(saved.activations, key=lambda row: row["step"])
    ]
    return metrics, activations


# --- Weights & Biases -------------------------------------------------------------------------------------------------


class BreaksWithSeed1(nn.ReLU):
    """An activation that raises in the middle of the training of the job with seed 1."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.calls = seed, 0

    def forward(self, x):
        if x.requires_grad and x.device.type != "meta":
            self.calls += 1
            if self.seed == 1 and self.calls > 5:
                raise RuntimeError("broken on purpose")
        return super().forward(x)


@dataclass(frozen=True)
class WandbRun:
    """A run read back from the file that wandb keeps and `wandb sync` would send."""

    run: Any
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    axes: dict[str, str]
    exit_codes: list[int]


def wandb_records(path: Path) -> list[Any]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts, records = path.read_bytes(), 7, b"", []
    while position < len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def read_wandb(folder: Path) -> WandbRun:
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    of = {}
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        of.setdefault(kind, []).append(getattr(record, kind))
    (config_and_name,) = of["run"]

    def values(items):
        return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}

    history = [values(row.item) for row in of.get("history", [])]
    return WandbRun(
        run=config_and_name,
        config={key: value for key, value in values(config_and_name.config.update).items() if key != "_wandb"},
        history=[{key: value for key, value in row.items() if not key.startswith("_")} for row in history],
        summary={key: value for update in of.get("summary", []) for key, value in values(update.update).items()},
        axes={metric.glob_name or metric.name: metric.step_metric for metric in of["metric"]},
        exit_codes=[record.exit_code for record in of["exit"]],
    )


def python(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """`python <arguments>` in a process of its own, in which wandb keeps its files below `home`."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    variables |= {f"WANDB_{name}_DIR": str(home / name.lower()) for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT")}
    variables |= {"WANDB_SILENT": "true", "PYTHONPATH": os.pathsep.join([".", "tests"])}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wandb_sweep(tmp_path_factory) -> list[Path]:
    """The run folders of a sweep of three jobs in one process, the second of which fails."""
    home = tmp_path_factory.mktemp("wandb")
    arguments = [
        *TINY,
        f"output_root={home}/outputs",
        "experiment_name=group/name",
        "seed=0,1,2",
        "activation=relu",
        "activation._target_=test_loggers.BreaksWithSeed1",
        "+activation.seed=${seed}",
        "logger=wandb",
        "logger.wandb.mode=offline",
        "logger.wandb.project=a-project",
        "logger.wandb.entity=an-entity",
        "logger.wandb.tags=[one,two]",
    ]
    ended = python("scripts/train.py", "-m", *arguments, home=home)
    folders = [run_folder(cfg) for cfg in sweep.expand(arguments)]
    assert ended.returncode == 1, ended.stderr
    assert [read_summary(folder)["status"] for folder in folders] == ["finished", "failed", "finished"]
    return folders


every_job = pytest.mark.parametrize("job", [0, 1, 2], ids=["first", "failed", "after-failed"])


@every_job
def test_wandb_history_is_that_of_the_run_folder(wandb_sweep, job):
    metrics, activations = by_step(wandb_sweep[job])
    history = read_wandb(wandb_sweep[job]).history
    assert [row for row in history if "epoch" in row] == metrics
    assert [row for row in history if "epoch" not in row] == activations
    assert len(metrics) >= 1
    assert len(activations) >= 1


@every_job
def test_wandb_curves_are_drawn_over_our_step(wandb_sweep, job):
    found = read_wandb(wandb_sweep[job])
    assert found.axes == {"step": "", "*": "step"}
    assert all("step" in row for row in found.history)


@every_job
def test_wandb_config_is_that_of_the_run_folder(wandb_sweep, job):
    config = yaml.safe_load((wandb_sweep[job] / "config.yaml").read_text())
    assert read_wandb(wandb_sweep[job]).config == config
    assert config["seed"] == job


@every_job
def test_wandb_options_pass_through(wandb_sweep, job):
    found = read_wandb(wandb_sweep[job]).run
    assert found.display_name == wandb_sweep[job].name
    assert found.run_group == "group/name"
    assert (found.project, found.entity, list(found.tags)) == ("a-project", "an-entity", ["one", "two"])


def test_wandb_runs_of_a_sweep_are_different_runs(wandb_sweep):
    assert len({read_wandb(folder).run.run_id for folder in wandb_sweep}) == 3


@pytest.mark.parametrize(("job", "status", "exit_code"), [(0, "finished", 0), (1, "failed", 1), (2, "finished", 0)])
def test_wandb_knows_how_the_run_ended(wandb_sweep, job, status, exit_code):
    found = read_wandb(wandb_sweep[job])
    assert found.exit_codes == [exit_code]
    assert found.summary["status"] == status
    summary = read_summary(wandb_sweep[job])
    for group in ("final", "best"):
        shown = {key.removeprefix(f"{group}/"): value for key, value in found.summary.items() if key.startswith(group)}
        assert shown == summary[group]


def test_wandb_writes_nothing_outside_the_run_folder(wandb_sweep):
    home = wandb_sweep[0].parents[3]
    assert {path.parents[1] for path in home.rglob("offline-run-*") if path.is_dir()} == set(wandb_sweep)


LEFT_OPEN = """
import sys
from pathlib import Path
from bipolar.recording.loggers import RunInfo, WandbLogger
for name in ("first", "second"):
    folder = Path(sys.argv[1], name)
    folder.mkdir()
    logger = WandbLogger(mode="offline", group="a-group")
    logger.start(RunInfo(name, "experiment", folder, {"name": name}, total_steps=9, first_step=0))
    logger.metrics({"step": 1, "epoch": 0.5, "split": "train", "loss": float(len(name))})
logger.finish("interrupted", {})
"""


def test_wandb_run_that_was_left_open_is_closed_as_failed(tmp_path):
    ended = python("-c", LEFT_OPEN, str(tmp_path), home=tmp_path)
    assert ended.returncode == 0, ended.stderr
    first, second = (read_wandb(tmp_path / name) for name in ("first", "second"))
    assert first.history == [{"step": 1, "epoch": 0.5, "train/loss": 5.0}]
    assert second.history == [{"step": 1, "epoch": 0.5, "train/loss": 6.0}]
    assert (first.exit_codes, second.exit_codes) == ([1], [0])
    assert (first.run.run_group, second.run.run_group) == ("a-group", "a-group")
    assert second.summary["status"] == "interrupted"


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def curves(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Rows of figures turned into a curve for each, in the float32 that TensorBoard keeps."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key != "step":
                found.setdefault(key, []).append((row["step"], torch.tensor(value, dtype=torch.float32).item()))
    return found


def test_tensorboard_shows_what_the_run_folder_holds(tiny_config):
    cfg = tiny_config("logger=tensorboard")
    run(cfg)
    metrics, activations = by_step(run_folder(cfg))
    assert read_tensorboard(run_folder(cfg)) == curves(metrics) | curves(activations)


def stop_after(steps: int):
    asked = itertools.count(1)
    return lambda: "test" if next(asked) == steps else None


@pytest.mark.parametrize("steps", [5, 6, 8], ids=["between-records", "at-a-record", "at-a-validation"])
def test_tensorboard_of_an_interrupted_run_has_every_point_once(tiny_config, steps):
    cfg = tiny_config("logger=tensorboard")
    assert run(cfg, stop_after(steps))["status"] == "interrupted"
    assert run(cfg)["status"] == "finished"
    metrics, activations = by_step(run_folder(cfg))
    assert read_tensorboard(run_folder(cfg)) == curves(metrics) | curves(activations)


@pytest.mark.parametrize("steps", [5, 6, 8], ids=["between-records", "at-a-record", "at-a-validation"])
def test_tensorboard_hides_what_a_killed_run_wrote_after_its_checkpoint(tiny_config, steps):
    cfg = tiny_config("logger=tensorboard")
    checkpoint = run_folder(cfg) / "checkpoint.pt"
    run(cfg, stop_after(steps))
    saved = checkpoint.read_bytes()
    run(cfg, stop_after(4))
    checkpoint.write_bytes(saved)  # as if the process had been killed there
    assert run(cfg)["status"] == "finished"
    metrics, activations = by_step(run_folder(cfg))
    expected = {tag: dict(points) for tag, points in (curves(metrics) | curves(activations)).items()}
    found = {tag: dict(points) for tag, points in read_tensorboard(run_folder(cfg)).items()}
    assert found == expected  # images_per_second too, which comes out differently every time


def test_no_logger_changes_the_run(tiny_config):
    found = []
    for logger in ("files", "tensorboard"):
        cfg = tiny_config(f"logger={logger}", f"experiment_name={logger}")
        run(cfg)
        for row in (rows := read_jsonl(run_folder(cfg) / "metrics.jsonl")):
            row.pop("images_per_second", None)
        found.append((run_folder(cfg).name, rows, read_jsonl(run_folder(cfg) / "activations.jsonl")))
    assert found[0] == found[1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_is_null_in_the_files_is_not_shown(value):
    metrics = {"step": 3, "epoch": 1.0, "split": "train", "loss": value, "error": 0.0}
    assert flat_metrics(metrics) == {"epoch": 1.0, "train/error": 0.0}
    layer = {"step": 3, "epoch": 1.0, "layer": "fc1", "index": 0, "mean": 0.5, "gradient_norm": value}
    assert flat_activations([layer]) == {"activations/mean/fc1": 0.5}


def test_the_last_measurement_shows_no_gradient(tiny_config):
    """There is none then: the file has null, and the curve ends one measurement before the others."""
    cfg = tiny_config("logger=tensorboard")
    run(cfg)
    last = read_run(run_folder(cfg)).activations[-1]
    assert last["gradient_norm"] is None
    found = read_tensorboard(run_folder(cfg))
    means, norms = ([step for step, _ in found[f"activations/{key}/layer2"]] for key in ("mean", "gradient_norm"))
    assert norms == means[:-1]


def test_an_unknown_logger_is_refused():
    with pytest.raises(
        ConfigError, match=r"logger='wandbb'.*choose from wandb, tensorboard \(did you mean 'wandb'\?\)"
    ):
        make_loggers({"wandbb": {}}, progress=False)


# --- the run folder's files -------------------------------------------------------------------------------------------

ROWS = [{"step": step, "loss": 1 / (step + 1)} for step in range(4)]


def test_records_are_read_back_as_they_were_written(tmp_path):
    with FileRecorder(tmp_path) as files:
        for row in ROWS:
            files.metrics(row)
        files.activations(ROWS[:2])
        files.activations([])
    assert read_jsonl(tmp_path / "metrics.jsonl") == ROWS
    assert read_jsonl(tmp_path / "activations.jsonl") == ROWS[:2]


def test_rewind_drops_what_came_after(tmp_path):
    with FileRecorder(tmp_path) as files:
        files.metrics(ROWS[0])
        files.activations(ROWS[:1])
        positions = files.positions()
        files.metrics(ROWS[1])
        files.activations(ROWS[1:3])
    with FileRecorder(tmp_path) as files:  # another process, later
        files.rewind(positions)
        files.metrics(ROWS[2])
    assert read_jsonl(tmp_path / "metrics.jsonl") == [ROWS[0], ROWS[2]]
    assert read_jsonl(tmp_path / "activations.jsonl") == [ROWS[0]]


def test_rewind_to_nothing_begins_afresh(tmp_path):
    with FileRecorder(tmp_path) as files:
        files.metrics(ROWS[0])
        files.activations(ROWS)
        files.rewind({})
        files.metrics(ROWS[1])
    assert read_jsonl(tmp_path / "metrics.jsonl") == [ROWS[1]]
    assert read_jsonl(tmp_path / "activations.jsonl") == []


def test_positions_hold_after_reopening(tmp_path):
    with FileRecorder(tmp_path) as files:
        files.metrics(ROWS[0])
        positions = files.positions()
    with FileRecorder(tmp_path) as files:
        assert files.positions() == positions


@pytest.mark.parametrize("torn", ['{"step": 9, "lo', '{"step": 9, "loss": 0.5}', "{"])
def test_a_torn_last_line_is_passed_over(tmp_path, torn):
    with FileRecorder(tmp_path) as files:
        for row in ROWS:
            files.metrics(row)
        positions = files.positions()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write(torn)
    assert read_jsonl(path) == ROWS
    with FileRecorder(tmp_path) as files:
        files.rewind(positions)
        files.metrics(ROWS[0])
    assert read_jsonl(path) == [*ROWS, ROWS[0]]


def test_no_file_means_no_records(tmp_path):
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(tmp_path, value):
    with FileRecorder(tmp_path) as files:
        files.metrics({"loss": value, "nested": [1.0, {"deep": value}], "pair": (value, 2)})
        files.activations([{"mean": value}])
    write_json(tmp_path / "summary.json", {"final": {"loss": value}})
    expected = {"loss": None, "nested": [1.0, {"deep": None}], "pair": [None, 2]}
    assert strict_json((tmp_path / "metrics.jsonl").read_text()) == expected
    assert strict_json((tmp_path / "activations.jsonl").read_text()) == {"mean": None}
    assert strict_json((tmp_path / "summary.json").read_text()) == {"final": {"loss": None}}


def test_every_file_of_a_diverged_run_is_strict_json(tiny_config):
    cfg = tiny_config("optimizer.lr=1e30", "logger=tensorboard")
    assert run(cfg)["status"] == "diverged"
    folder = run_folder(cfg)
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    parsed = [strict_json(text) for text in (*lines, *(path.read_text() for path in folder.glob("*.json")))]
    assert len(parsed) > 4
    assert any(row["loss"] is None for row in read_jsonl(folder / "metrics.jsonl"))


@pytest.mark.parametrize("overrides", [[], ["network.depth=40", "trainer.statistics_every=1"]], ids=["few", "many"])
def test_a_reader_during_the_run_sees_whole_lines_at_once(tiny_config, overrides):
    cfg = tiny_config(*overrides)
    folder, seen = run_folder(cfg), []

    def look() -> None:
        texts = [(folder / name).read_text() for name in ("metrics.jsonl", "activations.jsonl")]
        for text in texts:
            assert text == "" or text.endswith("\n")
            for line in text.splitlines():
                strict_json(line)
        seen.append(texts)

    run(cfg, look)
    assert len(seen) == 15  # after every step but the last
    final = [(folder / name).read_text() for name in ("metrics.jsonl", "activations.jsonl")]
    for earlier, later in itertools.pairwise([*seen, final]):
        assert all(new.startswith(old) for old, new in zip(earlier, later, strict=True))
    assert json.loads(seen[1][0].splitlines()[-1])["step"] == 2  # it is there as soon as it is written


def test_a_json_file_is_replaced_in_one_go(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"status": "interrupted"})
    with path.open() as reader:
        write_json(path, {"status": "finished"})
        assert json.load(reader) == {"status": "interrupted"}
    assert read_json(path) == {"status": "finished"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_value_that_json_does_not_know_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"status": "interrupted"})
    with pytest.raises(TypeError):
        write_json(path, {"status": object()})
    assert read_json(path) == {"status": "interrupted"}


def test_there_is_no_summary_while_a_run_is_going_on(tiny_config):
    cfg = tiny_config()
    summaries = []
    run(cfg, lambda: summaries.append(read_summary(run_folder(cfg))))
    assert set(map(str, summaries)) == {"None"}
    assert read_summary(run_folder(cfg))["status"] == "finished"


def test_a_wandb_that_cannot_start_is_wrong_input_and_leaves_nothing(tmp_path, monkeypatch):
    """Online without an account: there is nobody to ask for a key, and no network is needed to find that out."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setattr(sys, "stdin", None)
    cfg = sweep.compose([*TINY, f"output_root={tmp_path}/outputs", "logger=wandb"])
    with pytest.raises(ConfigError, match=r"logger=wandb could not start .*logger\.wandb\.mode=offline"):
        run(cfg)
    assert not run_folder(cfg).exists()
