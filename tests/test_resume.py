"""Tests of interrupting and resuming: whatever happens to a run, its records end up as if nothing had.

The processes below are stopped at a known step: `GatedReLU` waits there until the test lets it go on.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, compose
from torch import nn

from bipolar import checkpoint, sweep
from bipolar.recording.folder import read_summary
from bipolar.run import run
from bipolar.runs import read_run, run_folder

ROOT = Path(__file__).resolve().parents[1]
STEPS = 16  # of every run below
GATE_VARIABLE, GATE_STEP = "BIPOLAR_TEST_GATE", 7


class GatedReLU(nn.ReLU):
    """In the training step that makes GATE_STEP updates complete: makes a file `reached`, and waits for a file `go`."""

    calls = 0

    def forward(self, x):
        gate = os.environ.get(GATE_VARIABLE)
        if gate and x.requires_grad:
            self.calls += 1
            if self.calls == GATE_STEP:
                Path(gate, "reached").touch()
                while not Path(gate, "go").exists():
                    time.sleep(0.01)
        return super().forward(x)


class FlakyReLU(nn.ReLU):
    """Calls `fault` in the training step that follows `good_steps`; counts the forward passes of all layers.

    `early_fault` is called outside training: in the pass with which the trainer looks at the network.
    """

    layers = 2
    fault = None
    early_fault = None
    good_steps = 0
    calls = 0

    def forward(self, x):
        cls = type(self)
        if x.requires_grad and not x.is_meta:
            cls.calls += 1
            if cls.fault is not None and cls.calls == cls.layers * cls.good_steps + 1:
                cls.fault()
        if cls.early_fault is not None and not self.training and not x.is_meta:
            cls.early_fault()
        return super().forward(x)


class StopAfter:
    """Asks a run to stop after `steps` more steps."""

    def __init__(self, steps):
        self.left = steps

    def __call__(self):
        self.left -= 1
        return None if self.left else "test"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An .npz data set of random images: 267 for training, 30 for validation."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("images") / "images.npz"
    sizes = {"train": 297, "test": 40}
    x = {f"x_{name}": rng.integers(256, size=(size, 8, 8, 3), dtype=np.uint8) for name, size in sizes.items()}
    y = {f"y_{name}": rng.integers(5, size=size) for name, size in sizes.items()}
    np.savez(path, **x, **y)
    return path


VARIANTS = {
    "dropout": ["network.dropout=0.3"],
    "images": [
        *("dataset=npz", "dataset.augment={crop: 2, flip: true}", "optimizer=adam", "trainer.accumulate=3"),
        *("network=cnn", "network.widths=[4,6]", "network.norm=batch", "network.dropout=0.2"),
    ],
    "plateau": [
        *("scheduler=plateau", "scheduler.patience=2", "optimizer=adamw", "optimizer.lr=0.05"),
        *("trainer.evaluate_every=1", "trainer.statistics_every=log", "network.norm=batch", "dataset.separation=0"),
    ],
    "float16": ["trainer.precision=float16", "dataset.separation=100", "trainer.grad_clip=1"],
}
CUTS = [[1], [5], [8], [15], [3, 1, 4, 5, 2], [1] * 5]
CUTS += [np.diff([0, *sorted(random.Random(seed).sample(range(1, STEPS), 3))]).tolist() for seed in range(2)]


@pytest.fixture
def make_config(tmp_path, images):
    """make_config(variant, *overrides): a configuration whose run takes 16 steps."""

    def make(variant="dropout", *overrides):
        options = [*TINY, *VARIANTS[variant]]
        if "dataset=npz" in options:
            options = [o for o in options if o not in TINY or not o.startswith(("dataset", "network"))]
            options.append(f"dataset.path={images}")
        return compose(*options, f"output_root={tmp_path}/outputs", *overrides)

    return make


def records(cfg):
    """metrics.jsonl without the speed, as text, and activations.jsonl, as bytes."""
    folder = run_folder(cfg)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [json.dumps({k: v for k, v in row.items() if k != "images_per_second"}) for row in metrics]
    return "\n".join(kept), (folder / "activations.jsonl").read_bytes()


def load(cfg):
    return torch.load(run_folder(cfg) / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Bit for bit, in nested containers."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check_equal(cfg, reference):
    """The run is finished and no different from the uninterrupted `reference`."""
    assert records(cfg) == records(reference)
    state, wanted = load(cfg), load(reference)
    for key in ("model", "optimizer", "schedule", "scaler", "random", "step", "state", "last", "best", "samples_seen"):
        assert same(state[key], wanted[key]), key
    summary, expected = (read_run(run_folder(c)).summary for c in (cfg, reference))
    assert summary["status"] == expected["status"] == "finished"
    assert {k: v for k, v in summary.items() if "second" not in k} == {
        k: v for k, v in expected.items() if "second" not in k
    }


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return tmp_path_factory.mktemp("references")


@pytest.fixture
def uninterrupted(make_config, references):
    """Runs the same configuration elsewhere, in one go; only once for all tests that want the same."""

    def make(variant="dropout", *overrides):
        cfg = make_config(variant, *overrides, f"output_root={references}")
        assert run(cfg)["steps"] == STEPS
        return cfg

    return make


# -- in this process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_interrupted_and_resumed(make_config, uninterrupted, variant, cuts):
    cfg = make_config(variant)
    done = 0
    for steps in cuts:
        summary = run(cfg, StopAfter(steps))
        done += steps
        assert (summary["status"], summary["reason"], summary["steps"]) == ("interrupted", "test", done)
        assert load(cfg)["step"] == done
        assert '"test"' not in records(cfg)[0]
        torch.manual_seed(done)  # another job in the same process
    assert run(cfg)["status"] == "finished"
    check_equal(cfg, uninterrupted(variant))


def test_the_variants_test_something(uninterrupted):
    """The plateau scheduler has acted before the middle of the run, and the loss scale has been lowered."""
    rates = read_run(run_folder(uninterrupted("plateau"))).curve("train", "learning_rate")
    assert min(rate for step, rate in zip(*rates, strict=True) if step <= 8) < 0.05
    assert 0 < load(uninterrupted("float16"))["scaler"]["scale"] < 2**16


@pytest.mark.parametrize("variant", ["dropout", "images"])
@pytest.mark.parametrize(("saved", "reached"), [(1, 2), (5, 7), (7, 12), (8, 15)])
def test_records_after_the_last_checkpoint_are_made_again(make_config, uninterrupted, variant, saved, reached):
    """As after a kill: the checkpoint is older than the records, the last of which is torn, and there is no summary."""
    cfg = make_config(variant)
    folder = run_folder(cfg)
    run(cfg, StopAfter(saved))
    older = (folder / "checkpoint.pt").read_bytes()
    run(cfg, StopAfter(reached - saved))
    (folder / "checkpoint.pt").write_bytes(older)
    (folder / "checkpoint.pt.new").write_bytes(older[:100])
    (folder / "summary.json").unlink()
    for name in ("metrics.jsonl", "activations.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 99, "spl')
    assert run(cfg)["status"] == "finished"
    check_equal(cfg, uninterrupted(variant))


@pytest.mark.parametrize("steps", [3, STEPS])
def test_without_a_checkpoint_it_starts_afresh(make_config, uninterrupted, steps):
    cfg = make_config()
    run(cfg, StopAfter(steps))
    for name in ("checkpoint.pt", "summary.json"):
        (run_folder(cfg) / name).unlink()
    run(cfg)
    check_equal(cfg, uninterrupted())


@pytest.mark.parametrize("variant", ["dropout", "plateau"])
def test_killed_at_the_very_end(make_config, uninterrupted, variant):
    """After the last checkpoint, before the summary: the test split is evaluated again and recorded once."""
    cfg = make_config(variant)
    run(cfg)
    (run_folder(cfg) / "summary.json").unlink()
    assert not run(cfg).get("skipped")
    check_equal(cfg, uninterrupted(variant))


def test_max_minutes(make_config, uninterrupted):
    short, whole = make_config("dropout", "trainer.max_minutes=1e-9"), make_config()
    assert run_folder(short) == run_folder(whole)
    for steps in (1, 2):
        summary = run(short)
        assert (summary["status"], summary["reason"], summary["steps"]) == ("interrupted", "max_minutes", steps)
    assert run(make_config("dropout", "trainer.max_minutes=1000"))["status"] == "finished"
    check_equal(whole, uninterrupted())


@pytest.mark.parametrize("minutes", [0, 1e-9, 1000])
def test_checkpoints_on_the_way_change_nothing(make_config, uninterrupted, minutes):
    cfg = make_config("images", f"trainer.checkpoint_minutes={minutes}")
    run(cfg)
    check_equal(cfg, uninterrupted("images"))


@pytest.mark.parametrize("options", [[], ["optimizer.lr=1e30"]], ids=["finished", "diverged"])
def test_a_run_that_is_done_is_skipped(make_config, options):
    cfg = make_config("dropout", *options)
    summary = run(cfg)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run_folder(cfg).iterdir()}
    again = run(cfg)
    assert again.pop("skipped")
    assert (again["status"], again["steps"]) == (summary["status"], summary["steps"])
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run_folder(cfg).iterdir()} == before


# -- failures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def flaky(monkeypatch):
    """FlakyReLU, whose class attributes the test may set."""
    for name in ("fault", "early_fault", "good_steps", "calls"):
        monkeypatch.setattr(FlakyReLU, name, getattr(FlakyReLU, name))
    return FlakyReLU


def raising(error):
    def fault():
        raise error

    return staticmethod(fault)


FLAKY = ["activation=relu", f"activation._target_={__name__}.FlakyReLU"]


@pytest.mark.parametrize("good_steps", [0, 5, 8])
@pytest.mark.parametrize("checkpoint_minutes", [0, 5])
@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_failed_run_is_recorded_and_goes_on(make_config, uninterrupted, flaky, error, good_steps, checkpoint_minutes):
    cfg = make_config("dropout", *FLAKY, f"trainer.checkpoint_minutes={checkpoint_minutes}")
    folder = run_folder(cfg)
    flaky.fault, flaky.good_steps = raising(error), good_steps
    with pytest.raises(type(error)) as raised:
        run(cfg)
    assert raised.value is error
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["total_steps"]) == (good_steps, STEPS)
    if isinstance(error, RuntimeError):
        assert summary["status"] == "failed"
        assert summary["error"] == "RuntimeError: out of luck"
        text = (folder / "error.txt").read_text()
        assert text.startswith("Traceback")
        assert text.endswith("RuntimeError: out of luck\n")
    else:
        assert (summary["status"], summary["reason"]) == ("interrupted", "SIGINT")

    flaky.fault, flaky.calls = None, 0
    assert run(cfg)["status"] == "finished"
    resumed_at = good_steps if checkpoint_minutes == 0 else 0
    assert flaky.calls == flaky.layers * (STEPS - resumed_at)
    assert not (folder / "error.txt").exists()
    check_equal(cfg, uninterrupted("dropout", *FLAKY))


def test_a_failure_is_not_skipped(make_config, flaky):
    cfg = make_config("dropout", *FLAKY)
    for attempt in range(2):
        flaky.fault, flaky.good_steps, flaky.calls = raising(RuntimeError(f"attempt {attempt}")), 2, 0
        with pytest.raises(RuntimeError, match=f"attempt {attempt}"):
            run(cfg)
        assert f"attempt {attempt}" in (run_folder(cfg) / "error.txt").read_text()
    assert {row["split"] for row in read_run(run_folder(cfg)).metrics} == {"train"}


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_failure_before_the_first_step(make_config, uninterrupted, flaky, error, steps_before):
    cfg = make_config("dropout", *FLAKY)
    if steps_before:
        run(cfg, StopAfter(steps_before))
    flaky.early_fault = raising(error)
    with pytest.raises(type(error)) as raised:
        run(cfg)
    assert raised.value is error
    summary = read_summary(run_folder(cfg))
    if isinstance(error, RuntimeError):
        assert (summary["status"], summary["error"]) == ("failed", "RuntimeError: out of luck")
        assert (run_folder(cfg) / "error.txt").exists()
    else:
        assert summary is None or summary["status"] == "interrupted"

    flaky.early_fault, flaky.calls = None, 0
    assert run(cfg)["status"] == "finished"
    assert flaky.calls == flaky.layers * (STEPS - steps_before)
    check_equal(cfg, uninterrupted("dropout", *FLAKY))


def test_unreadable_checkpoint_does_not_leave_the_run_without_a_status(make_config):
    cfg = make_config()
    run(cfg, StopAfter(3))
    path = run_folder(cfg) / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(Exception, match=r".+"):
        run(cfg)
    assert read_summary(run_folder(cfg)) is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_saves_a_second_one_does_not_wait(make_config, uninterrupted, flaky, number):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    cfg = make_config("dropout", *FLAKY)
    flaky.good_steps = 4
    flaky.fault = staticmethod(lambda: signal.raise_signal(number))
    summary = run(cfg)
    assert (summary["status"], summary["reason"], summary["steps"]) == ("interrupted", number.name, 5)
    assert load(cfg)["step"] == 5

    flaky.calls = 0
    flaky.fault = staticmethod(lambda: [signal.raise_signal(number) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        run(cfg)
    summary = read_run(run_folder(cfg)).summary
    assert (summary["status"], summary["reason"], summary["steps"]) == ("interrupted", number.name, 9)
    assert load(cfg)["step"] == 5
    assert {n: signal.getsignal(n) for n in handlers} == handlers

    flaky.fault = None
    run(cfg)
    check_equal(cfg, uninterrupted("dropout", *FLAKY))


# -- checkpoints -----------------------------------------------------------------------------------------------------


def draws():
    return (
        [random.random(), random.gauss(0, 1)],
        [*np.random.random(2), *np.random.normal(size=3)],  # noqa: NPY002
        torch.rand(3).tolist(),
    )


@pytest.mark.parametrize("halfway", [False, True])  # through a pair of normal numbers
def test_random_state_round_trip(tmp_path, halfway):
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    if halfway:
        random.gauss(0, 1)
        np.random.normal()  # noqa: NPY002
    checkpoint.save(tmp_path / "state.pt", checkpoint.random_state())
    wanted = draws()
    assert draws() != wanted
    checkpoint.restore_random_state(checkpoint.load(tmp_path / "state.pt"))
    assert draws() == wanted


def test_save_and_load(tmp_path):
    state = {"a": torch.arange(3.0), "b": [1, math.inf, None, "text"], "c": {"d": torch.eye(2, dtype=torch.bfloat16)}}
    checkpoint.save(tmp_path / "state.pt", state)
    assert same(checkpoint.load(tmp_path / "state.pt"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_save_never_writes_into_the_old_file(tmp_path):
    old, new = {"a": torch.zeros(10)}, {"a": torch.ones(10)}
    checkpoint.save(tmp_path / "state.pt", old)
    (tmp_path / "kept.pt").hardlink_to(tmp_path / "state.pt")
    checkpoint.save(tmp_path / "state.pt", new)
    assert same(checkpoint.load(tmp_path / "kept.pt"), old)
    assert same(checkpoint.load(tmp_path / "state.pt"), new)


@pytest.mark.parametrize("obstacle", ["unpicklable", "directory"])
def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, obstacle):
    path = tmp_path / "state.pt"
    old, new = {"a": torch.zeros(1000)}, {"a": torch.ones(1000)}
    checkpoint.save(path, old)
    if obstacle == "directory":
        (tmp_path / "state.pt.new").mkdir()
    with pytest.raises(Exception, match=r".+"):
        checkpoint.save(path, {**new, "b": (lambda: 0) if obstacle == "unpicklable" else 0})
    assert same(checkpoint.load(path), old)

    if obstacle == "directory":
        (tmp_path / "state.pt.new").rmdir()
    checkpoint.save(path, new)
    assert same(checkpoint.load(path), new)


# -- other processes -------------------------------------------------------------------------------------------------


class Process:
    """scripts/train.py with a gate, in a process of its own."""

    def __init__(self, tmp_path, *overrides):
        self.gate = tmp_path / "gate"
        shutil.rmtree(self.gate, ignore_errors=True)
        self.gate.mkdir()
        self.options = [*TINY, "activation=relu", f"activation._target_={__name__}.GatedReLU", *overrides]
        self.command = [
            sys.executable,
            str(ROOT / "scripts/train.py"),
            *self.options,
            f"output_root={tmp_path}/outputs",
        ]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
        self.cfg = sweep.compose(self.command[2:])
        self.reference = sweep.compose([*self.options, f"output_root={tmp_path}/reference"])

    def run_to_gate(self):
        environment = {**self.environment, GATE_VARIABLE: str(self.gate)}
        self.process = subprocess.Popen(self.command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while not (self.gate / "reached").exists():
            assert self.process.poll() is None, self.process.communicate()[0].decode()
            time.sleep(0.01)

    def end(self):
        output = self.process.communicate()[0].decode()
        return self.process.returncode, output

    def run_again(self):
        done = subprocess.run(self.command, env=self.environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal(tmp_path, number, status):
    job = Process(tmp_path)
    job.run_to_gate()
    job.process.send_signal(number)
    (job.gate / "go").touch()
    code, output = job.end()
    assert code == status, output
    summary = read_run(run_folder(job.cfg)).summary
    assert (summary["status"], summary["reason"], summary["steps"]) == ("interrupted", number.name, GATE_STEP)
    assert load(job.cfg)["step"] == GATE_STEP
    assert f"{GATE_STEP} of {STEPS} steps" in output

    if number == signal.SIGINT:  # the same command
        code, output = job.run_again()
        assert code == 0, output
    else:
        run(job.cfg)
    run(job.reference)
    check_equal(job.cfg, job.reference)


def test_kill(tmp_path):
    """Without any chance to save, after six checkpoints and in the middle of a line."""
    job = Process(tmp_path, "trainer.checkpoint_minutes=0")
    job.run_to_gate()
    job.process.kill()
    assert job.end()[0] == -signal.SIGKILL
    folder = run_folder(job.cfg)
    assert not (folder / "summary.json").exists()
    assert load(job.cfg)["step"] == GATE_STEP - 1
    assert (folder / "metrics.jsonl").read_text().count("\n") == 3  # every line is handed over at once
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "epoch": 1.0, "spl')

    assert run(job.cfg)["status"] == "finished"
    run(job.reference)
    check_equal(job.cfg, job.reference)
