"""One thread per test process: the tests run several processes at once, and none is about speed."""

from __future__ import annotations

import copy
import functools
import logging
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from omegaconf import DictConfig

os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = [
    "network.depth=2",
    "network.width=16",
    "dataset=gaussian",
    "dataset.train_size=256",
    "dataset.test_samples=64",
    "dataset.shape=[8]",
    "trainer.batch_size=32",
    "trainer.epochs=2",
    "trainer.precision=float32",
    "trainer.device=cpu",
    "trainer.log_every=2",
    "trainer.statistics_every=3",
]
"""Overrides of a run that takes a fraction of a second."""


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """A run sets torch's flags and threads for itself; the other tests shall not notice."""
    import torch

    settings = [
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    ]
    before = [get() for get, _ in settings]
    yield
    for (get, put), value in zip(settings, before, strict=True):
        if get() != value:  # the last of them imports torch's compiler, which takes seconds
            put(value)


SHARED = {"alone", "archived", "finished", "folders", "one_fails", "wandb_sweep"}
"""Fixtures of a module that take long."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of such a fixture go to one process and come first (`--dist loadgroup`): it is then made once."""
    for item in items:
        for name in SHARED.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{name}"))


@functools.cache
def _composed(*choices: str) -> DictConfig:
    from bipolar import sweep

    return sweep.compose(choices)


def compose(*overrides: str) -> DictConfig:
    """As `sweep.compose`, but it composes once for all that differ in plain values: that takes longer than a tiny run.

    `sweep.expand` does the same, and the tests of it hold it against Hydra.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from bipolar import sweep

    choices, values = sweep._choices_and_values(overrides, OverridesParser.create())
    config = copy.deepcopy(_composed(*choices))
    ConfigLoaderImpl._apply_overrides_to_config(values, config)
    return config


@pytest.fixture
def tiny_config(tmp_path: Path) -> Callable[..., DictConfig]:
    """Composes the configuration of a tiny run whose folder is below tmp_path; overrides go last."""
    return lambda *overrides: compose(*TINY, f"output_root={tmp_path}/outputs", *overrides)


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def train(capsys, monkeypatch):
    """`python scripts/train.py <arguments>` in this process, which has torch already."""
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    level, handlers = logging.root.level, logging.root.handlers[:]

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["scripts/train.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path("scripts/train.py", run_name="__main__")
        return Ended(ended.value.code, *capsys.readouterr())

    yield call
    logging.root.setLevel(level)
    logging.root.handlers[:] = handlers
