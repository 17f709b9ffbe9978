"""Tests of the train command: how it ends, what it prints, what it imports and what it leaves on disk."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import TINY
from torch import nn

from bipolar import cli, environment, sweep
from bipolar.recording.folder import read_json, read_summary
from bipolar.runs import run_folder

ROOT = Path(__file__).resolve().parents[1]
MISSING_DEVICE = "cuda" if sys.platform == "darwin" else "mps"
EXPERIMENTS = sorted(
    str(path.relative_to(sweep.CONFIGS / "experiment").with_suffix(""))
    for path in sweep.CONFIGS.glob("experiment/**/*.yaml")
)


class Broken(nn.ReLU):
    """An activation that raises in the first training step."""

    def forward(self, x):
        if x.requires_grad and x.device.type != "meta":
            raise RuntimeError("broken on purpose")
        return super().forward(x)


BROKEN = ["activation=relu", "activation._target_=test_cli.Broken"]


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def imported(self) -> set[str]:
        """The modules that a process under `-X importtime` imported."""
        return {line.split("|")[-1].strip() for line in self.err.splitlines() if line.startswith("import time:")}


def process(*arguments: str) -> Ended:
    """`python <arguments>` in a process of its own."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "tests"])}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True)
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[list[str], Ended, Path]:
    """The arguments of a run in a process of its own, how it ended, and its folder."""
    arguments = [*TINY, f"output_root={tmp_path_factory.mktemp('finished')}/outputs"]
    ended = process("-X", "importtime", "scripts/train.py", *arguments)
    return arguments, ended, run_folder(sweep.compose(arguments))


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- how it ends ------------------------------------------------------------------------------------------------------


def test_finished(finished):
    _, ended, folder = finished
    assert ended.status == 0
    assert re.fullmatch(
        rf"finished  {folder}  train loss \d\.\d{{4}}, valid error [\d.]+%, test error [\d.]+%  [\d.]+ s\n", ended.out
    )
    assert all(line.startswith("import time:") for line in ended.err.splitlines())
    assert read_summary(folder)["status"] == "finished"


def test_the_printed_figures_are_those_of_the_summary(finished):
    _, ended, folder = finished
    final = read_summary(folder)["final"]
    printed = [float(number) for number in re.findall(r"(?:loss|error) ([\d.]+)", ended.out)]
    expected = [final["train_loss"], 100 * final["valid_error"], 100 * final["test_error"]]
    assert printed == pytest.approx(expected, abs=0.005)


def test_a_finished_run_is_skipped_without_importing_torch(finished):
    arguments, _, folder = finished
    before = content(folder)
    ended = process("-X", "importtime", "scripts/train.py", *arguments)
    assert ended.status == 0
    assert ended.out.startswith(f"skipped (finished before)  {folder}  train loss")
    assert ended.imported.isdisjoint({"torch", "torchvision", "wandb"})
    assert "bipolar.run" in ended.imported
    assert content(folder) == before


def test_diverged_is_a_result(train, tmp_path):
    arguments = [*TINY, f"output_root={tmp_path}", "optimizer.lr=1e30"]
    folder = run_folder(sweep.compose(arguments))
    ended = train(*arguments)
    assert ended.status == 0
    assert ended.out.startswith(f"diverged  {folder}  ")
    assert read_summary(folder)["status"] == "diverged"
    again = train(*arguments)
    assert again.status == 0
    assert again.out.startswith(f"skipped (finished before)  {folder}")


def test_failed(train, tmp_path):
    arguments = [*TINY, f"output_root={tmp_path}", *BROKEN]
    folder = run_folder(sweep.compose(arguments))
    ended = train(*arguments)
    assert ended.status == 1
    assert ended.out == ""
    assert ended.err.startswith("Traceback")
    assert ended.err.splitlines()[-1] == f"failed {folder}: RuntimeError: broken on purpose"
    summary = read_summary(folder)
    assert (summary["status"], summary["error"]) == ("failed", "RuntimeError: broken on purpose")
    assert "broken on purpose" in (folder / "error.txt").read_text()


def test_a_wrong_value_ends_the_process_with_status_2(tmp_path):
    ended = process("scripts/train.py", f"output_root={tmp_path}/outputs", "activation=bellu")
    assert ended.status == 2
    assert ended.out == ""
    assert re.fullmatch(r"error: activation=bellu .*\(did you mean 'belu'\?\)\n", ended.err)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("overrides", [[], ["optimizer.lr=1e30"]], ids=["finished", "diverged"])
def test_execute_gives_sweepers_the_best_validation_loss(tiny_config, overrides):
    cfg = tiny_config(*overrides)
    first, again = cli.execute(cfg), cli.execute(cfg)
    assert first == again == read_summary(run_folder(cfg))["best"].get("valid_loss")


@pytest.mark.parametrize(
    "arguments",
    [["-m", "seed=0,1"], ["seed=0,1", "-m"], ["trainer.epochs=1", "--multirun", "seed=0,1"], ["-m", "seed=0,1", "-m"]],
    ids=" ".join,
)
def test_multirun_flag_goes_anywhere(train, tmp_path, arguments):
    ended = train(f"output_root={tmp_path}", *arguments[:1], *TINY, *arguments[1:])
    assert (ended.status, ended.err) == (0, "")
    assert sorted(path.name.split("-")[5] for path in tmp_path.glob("default/*")) == ["seed0", "seed1"]


# --- wrong input ------------------------------------------------------------------------------------------------------

VECTORS = ["dataset=gaussian", "dataset.shape=[8]"]

WRONG = [
    # an unknown choice
    (["activation=bellu"], ["activation=bellu", "brelu", "selu", "did you mean 'belu'"]),
    (["network=mpl"], ["network=mpl", "cnn, mlp", "did you mean 'mlp'"]),
    (["sweep=activation"], ["sweep=activation", "learning_rates", "did you mean 'activations'"]),
    (["experiment=nothing"], ["experiment=nothing", *EXPERIMENTS]),
    (["experiment=quick/nothing"], ["experiment=quick/nothing", *EXPERIMENTS]),
    # an unknown group or option
    (["activations=belu"], ["activations", "network, dataset, init", "did you mean 'activation'"]),
    (["trainer.epoch=3"], ["trainer.epoch;", "max_steps", "did you mean 'epochs'"]),
    (["network.pool=max"], ["network.pool;", "depth, width, norm, dropout"]),
    (["dataset.augment.flp=true"], ["dataset.augment.flp;", "crop, padding_mode, flip", "did you mean 'flip'"]),
    (["sede=1"], ["sede;", "did you mean 'seed'"]),
    (["logger.wandb.mode=offline"], ["there is no option logger.wandb.mode"]),
    # a wrong name
    (["trainer.precision=float31"], ["precision='float31'", "auto, float32, bfloat16, float16", "'float32'"]),
    (["network.norm=grup"], ["network.norm='grup'", "none, batch, group, layer", "did you mean 'group'"]),
    (["activation.pattern=halfs"], ["activation.pattern='halfs'", "interleaved, halves", "did you mean 'halves'"]),
    (["init=lsuv", "init.variant=author"], ["init.variant='author'", "textbook", "did you mean 'authors'"]),
    (["trainer.device=gpu"], ["trainer.device='gpu'", "auto, cpu, cuda, mps"]),
    (["logger=wandb", "logger.wandb.mode=ofline"], ["logger.wandb.mode='ofline'", "did you mean 'offline'"]),
    (["activation._target_=torch.nn.Relu"], ["torch.nn.Relu"]),
    # a wrong type
    (["seed=zero"], ["seed='zero'", "an integer"]),
    (["trainer.epochs=two"], ["trainer.epochs='two'", "an integer of at least 0"]),
    (["trainer.epochs=0.5"], ["trainer.epochs=0.5", "an integer of at least 0"]),
    (["trainer.compile=1"], ["trainer.compile=1", "true or false"]),
    (["network.width=2.5"], ["network.width=2.5", "an integer of at least 1"]),
    (["optimizer.lr=fast"], ["optimizer.lr='fast'", "a number"]),
    (["trainer.statistics_every=often"], ["trainer.statistics_every='often'", "log"]),
    (["activation.alpha=abc"], ["activation", "alpha"]),
    (["optimizer.momentum=abc"], ["optimizer.momentum", "abc"]),
    (["optimizer=adam", "optimizer.betas=3"], ["optimizer.betas", "3"]),
    (["init=lsuv", "init.samples=abc"], ["init.samples", "abc"]),
    (["scheduler=step", "scheduler.milestones=0.5"], ["scheduler.milestones", "0.5"]),
    (["dataset.split_seed=abc"], ["dataset.split_seed", "abc"]),
    (["dataset=gaussian", "dataset.data_seed=abc"], ["dataset.data_seed", "abc"]),
    (["dataset=gaussian", "dataset.shape=8"], ["dataset.shape", "8"]),
    (["dataset=gaussian", "dataset.shape=[8.5]"], ["dataset.shape", "8.5"]),
    (["activation=null"], ["activation"]),
    # out of range
    (["seed=-1"], ["seed=-1", "at least 0"]),
    (["optimizer.lr=-1"], ["optimizer.lr=-1", "(0, inf)"]),
    (["scheduler.final=2"], ["scheduler.final=2", "[0, 1]"]),
    (["dataset.valid_fraction=2"], ["dataset.valid_fraction=2", "(0, 1)"]),
    (["dataset=gaussian", "dataset.classes=0"], ["dataset.classes=0", "at least 1"]),
    (["trainer.batch_size=100000"], ["trainer.batch_size=100000", "training samples"]),
    (["activation.dim=5"], ["activation", "dim=5"]),
    # what does not go together
    (["trainer.epochs=null", "trainer.max_steps=null"], ["epochs", "max_steps", "null"]),
    (["network=cnn", *VECTORS], ["network", "CNN", "(8,)"]),
    ([*VECTORS, "dataset.augment.flip=true"], ["dataset.augment", "images"]),
    # what is not there
    (["dataset=npz"], ["dataset.path"]),
    (["dataset=npz", "dataset.path=missing.npz"], ["dataset.path=missing.npz", "no such file"]),
    ([f"trainer.device={MISSING_DEVICE}"], [f"trainer.device='{MISSING_DEVICE}'", "choose from auto, cpu"]),
    # not even an override
    (["optimizer.lr=[1"], ["optimizer.lr=[1"]),
    (["trainer"], ["trainer"]),
    (["--epochs=3"], ["--epochs=3"]),
    (["seed=0,1"], ["seed=0,1", "-m"]),
    (["~optimizer.lr"], ["optimizer.lr"]),
]


@pytest.mark.parametrize(("wrong", "named"), [pytest.param(*row, id=" ".join(row[0])) for row in WRONG])
def test_wrong_input_is_one_line_and_writes_nothing(train, tmp_path, wrong, named):
    ended = train(f"output_root={tmp_path}/outputs", *wrong)
    assert ended.status == 2
    assert ended.out == ""
    assert re.fullmatch(r"error: .+\n", ended.err)
    assert [text for text in named if text not in ended.err] == []
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_wrong_input(train, tmp_path):
    (tmp_path / "file").touch()
    ended = train(*TINY, f"output_root={tmp_path}/file/outputs")
    assert ended.status == 2
    assert re.fullmatch(rf"error: .*{tmp_path}/file.*\n", ended.err)


# --- what it imports --------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    ended = process("-X", "importtime", "scripts/train.py", "--help")
    assert ended.status == 0
    for text in ("activation: ", "belu", "optimizer: ", "seed: 0", "output_root: outputs"):
        assert text in ended.out
    assert "bipolar.cli" in ended.imported
    assert ended.imported.isdisjoint({"torch", "wandb", "torchvision", "numpy"})


def test_a_run_imports_only_what_it_uses(finished):
    _, ended, _ = finished
    assert "torch" in ended.imported
    assert ended.imported.isdisjoint({"wandb", "torchvision", "tensorboard", "sklearn"})


WITHOUT_WANDB = """
import contextlib, importlib.util, runpy, sys
sys.modules["wandb"] = None  # now it cannot be found, nor imported
assert importlib.util.find_spec("wandb") is None
arguments = sys.argv[1:]
for logger in (["logger=files"], ["logger=wandb", "logger.wandb.mode=disabled", "seed=1"]):
    sys.argv = ["scripts/train.py", *arguments, *logger]
    with contextlib.suppress(SystemExit):
        runpy.run_path("scripts/train.py", run_name="__main__")
"""


def test_trains_where_wandb_is_not_installed(tmp_path):
    ended = process("-c", WITHOUT_WANDB, *TINY, f"output_root={tmp_path}")
    assert ended.err == ""
    assert [line.split()[0] for line in ended.out.splitlines()] == ["finished", "finished"]


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
@pytest.mark.parametrize("flags", [[], ["-m", "seed=0,1"]], ids=["run", "sweep"])
def test_a_logger_whose_package_is_missing_is_wrong_input(train, tmp_path, monkeypatch, package, flags):
    monkeypatch.setitem(sys.modules, package, None)
    ended = train(*TINY, f"output_root={tmp_path}/outputs", f"logger={package}", *flags)
    assert ended.status == 2
    assert re.fullmatch(rf"error: logger={package} needs .*pip install {package}.*logger=files\n", ended.err)
    assert list(tmp_path.iterdir()) == []


# --- environment.json -------------------------------------------------------------------------------------------------


def test_environment_says_what_the_run_ran_on(finished):
    arguments, _, folder = finished
    found = read_json(folder / "environment.json")
    assert found["command"] == shlex.join(["python", "scripts/train.py", *arguments])
    assert found["versions"]["python"] == platform.python_version()
    for package in ("torch", "numpy", "hydra-core", "omegaconf"):
        assert found["versions"][package] == metadata.version(package)
    assert found["machine"]["cores"] == os.cpu_count()
    assert found["machine"]["platform"]
    assert found["machine"]["processor"]
    assert (found["device"], found["accelerator"], found["precision"]) == ("cpu", None, "float32")
    assert found["threads"] == int(os.environ["OMP_NUM_THREADS"])


def test_environment_has_the_commit(finished):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    found = read_json(finished[2] / "environment.json")
    assert found["commit"] == (head.stdout.strip() if head.returncode == 0 else None)
    assert found["dirty"] is None or re.fullmatch("[0-9a-f]{12}", found["dirty"])


def test_environment_has_no_path_of_this_machine(finished):
    arguments, _, folder = finished
    text = json.dumps(read_json(folder / "environment.json")).replace(arguments[-1], "")
    assert str(ROOT) not in text
    assert str(Path.home()) not in text


@pytest.mark.parametrize("program", ["scripts/train.py", str(ROOT / "scripts/train.py")], ids=["relative", "absolute"])
def test_the_command_is_relative_to_the_current_folder(monkeypatch, program):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [program, "-m", "seed=0,1"])
    assert environment.command() == "python scripts/train.py -m seed=0,1"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_dirty_changes_with_the_code(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit():
        """What the copy of bipolar/environment.py in that repository says."""
        spec = importlib.util.spec_from_file_location("copy_of_environment", module)
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        return copy.commit()

    module, config, readme = (tmp_path / name for name in ("bipolar/environment.py", "configs/x.yaml", "README.md"))
    module.parent.mkdir()
    shutil.copy(environment.__file__, module)
    assert commit() == {"commit": None, "dirty": None, "diff": ""}
    config.parent.mkdir()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "experiments").mkdir()
    config.write_text("a: 1")
    readme.write_text("text")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert commit() == {"commit": head, "dirty": None, "diff": ""}
    readme.write_text("another text")
    assert commit() == {"commit": head, "dirty": None, "diff": ""}
    marks = []
    for text in ("a: 2", "a: 3", "a: 2"):
        config.write_text(text)
        marks.append(commit()["dirty"])
    assert marks[0] == marks[2] != marks[1]
    assert None not in marks
    (tmp_path / "configs" / "new.yaml").write_text("b: 1")
    assert commit()["dirty"] not in marks
    assert "+b: 1" in commit()["diff"]
