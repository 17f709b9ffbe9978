"""Texts: where their characters come from, and how they become batches."""

from __future__ import annotations

import hashlib
import http.server
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bipolar.data import text
from bipolar.data.streams import TextBatches
from bipolar.errors import ConfigError, DataError

some_examples = settings(deadline=None, max_examples=60)
DATA = Path(__file__).resolve().parents[1] / "data"
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def decode(part: np.ndarray, vocabulary: str) -> str:
    return "".join(vocabulary[index] for index in part)


# --- characters -------------------------------------------------------------------------------------------------------


@some_examples
@given(words, words, words)
def test_encoding_loses_nothing(train: str, valid: str, test: str) -> None:
    made = text.encode(train, valid, test)
    assert tuple(decode(part, made.vocabulary) for part in made[:3]) == (train, valid, test)
    assert made.vocabulary == "".join(sorted(set(train + valid + test)))
    assert made.train.dtype == np.uint8


def test_many_symbols_need_wider_integers() -> None:
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    made = text.encode(many, "", "")
    assert made.train.dtype == np.int32
    assert decode(made.train, made.vocabulary) == many


def test_digest_tells_texts_and_their_parts_apart() -> None:
    digests = [text.encode(*parts).digest for parts in (("ab", "c", "d"), ("ab", "c", "c"), ("a", "bc", "d"))]
    assert len(set(digests)) == 3
    assert digests[0] == text.encode("ab", "c", "d").digest


def test_entropy_is_that_of_single_characters_of_the_training_part() -> None:
    assert text.encode("aabb", "c", "d").entropy == pytest.approx(1.0)
    assert text.encode("aaab", "", "").entropy == pytest.approx(2 - 0.75 * np.log2(3))
    assert text.encode("aaaa", "bbb", "").entropy == 0


# --- batches ----------------------------------------------------------------------------------------------------------


def batches(characters: int = 101, batch_size: int = 4, sequence_length: int = 5, **options) -> TextBatches:
    part = "".join(chr(97 + index % 26) for index in range(characters))
    return TextBatches(text.encode(part, part, part), torch.device("cpu"), batch_size, sequence_length, **options)


@some_examples
@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 200))
def test_batches_are_streams_that_go_on_where_they_stopped(batch_size: int, sequence_length: int, more: int) -> None:
    size = batch_size * sequence_length + 1 + more
    arrays = text.Text(*[np.arange(size, dtype=np.int32)] * 3, vocabulary="".join(map(chr, range(97, 97 + size))))
    made = TextBatches(arrays, torch.device("cpu"), batch_size, sequence_length)
    steps = list(made.train(0))
    assert len(steps) == made.steps_per_epoch == (size - 1) // (batch_size * sequence_length)
    for inputs, targets in steps:
        assert inputs.shape == targets.shape == (batch_size, sequence_length)
        assert inputs.dtype == targets.dtype == torch.int64
    inputs, targets = (torch.cat(parts, dim=1) for parts in zip(*steps, strict=True))
    assert torch.equal(targets, inputs + 1)  # a character's number is its place: the next one is predicted
    assert torch.equal(inputs[:, 1:], inputs[:, :-1] + 1)  # within a stream nothing is left out
    assert targets.unique().numel() == targets.numel()  # nothing is predicted twice
    assert all(torch.equal(a, b) for a, b in zip(next(made.train(3)), steps[0], strict=True))  # the same in every epoch
    if len(steps) > 1:
        assert torch.equal(next(made.train(0, first_step=1))[0], steps[1][0])
    evaluated = [torch.cat(parts, dim=1) for parts in zip(*made.evaluation("valid"), strict=True)]
    assert torch.equal(evaluated[1], evaluated[0] + 1)
    left_out = size - 1 - evaluated[1].unique().numel()
    assert 0 <= left_out < batch_size
    assert evaluated[1].unique().numel() == evaluated[1].numel()


def test_evaluation_may_use_a_part() -> None:
    assert sum(targets.numel() for _, targets in batches(evaluation_size=21).evaluation("test")) == 20
    assert sum(targets.numel() for _, targets in batches(evaluation_size=1000).evaluation("test")) == 100
    with pytest.raises(ConfigError, match="evaluation_size=0"):
        batches(evaluation_size=0)


def test_sample_takes_places_all_over_the_text() -> None:
    numbered = text.Text(*[np.arange(1006, dtype=np.int32)] * 3, vocabulary="".join(map(chr, range(97, 97 + 1006))))
    sample = TextBatches(numbered, torch.device("cpu"), 4, 5).sample(11)
    assert torch.equal(sample, 100 * torch.arange(11)[:, None] + torch.arange(5))


@pytest.mark.parametrize(
    ("characters", "message"),
    [(20, r"^the train part of the text has 20 characters; .*batch_size=4.*sequence_length=5 need at least 21$"),
     (4, "^the train part")],
)  # fmt: skip
def test_a_text_that_is_too_short_is_refused_in_one_line(characters: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        batches(characters)
    assert batches(21).steps_per_epoch == 1


def test_a_part_for_evaluation_that_is_too_short_is_named() -> None:
    with pytest.raises(DataError, match=r"the valid part of the text has 3 characters; .*at least 5"):
        TextBatches(text.encode("a" * 99, "bbb", "c" * 9), torch.device("cpu"), 4, 5)


# --- sources ----------------------------------------------------------------------------------------------------------


def test_a_file_is_cut_in_three(tmp_path: Path) -> None:
    file = tmp_path / "story.txt"
    file.write_bytes("\u00e4bcd\r\nefghijklmn".encode())
    made = text.text_file(str(file), 0.25, 0.125)
    whole = "".join(decode(part, made.vocabulary) for part in made[:3])
    assert whole == "\u00e4bcd\r\nefghijklmn"
    assert [len(part) for part in made[:3]] == [10, 4, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no such file"), (b"\xff\xfe\x00", "cannot be read as UTF-8")],
)
def test_a_file_that_is_no_text_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "story.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        text.text_file(str(file))
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"dataset\.path=FILE"):
        text.text_file(None)


@pytest.mark.parametrize("fractions", [(0.0, 0.1), (0.1, 1.0), (0.5, 0.5), (-0.1, 0.1)])
def test_fractions_must_leave_something(fractions: tuple[float, float], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("abcdef" * 10)
    with pytest.raises(ConfigError, match="_fraction="):
        text.text_file(str(tmp_path / "a"), *fractions)


def test_pythons_documentation_is_there() -> None:
    made = text.python_docs()
    assert len(made.train) > 100_000
    assert made.digest == text.python_docs().digest
    assert "statement" in decode(made.train, made.vocabulary)


PTB = {"ptb.train.txt": b" a b \n c <unk> \n" * 50, "ptb.valid.txt": b" a \n" * 9, "ptb.test.txt": b" N b \n" * 9}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The official files' places, on this machine."""
    folder = tmp_path / "served"
    folder.mkdir()
    for name, content in PTB.items():
        (folder / name).write_bytes(content)
    characters = b" abcdefghijklmnopqrstuvwxyz" * 10
    with zipfile.ZipFile(folder / "text8.zip", "w") as archive:
        archive.writestr("text8", characters)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, directory=str(folder), **options)

        def log_message(self, *arguments) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        md5s = {name: hashlib.md5(content, usedforsecurity=False).hexdigest() for name, content in PTB.items()}
        monkeypatch.setattr(text, "PTB_URL", url)
        monkeypatch.setattr(text, "PTB_FILES", md5s)
        monkeypatch.setattr(text, "TEXT8_URL", url + "text8.zip")
        monkeypatch.setattr(text, "TEXT8_SIZE", len(characters))
        monkeypatch.setattr(text, "TEXT8_TRAIN", 200)
        monkeypatch.setattr(text, "TEXT8_VALID", 30)
        yield folder
        server.shutdown()


def test_ptb_is_downloaded_once_and_read_in_both_ways(served: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    made = text.ptb(str(root))
    assert decode(made.train, made.vocabulary) == PTB["ptb.train.txt"].decode()
    for name in PTB:
        (served / name).unlink()  # from now on the files that are there have to do
    stripped = text.ptb(str(root), "mikolov", download=False)
    assert decode(stripped.train, stripped.vocabulary) == "a b\nc <unk>\n" * 50
    assert decode(stripped.test, stripped.vocabulary) == "N b\n" * 9


def test_a_damaged_file_of_ptb_is_named(served: Path, tmp_path: Path) -> None:
    text.ptb(str(tmp_path))
    (tmp_path / "ptb" / "ptb.valid.txt").write_text("something else")
    with pytest.raises(DataError, match=r"ptb\.valid\.txt is damaged .*download it again"):
        text.ptb(str(tmp_path))


def test_text8_is_downloaded_and_cut(served: Path, tmp_path: Path) -> None:
    made = text.text8(str(tmp_path))
    assert [len(part) for part in made[:3]] == [200, 30, 40]
    assert made.vocabulary == " abcdefghijklmnopqrstuvwxyz"
    assert decode(np.concatenate(made[:3]), made.vocabulary) == " abcdefghijklmnopqrstuvwxyz" * 10
    (tmp_path / "text8" / "text8").write_bytes(b"too short")
    with pytest.raises(DataError, match=r"is not text8 \(9 characters, 6 different ones\)"):
        text.text8(str(tmp_path))
    (tmp_path / "text8" / "text8").unlink()
    (tmp_path / "text8" / "text8.zip").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"text8\.zip is damaged"):
        text.text8(str(tmp_path))


@pytest.mark.parametrize("name", ["ptb", "text8"])
def test_what_cannot_be_downloaded_is_named_with_the_command_that_gets_it(
    name: str, served: Path, tmp_path: Path
) -> None:
    for file in served.iterdir():
        file.unlink()
    source = getattr(text, name)
    with pytest.raises(DataError, match=rf"cannot be downloaded .*scripts/download\.py {name} --root") as error:
        source(str(tmp_path / "data"))
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=rf"is missing; get it with: python scripts/download\.py {name}"):
        source(str(tmp_path / "data"), download=False)


@pytest.mark.skipif(not (DATA / "ptb").is_dir(), reason="Penn Treebank is not in data/")
@pytest.mark.parametrize(
    ("variant", "sizes"),
    [("authors", [5_101_618, 399_782, 449_945]), ("mikolov", [5_017_482, 393_042, 442_423])],
)
def test_penn_treebank_has_its_known_sizes(variant: str, sizes: list[int]) -> None:
    made = text.ptb(str(DATA), variant, download=False)
    assert [len(part) for part in made[:3]] == sizes
    assert len(made.vocabulary) == 50
    if variant == "authors":
        shares = [round(100 * size / sum(sizes), 3) for size in sizes]
        assert shares == [85.722, 6.718, 7.560]  # the split of the authors' code
