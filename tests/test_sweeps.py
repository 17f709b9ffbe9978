"""Tests of sweeps: which jobs they stand for, and running, stopping and watching them, with either launcher."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import NamedTuple

import joblib
import pytest
import torch
from torch import nn

from bipolar import sweep
from bipolar.recording.folder import read_json, read_jsonl, read_summary, write_json
from bipolar.run import run
from bipolar.runs import run_folder

ROOT = Path(__file__).resolve().parents[1]
# Not imported: jobs import this module for `Fragile`, and conftest.py would have a say in their threads.
TINY = getattr(sys.modules.get("conftest"), "TINY", [])
BASIC, JOBLIB = [], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]


class Fragile(nn.ReLU):
    """An activation that fails or dawdles in the training of the jobs whose seeds the environment lists."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.calls = str(seed), 0

    def forward(self, x):
        if x.requires_grad and x.device.type != "meta":
            self.calls += 1
            if self.calls > 5 and self.seed in os.environ.get("TEST_FAILS", "").split(","):
                raise RuntimeError("broken on purpose")
            if self.calls > 5 and self.seed in os.environ.get("TEST_DAWDLES", "").split(","):
                time.sleep(1)
        return super().forward(x)


FRAGILE = [*TINY, "activation=relu", "activation._target_=test_sweeps.Fragile", "+activation.seed=${seed}"]


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


def start(*arguments: str, **variables: str | None) -> subprocess.Popen[str]:
    """`python <arguments>` in a process group of its own; variables that are None are not set."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "tests"]), **variables}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={name: value for name, value in environment.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate()
    return Ended(process.returncode, out, err)


def statuses(outputs: Path) -> dict[int, str | None]:
    """The status of every run below `outputs` by its seed."""
    found = {}
    for config in outputs.glob("**/config.yaml"):
        summary = read_summary(config.parent)
        found[int(re.search(r"seed(\d+)", config.parent.name)[1])] = summary and summary["status"]
    return dict(sorted(found.items()))


def progress(ended: Ended) -> list[str]:
    return [line for line in ended.out.splitlines() if line.startswith("[")]


# --- which jobs -------------------------------------------------------------------------------------------------------


def mark_finished(arguments) -> list[Path]:
    """Make all runs of a sweep look finished, so that they are skipped; their folders in order."""
    folders = [run_folder(cfg) for cfg in sweep.expand(arguments)]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "summary.json", {"status": "finished"})
    return folders


GRIDS = [
    (["seed=3"], 1),
    (["seed=1,0"], 2),
    (["activation=relu,belu", "optimizer.lr=0.1", "seed=0,1"], 4),
    (["seed=choice(5,4)", "trainer.max_steps=7"], 2),
    (["activation=glob(*silu)"], 2),
    (["dataset=gaussian", "dataset.shape=[4],[8]"], 2),
    (["seed=0,1", "sweep=activations", "activation=tanh,gelu"], 4),
    (["sweep=activations", "activation=tanh"], 1),
    (["experiment=quick/deep_mlp", "seed=7,8", "activation=belu"], 4),  # it has a grid of two learning rates
]


@pytest.mark.parametrize(("grid", "jobs"), [pytest.param(*row, id=" ".join(row[0])) for row in GRIDS])
def test_expand_gives_the_jobs_that_run_in_their_order(train, tmp_path, grid, jobs):
    arguments = [f"output_root={tmp_path}", *grid]
    folders = mark_finished(arguments)
    ended = train("-m", *arguments)
    expected = [f"[{k}/{jobs}] skipped (finished before)  {folder}" for k, folder in enumerate(folders, start=1)]
    assert progress(ended) == expected
    assert (ended.status, ended.err) == (0, "")


@pytest.mark.parametrize("wrong", ["experiment=quick/cnn,quick/deep_mlp", "sweep=activations,learning_rates"])
def test_grids_cannot_be_swept_over_because_hydra_would_leave_them_out(train, tmp_path, wrong):
    ended = train("-m", f"output_root={tmp_path}/outputs", wrong)
    assert ended.status == 2
    assert ended.err == f"error: {wrong} is not allowed; each has a grid of its own: give one at a time\n"
    assert list(tmp_path.iterdir()) == []


def test_two_jobs_that_are_the_same_run_are_refused(train, tmp_path):
    ended = train("-m", *TINY, f"output_root={tmp_path}/outputs", "trainer.threads=1,2")
    assert ended.status == 2
    assert ended.err.startswith("error: two jobs of this sweep are the same run, ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["sweep=activations"], ["relu", "brelu", "elu", "belu"]),
        (["sweep=activations", "activation=tanh,gelu"], ["tanh", "gelu"]),
        (["activation=tanh", "sweep=activations"], ["tanh"]),
        ([], ["belu"]),
    ],
    ids=str,
)
def test_the_command_line_wins_over_a_ready_made_grid(overrides, names):
    assert [cfg.activation.name for cfg in sweep.expand(overrides)] == names


def test_a_grid_of_learning_rates():
    rates = [cfg.optimizer.lr for cfg in sweep.expand(["sweep=learning_rates"])]
    assert rates == sorted(rates)
    assert len(rates) > 1


def test_a_sweep_that_is_done_does_not_import_torch(tmp_path):
    arguments = ["seed=0,1,2", f"output_root={tmp_path}"]
    mark_finished(arguments)
    ended = end(start("-X", "importtime", "scripts/train.py", "-m", *arguments))
    assert ended.status == 0
    assert len(progress(ended)) == 3
    assert not re.search(r"\| +torch$", ended.err, re.MULTILINE)
    assert re.search(r"\| +bipolar.sweep$", ended.err, re.MULTILINE)


@pytest.mark.parametrize(
    "wrong",
    [
        "activation=belu,bellu",
        "activation.dim=1,5",
        "activation.alpha=1.0,abc",
        "optimizer.lr=0.1,-1",
        "network.norm=none,grup",
        "trainer.epoch=1,2",
        "trainer.precision=float32,float31",
        f"trainer.device=cpu,{'cuda' if sys.platform == 'darwin' else 'mps'}",
        "logger.wandb.mode=offline,ofline",
    ],
)
def test_a_wrong_job_among_many_is_found_before_anything_is_written(train, tmp_path, wrong):
    logger = ["logger=wandb"] if wrong.startswith("logger") else []
    ended = train("-m", *TINY, *logger, f"output_root={tmp_path}/outputs", "seed=0,1", wrong)
    assert ended.status == 2
    assert re.fullmatch(r"error: .+\n", ended.err)
    assert wrong.split(",")[1] in ended.err or re.split(r"[.=]", wrong)[1] in ended.err
    assert ended.out == ""
    assert list(tmp_path.iterdir()) == []


# --- running them -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[BASIC, JOBLIB], ids=["basic", "joblib"])
def one_fails(request, tmp_path_factory):
    """A sweep of three jobs, the second of which fails: its command, how it ended, and where its runs are."""
    outputs = tmp_path_factory.mktemp("one-fails") / "outputs"
    command = ["scripts/train.py", "-m", *FRAGILE, f"output_root={outputs}", "seed=0,1,2", *request.param]
    return command, end(start(*command, TEST_FAILS="1", OMP_NUM_THREADS=None)), outputs


def test_a_failing_job_does_not_stop_the_others(one_fails):
    _, ended, outputs = one_fails
    assert ended.status == 1
    assert statuses(outputs) == {0: "finished", 1: "failed", 2: "finished"}
    (failed,) = outputs.glob("default/*seed1*")
    assert read_summary(failed)["error"] == "RuntimeError: broken on purpose"
    assert "broken on purpose" in (failed / "error.txt").read_text()
    assert ended.err.splitlines()[-1] == f"  failed {failed}: RuntimeError: broken on purpose"


def test_a_line_for_each_job_and_one_for_the_sweep(one_fails):
    _, ended, outputs = one_fails
    lines = ended.out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["[1/3]", "[2/3]", "[3/3]"]
    for folder in outputs.glob("default/*"):
        assert sum(str(folder) in line for line in lines) == 1
    assert sorted(line.split()[1] for line in lines[:-1]) == ["failed", "finished", "finished"]
    assert re.fullmatch(r"3 of 3 runs: 1 failed, 2 finished \([\d.]+ s\)", lines[-1])


def test_parallel_jobs_share_the_cores(one_fails):
    command, _, outputs = one_fails
    jobs = 2 if "hydra/launcher=joblib" in command else 1
    threads = {read_json(path)["threads"] for path in outputs.glob("default/*/environment.json")}
    assert threads == {max(1, joblib.cpu_count() // jobs)}


def test_no_bars_where_the_output_is_no_terminal(one_fails):
    _, ended, _ = one_fails
    assert "\r" not in ended.out + ended.err
    assert "step/s" not in ended.out + ended.err


def test_the_same_command_repeats_only_what_failed(train, tmp_path, monkeypatch):
    command = ["-m", *FRAGILE, f"output_root={tmp_path}", "seed=0,1,2"]
    monkeypatch.setenv("TEST_FAILS", "1")
    assert train(*command).status == 1
    assert statuses(tmp_path) == {0: "finished", 1: "failed", 2: "finished"}
    monkeypatch.delenv("TEST_FAILS")
    ended = train(*command)
    assert (ended.status, ended.err) == (0, "")
    assert [line.split()[1] for line in progress(ended)] == ["skipped", "finished", "skipped"]
    assert statuses(tmp_path) == {0: "finished", 1: "finished", 2: "finished"}
    assert list(tmp_path.rglob("error.txt")) == []
    before = {path: path.read_bytes() for path in tmp_path.glob("default/**/*") if path.is_file()}
    ended = train(*command)
    assert [line.split()[1] for line in progress(ended)] == ["skipped"] * 3
    assert {path: path.read_bytes() for path in tmp_path.glob("default/**/*") if path.is_file()} == before


@pytest.mark.parametrize("init", ["he", "lsuv"])
def test_a_job_that_fails_before_its_first_step_is_recorded_too(train, tmp_path, init):
    target = ["activation=relu", "activation._target_=test_sweeps.FailsAtOnce"]
    ended = train("-m", *TINY, *target, f"init={init}", f"output_root={tmp_path}", "seed=0,1")
    assert ended.status == 1
    assert statuses(tmp_path) == {0: "failed", 1: "failed"}


class FailsAtOnce(nn.ReLU):
    def forward(self, x):
        if x.device.type != "meta":
            raise RuntimeError("broken on purpose")
        return super().forward(x)


# Jobs that differ in all that a job could leave behind for the next one in the same process.
MIXED = [
    *TINY,
    "trainer.epochs=1",
    "trainer.threads=1",
    "network.dropout=0.1",
    "activation=relu,belu",
    "+seeds={relu:3,belu:4}",
    "seed='${seeds.${activation.name}}'",
    "trainer.precision=float32,bfloat16",
    "trainer.deterministic=false,true",
]
MIXED_REVERSED = [re.sub(r"=(\w+),(\w+)$", r"=\2,\1", text) for text in MIXED]
ALONE = """
import os, sys
import torch._dynamo
from bipolar import run, sweep
for cfg in sweep.expand(sys.argv[1:]):
    if os.fork() == 0:
        run.run(cfg)
        os._exit(0)
    if os.wait()[1]:
        sys.exit("a job failed")
"""


def records(outputs: Path) -> dict[str, list]:
    """What every run below `outputs` recorded, but for its speed."""
    return {
        folder.name: [
            {key: value for key, value in row.items() if key != "images_per_second"}
            for name in ("metrics.jsonl", "activations.jsonl")
            for row in read_jsonl(folder / name)
        ]
        for folder in outputs.glob("default/*")
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, list]:
    """The records of the jobs of MIXED, each run in a fresh process."""
    outputs = tmp_path_factory.mktemp("alone")
    ended = end(start("-c", ALONE, *MIXED, f"output_root={outputs}"))
    assert (ended.status, ended.err) == (0, "")
    return records(outputs)


def test_nothing_leaks_between_jobs_in_one_process(alone, tmp_path, train):
    ended = train("-m", *MIXED_REVERSED, f"output_root={tmp_path}")
    assert_same_records(ended, tmp_path, alone)


def test_a_job_does_not_inherit_flags(tiny_config):
    for deterministic in (True, False):
        run(tiny_config(f"trainer.deterministic={str(deterministic).lower()}", "trainer.threads=1"))
        assert torch.are_deterministic_algorithms_enabled() is deterministic


def test_nothing_leaks_between_jobs_in_parallel_workers(alone, tmp_path):
    ended = end(start("scripts/train.py", "-m", *MIXED, f"output_root={tmp_path}", *JOBLIB))
    assert_same_records(ended, tmp_path, alone)


def assert_same_records(ended: Ended, outputs: Path, alone: dict[str, list]) -> None:
    assert (ended.status, ended.err) == (0, "")
    found = records(outputs)
    assert len(found) == 8
    assert found.keys() == alone.keys()
    assert [name for name in found if found[name] != alone[name]] == []


def test_the_mixed_jobs_are_different_runs(alone):
    first_losses = {json.dumps(rows[0]) for rows in alone.values()}
    assert len(first_losses) == 4  # all but deterministic, which changes nothing on a CPU


# --- stopping them ----------------------------------------------------------------------------------------------------


def wait_for_records(process: subprocess.Popen[str], outputs: Path, seeds: list[int]) -> None:
    """Until the runs with these seeds have written metrics."""
    while not all(any(path.stat().st_size for path in outputs.glob(f"*/*seed{s}-*/metrics.jsonl")) for s in seeds):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("launcher", "stopped"),
    [
        pytest.param(BASIC, {0: "finished", 1: "interrupted"}, id="basic"),
        pytest.param(JOBLIB, {0: "interrupted", 1: "interrupted"}, id="joblib"),
    ],
)
def test_a_stopped_sweep_goes_on_with_the_same_command(train, tmp_path, launcher, stopped):
    command = ["-m", *FRAGILE, f"output_root={tmp_path}", "seed=0,1,2"]
    dawdling = [seed for seed, status in stopped.items() if status == "interrupted"]
    process = start("scripts/train.py", *command, *launcher, TEST_DAWDLES=",".join(map(str, dawdling)))
    wait_for_records(process, tmp_path, dawdling)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert_stopped(end(process), tmp_path, signal.SIGINT, stopped, total=3)
    again = train(*command)
    assert (again.status, again.err) == (0, "")
    assert statuses(tmp_path) == {0: "finished", 1: "finished", 2: "finished"}
    skipped = [line for line in progress(again) if line.split()[1] == "skipped"]
    assert len(skipped) == list(stopped.values()).count("finished")


@pytest.mark.parametrize(
    ("send", "number"),
    [
        pytest.param(os.kill, signal.SIGTERM, id="SIGTERM-to-parent"),
        pytest.param(os.killpg, signal.SIGINT, id="SIGINT"),
    ],
)
def test_a_stop_reaches_the_busy_worker_and_leaves_the_idle_one_alone(tmp_path, send, number):
    command = ["scripts/train.py", "-m", *FRAGILE, f"output_root={tmp_path}", "seed=0", *JOBLIB]
    process = start(*command, TEST_DAWDLES="0")
    wait_for_records(process, tmp_path, [0])
    send(process.pid, number)
    assert_stopped(end(process), tmp_path, number, {0: "interrupted"}, total=1)


def assert_stopped(ended: Ended, outputs: Path, number: signal.Signals, stopped: dict[int, str], total: int) -> None:
    assert ended.status == 128 + number
    assert ended.err == ""
    assert statuses(outputs) == stopped
    for seed, status in stopped.items():
        (folder,) = outputs.glob(f"default/*seed{seed}-*")
        summary = read_summary(folder)
        assert (folder / "checkpoint.pt").exists()
        if status == "interrupted":
            assert summary["reason"] == number.name
            assert 0 < summary["steps"] < summary["total_steps"]
            (line,) = (line for line in progress(ended) if str(folder) in line)
            assert f"{number.name} after {summary['steps']} of {summary['total_steps']} steps" in line
    assert ended.out.splitlines()[-1].startswith(f"{len(stopped)} of {total} runs: ")


# --- bars -------------------------------------------------------------------------------------------------------------


class Terminal:
    """Makes stderr a terminal; `shown` is what was written to it, once that has ended."""

    def __enter__(self) -> Terminal:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
        self._stderr, sys.stderr = sys.stderr, os.fdopen(slave, "w")
        self._data = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    # Written last. Waiting for the other end to be closed would not do: a process that Python starts meanwhile
    # (its resource tracker) inherits stderr and keeps it open.
    END = b"<end of the test's terminal>"

    def _read(self) -> None:
        while self.END not in self._data:
            self._data += os.read(self._master, 65536)

    def __exit__(self, *error) -> None:
        sys.stderr.write(self.END.decode())
        sys.stderr.close()
        sys.stderr = self._stderr
        self._reader.join()
        os.close(self._master)
        self.shown = self._data.removesuffix(self.END).decode()


def test_a_bar_shows_loss_error_and_speed(tiny_config):
    cfg = tiny_config()
    with Terminal() as terminal:
        run(cfg)
    assert re.search(r"epoch \d\.\d, loss \d\.\d{4}, error [\d.]+%, [\d,]+ images/s", terminal.shown)
    assert run_folder(cfg).name in terminal.shown
    assert re.search(r"\b\d+/16\b", terminal.shown)


def test_no_bar_where_it_is_not_wanted(tiny_config):
    with Terminal() as terminal:
        run(tiny_config("trainer.progress=false"))
    assert terminal.shown == ""


def test_a_sweep_has_a_bar_of_its_own(train, tmp_path):
    with Terminal() as terminal:
        ended = train("-m", *TINY, f"output_root={tmp_path}", "seed=0,1")
    assert ended.status == 0
    assert re.search(r"sweep: +100%.* 2/2 ", terminal.shown)
    assert "images/s" in terminal.shown
    assert [line.split()[0] for line in progress(ended)] == ["[1/2]", "[2/2]"]
