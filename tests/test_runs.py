"""Tests of bipolar/runs.py: run ids, reading runs back, and one process at a time in a run folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from bipolar import sweep
from bipolar.errors import ConfigError
from bipolar.recording.folder import SUMMARY, write_json
from bipolar.run import run
from bipolar.runs import NOT_IDENTITY, is_done, read_run, reuse, run_folder, run_id
from bipolar.statistics import FIELDS

ROOT = Path(__file__).resolve().parents[1]


# -- ids -------------------------------------------------------------------------------------------------------------


def test_id_is_readable(tiny_config):
    cfg = tiny_config("activation=brelu", "network=mlp", "init=orthogonal", "optimizer.lr=0.003", "seed=12")
    assert re.fullmatch(r"brelu-mlp-gaussian-orthogonal-lr0\.003-seed12-[0-9a-f]{8}", run_id(cfg))
    assert run_folder(cfg) == Path(cfg.output_root, "default", run_id(cfg))


def test_same_configuration_same_id(tiny_config):
    assert run_id(tiny_config()) == run_id(tiny_config())
    assert run_id(tiny_config("seed=3", "network.depth=5")) == run_id(tiny_config("network.depth=5", "seed=3"))
    assert run_id(tiny_config(f"seed={tiny_config().seed}")) == run_id(tiny_config())


def test_id_does_not_depend_on_the_process_and_needs_no_torch(tiny_config):
    code = (
        "import sys; from bipolar import sweep; from bipolar.runs import run_id;"
        "print(run_id(sweep.compose(sys.argv[1:]))); assert 'torch' not in sys.modules"
    )
    environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77", "BIPOLAR_DATA": "/elsewhere"}
    done = subprocess.run(
        [sys.executable, "-c", code, *TINY], cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == run_id(tiny_config()), done.stderr


@pytest.mark.parametrize("dataset", ["gaussian", "mnist"])
@pytest.mark.parametrize(
    "option",
    [
        "output_root=/elsewhere",
        "data.root=/elsewhere",
        "logger=tensorboard",
        "logger=wandb",
        "trainer.progress=false",
        "trainer.threads=2",
        "trainer.max_minutes=3",
        "trainer.checkpoint_minutes=0",
        "experiment_name=other",
    ],
)
def test_how_a_run_is_carried_out_does_not_change_its_id(dataset, option):
    assert run_id(sweep.compose([f"dataset={dataset}", option])) == run_id(sweep.compose([f"dataset={dataset}"]))


@pytest.mark.parametrize(
    "option",
    [
        "seed=1",
        "activation=relu",
        "activation.alpha=0.5",
        "network=cnn",
        "network.width=17",
        "network.norm=batch",
        "dataset=gaussian",
        "dataset.augment.flip=true",
        "init=glorot",
        "init.weight_mean=0.1",
        "optimizer=adam",
        "optimizer.lr=0.1",
        "scheduler=linear",
        "scheduler.warmup_steps=5",
        "trainer.epochs=3",
        "trainer.precision=bfloat16",
    ],
)
def test_what_a_run_computes_changes_its_id(option):
    assert run_id(sweep.compose([option])) != run_id(sweep.compose())


def leaves(node, prefix=""):
    for key, value in node.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]


def test_every_option_counts_but_those_left_out():
    cfg = sweep.compose(["dataset=gaussian"])
    options = list(leaves(OmegaConf.to_container(cfg)))
    assert len(options) > 40
    for option in options:
        changed = cfg.copy()
        OmegaConf.update(changed, option, "changed", merge=False)
        left_out = any(f"{option}.".startswith(f"{name}.") for name in NOT_IDENTITY)
        assert (run_id(changed) == run_id(cfg)) == left_out, option


def test_id_leaves_the_configuration_alone(tiny_config):
    cfg = tiny_config()
    before = OmegaConf.to_yaml(cfg)
    run_id(cfg)
    assert OmegaConf.to_yaml(cfg) == before


# -- reading ---------------------------------------------------------------------------------------------------------


def test_round_trip(tiny_config):
    cfg = tiny_config("seed=4", "activation=brelu")
    summary = run(cfg)
    folder = run_folder(cfg)
    found = read_run(folder)
    assert found.folder == folder
    assert isinstance(found.config, DictConfig)
    assert OmegaConf.to_container(found.config) == OmegaConf.to_container(cfg, resolve=True)
    assert run_id(found.config) == run_id(cfg)
    assert found.summary == summary
    assert (found.activation, found.seed) == ("brelu", 4)
    assert (found.environment["device"], found.environment["precision"]) == ("cpu", "float32")
    assert found.metrics == [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert found.activations == [json.loads(line) for line in (folder / "activations.jsonl").read_text().splitlines()]
    assert {*FIELDS, "step", "epoch", "layer", "index"} == set(found.activations[0])


def test_curves_and_layers(tiny_config):
    cfg = tiny_config("network.depth=11", "trainer.statistics_every=8")
    run(cfg)
    found = read_run(run_folder(cfg))
    assert found.curve("train", "loss")[0] == [2, 4, 6, 8, 10, 12, 14, 16]
    for split in ("train", "valid", "test"):
        steps, values = found.curve(split, "error")
        assert [*zip(steps, values, strict=True)] == [
            (row["step"], row["error"]) for row in found.metrics if row["split"] == split
        ]
    assert found.curve("test", "loss") == ([16], [found.summary["final"]["test_loss"]])

    for step in (0, 8, 16):
        rows = {row["layer"]: row["variance"] for row in found.activations if row["step"] == step}
        wanted = [rows[f"layer{index}"] for index in range(1, 12)]  # not in alphabetic order
        assert found.layers("variance", step) == wanted
    assert found.layers("variance") == wanted


def test_layers_are_in_order_whatever_the_order_of_the_lines(tiny_config):
    cfg = tiny_config()
    run(cfg)
    path = run_folder(cfg) / "activations.jsonl"
    wanted = read_run(run_folder(cfg)).layers("mean")
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert read_run(run_folder(cfg)).layers("mean") == wanted


def test_a_diverged_run_is_read_with_none(tiny_config):
    cfg = tiny_config("optimizer.lr=1e30")
    run(cfg)
    found = read_run(run_folder(cfg))
    assert found.curve("train", "loss") == ([2], [None])
    assert found.summary["final"]["train_loss"] is None
    assert is_done(run_folder(cfg))


def test_a_torn_last_line_is_passed_over(tiny_config):
    cfg = tiny_config()
    run(cfg)
    before = read_run(run_folder(cfg))
    for name in ("metrics.jsonl", "activations.jsonl"):
        with (run_folder(cfg) / name).open("a") as file:
            file.write('{"step": 99')
    assert read_run(run_folder(cfg)) == before


def test_no_run_there(tiny_config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"summary\.json"):
        read_run(tmp_path)
    assert not is_done(tmp_path)
    assert not is_done(tmp_path / "nowhere")


def test_an_interrupted_run_is_read_but_not_done(tiny_config):
    cfg = tiny_config()
    run(cfg, lambda: "enough")
    assert read_run(run_folder(cfg)).summary["status"] == "interrupted"
    assert not is_done(run_folder(cfg))


# -- one process at a time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [False, True])
def test_second_process_in_a_run_folder_is_refused(tiny_config, begun):
    cfg = tiny_config()
    folder = run_folder(cfg)
    if begun:
        run(cfg, lambda: "enough")
    folder.mkdir(parents=True, exist_ok=True)

    def content():
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}

    before = content()
    with FileLock(folder / ".lock"):
        with pytest.raises(ConfigError, match="another process"):
            run(cfg)
        assert content() == before
        assert run(tiny_config("seed=1"))["status"] == "finished"  # another folder
    assert run(cfg)["status"] == "finished"


# --- taking over runs of other experiments ----------------------------------------------------------------------------


def folder_in(cfg, experiment: str) -> Path:
    return run_folder(OmegaConf.merge(cfg, {"experiment_name": experiment}))


def test_a_finished_run_of_another_experiment_is_taken_over(tiny_config):
    cfg = tiny_config("experiment_name=quick/cnn", "trainer.max_steps=4")
    run(cfg)
    folder = folder_in(cfg, "quick/cnn-twins")
    assert reuse(folder)
    made, taken = read_run(run_folder(cfg)), read_run(folder)
    assert taken.config.experiment_name == "quick/cnn-twins"
    assert OmegaConf.merge(taken.config, {"experiment_name": "quick/cnn"}) == made.config
    for part in ("summary", "metrics", "activations", "environment"):
        assert getattr(taken, part) == getattr(made, part)
    again = run(OmegaConf.merge(cfg, {"experiment_name": "quick/cnn-twins"}))
    assert again["skipped"]


def test_what_is_there_already_is_left_alone(tiny_config):
    cfg = tiny_config("experiment_name=quick/cnn", "trainer.max_steps=4")
    run(cfg)
    begun = folder_in(cfg, "quick/other")
    begun.mkdir(parents=True)
    assert not reuse(begun)
    assert list(begun.iterdir()) == []
    assert not reuse(run_folder(cfg))


def test_only_a_run_of_the_same_id_and_profile_that_is_done_is_taken_over(tiny_config):
    cfg = tiny_config("experiment_name=quick/cnn", "trainer.max_steps=4")
    run(cfg)
    other_seed = folder_in(OmegaConf.merge(cfg, {"seed": 1}), "quick/other")
    assert not reuse(other_seed)
    assert not other_seed.exists()
    assert not reuse(folder_in(cfg, "cpu/cnn"))
    write_json(run_folder(cfg) / SUMMARY, {"status": "interrupted"})
    assert not reuse(folder_in(cfg, "quick/other"))
