"""Text from a trained network: scripts/sample.py and what it is made of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bipolar import sampling
from bipolar.errors import ConfigError, DataError
from bipolar.run import run
from bipolar.runs import run_folder
from bipolar.sweep import CONFIGS, compose

SMALL = ["network=rnn", "dataset=python_docs", "network.layers=4", "network.hidden_size=16", "trainer.batch_size=8",
         "dataset.sequence_length=10", "dataset.evaluation_size=200", "trainer.max_steps=3",
         "optimizer=adam"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = compose([*SMALL, f"output_root={tmp_path_factory.mktemp('outputs')}"])
    run(cfg)
    return run_folder(cfg)


def test_the_network_is_the_one_that_was_trained(folder: Path) -> None:
    model, vocabulary = sampling.load(folder)
    saved = torch.load(folder / "checkpoint.pt")["model"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert set("the ") <= set(vocabulary)


def test_twins_write_the_same_text(folder: Path, tmp_path: Path) -> None:
    cfg = compose([*SMALL, "twin=true", f"output_root={tmp_path}"])
    run(cfg)
    texts = ["".join(sampling.sample(*sampling.load(each), "the ", 50)) for each in (folder, run_folder(cfg))]
    assert texts[0] == texts[1]


def test_a_seed_makes_a_text_and_temperature_0_needs_none(folder: Path) -> None:
    model, vocabulary = sampling.load(folder)
    write = lambda temperature, seed: "".join(sampling.sample(model, vocabulary, "the ", 40, temperature, seed))
    assert len(write(1.0, 0)) == 40
    assert write(1.0, 0) == write(1.0, 0) != write(1.0, 1)
    assert write(0.0, 0) == write(0.0, 1)


def test_the_likeliest_text_is_the_one_that_the_network_predicts_at_once(folder: Path) -> None:
    """The state that is carried from character to character is that of reading all of it."""
    model, vocabulary = sampling.load(folder)
    model = model.double()
    text = "the " + "".join(sampling.sample(model, vocabulary, "the ", 20, temperature=0))
    with torch.no_grad():
        logits, _ = model(torch.tensor([[vocabulary.index(character) for character in text]]))
    assert "".join(vocabulary[index] for index in logits[0, 3:-1].argmax(1)) == text[4:]


def test_draws_follow_the_predicted_distribution(folder: Path) -> None:
    logits, generator = torch.tensor([0.0, 1.0, 2.0]), torch.Generator().manual_seed(0)
    draws = torch.tensor([sampling._draw(logits, 0.5, generator) for _ in range(4000)])
    shares = torch.bincount(draws, minlength=3) / len(draws)
    assert shares == pytest.approx(torch.softmax(logits / 0.5, 0), abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prime": ""}, "at least one character"),
        ({"prime": "the \u2603"}, "the character '\u2603'"),
        ({"length": -1}, "length=-1"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        next(sampling.sample(*sampling.load(folder), **{"prime": "the ", "length": 5, **options}))
    assert "\n" not in str(error.value)


def test_what_is_no_run_on_a_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run folder"):
        sampling.load(tmp_path)
    cfg = compose(["trainer.max_steps=0", f"output_root={tmp_path}"])
    run(cfg)
    with pytest.raises(DataError, match="no run on a text"):
        sampling.load(run_folder(cfg))


def sample(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(CONFIGS.parent / "scripts" / "sample.py"), *arguments]
    return subprocess.run(script, capture_output=True, text=True, check=False)


def test_command_prints_prime_and_text(folder: Path) -> None:
    done = sample(str(folder), "--prime", "the ", "--length", "30", "--temperature", "0.8", "--seed", "4")
    assert done.returncode == 0, done.stderr
    made = "".join(sampling.sample(*sampling.load(folder), "the ", 30, 0.8, 4))
    assert done.stdout == f"the {made}\n"


def test_command_refuses_in_one_line_and_prints_no_text(folder: Path) -> None:
    done = sample(str(folder), "--prime", "\u2603")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
