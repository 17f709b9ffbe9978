"""Texts of the size that they really have, and jobs that want the same one at once; see tests/test_text_data.py."""

from __future__ import annotations

import hashlib
import http.server
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bipolar import build, sweep
from bipolar.data import text
from bipolar.data.streams import TextBatches

CPU = torch.device("cpu")


def test_samples_of_a_long_text_lie_within_it():
    """As text8's 90 million characters: places are counted exactly, where float32 no longer does."""
    size = 2**25 + 6 + 50 + 1  # the last place, 2**25 + 6, is none of float32's, which has 2**25 + 8 next
    zeros, short = np.zeros(size, dtype=np.uint8), np.zeros(100, dtype=np.uint8)
    zeros[-50:] = 1
    batches = TextBatches(text.Text(zeros, short, short, "ab"), CPU, 4, 50)
    sample = batches.sample(2)
    assert sample.shape == (2, 50)
    assert sample.sum() == 49  # to the last character that has one behind it


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("b", "ac", "c"), ("ba", "c", "c")),  # the same characters, cut elsewhere
        (("b", "c", "dae"), ("bac", "d", "e")),  # other characters
    ],
)
def test_digests_of_two_texts_differ(one, other):
    digests = [text.encode(*parts).digest for parts in (one, other)]
    assert digests[0] != digests[1]


@pytest.fixture
def slow_server(monkeypatch):
    """Serves one file in two halves; between them it waits for `go`."""
    content = b"ten green bottles \n" * 8000
    half = len(content) // 2
    go = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(content[:half])
            self.wfile.flush()
            go.wait(20)
            self.wfile.write(content[half:])

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        monkeypatch.setattr(text, "PTB_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setattr(text, "PTB_FILES", dict.fromkeys(text.PTB_FILES, md5))
        yield go
        go.set()
        server.shutdown()


def test_a_job_waits_for_the_download_of_another(slow_server, tmp_path):
    """The jobs of a sweep on two workers: what is half there is not damaged."""
    ended = []

    def job():
        try:
            ended.append(len(text.ptb(str(tmp_path)).train))
        except Exception as error:
            ended.append(error)

    first, second = threading.Thread(target=job), threading.Thread(target=job)
    first.start()
    deadline = time.monotonic() + 20
    while not any(path.stat().st_size for path in tmp_path.rglob("*.txt*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second.start()
    time.sleep(0.3)
    slow_server.set()
    for thread in (first, second):
        thread.join(20)
    assert ended == [152_000, 152_000]


@pytest.fixture
def text8_archive(tmp_path, monkeypatch):
    """An archive as text8's, of 270 characters, in its place; returns them."""
    characters = b" abcdefghijklmnopqrstuvwxyz" * 10
    for name, value in (("SIZE", 270), ("TRAIN", 200), ("VALID", 30)):
        monkeypatch.setattr(text, f"TEXT8_{name}", value)
    (tmp_path / "text8").mkdir()
    with zipfile.ZipFile(tmp_path / "text8" / "text8.zip", "w") as archive:
        archive.writestr("text8", characters)
    return characters


@pytest.mark.parametrize("download", [True, False])
def test_an_archive_that_is_there_is_not_downloaded(text8_archive, tmp_path, download):
    assert [len(part) for part in text.text8(str(tmp_path), download)[:3]] == [200, 30, 40]


def test_what_an_interrupted_extraction_left_is_not_taken_for_the_text(text8_archive, tmp_path, monkeypatch):
    """Of a job that is killed, or that another looks on: text8 is there when all of it is."""

    write_bytes = Path.write_bytes

    def half(self, content):
        write_bytes(self, content[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(KeyboardInterrupt):
            text.text8(str(tmp_path))
    assert [len(part) for part in text.text8(str(tmp_path))[:3]] == [200, 30, 40]


def test_from_the_configuration(tmp_path):
    """Options reach the text and its batches; a batch is what the configuration says."""
    path = tmp_path / "story.txt"
    path.write_text("abcdefghij" * 100, encoding="utf-8")
    options = ["network=rnn", "dataset=text", f"dataset.path={path}", "dataset.valid_fraction=0.2",
               "dataset.test_fraction=0.1", "dataset.sequence_length=7", "trainer.batch_size=5"]  # fmt: skip
    cfg = sweep.compose([*options, "dataset.evaluation_size=61"])
    batches = build.batches(cfg, build.arrays(cfg), CPU)
    assert {name: len(part) for name, part in batches.splits.items()} == {"train": 700, "valid": 61, "test": 61}
    assert (batches.classes, batches.input_shape, batches.steps_per_epoch) == (10, (7,), 699 // 35)
    inputs, targets = next(batches.train(0))
    assert inputs.shape == targets.shape == (5, 7)
    assert torch.equal((inputs + 1) % 10, targets)
