"""A training step of the deep RNN: a diagonal of cells at a time, against cell by cell and torch's own RNN.

Limit: the products with W and U, forward, and backward to inputs and to weights: 3 x 2 x 2 H^2 operations per cell.
torch's RNN (tanh, no streams) is what a library's kernel does layer by layer at the same shape; it is no target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.timing import Case
from bipolar import BELU, BReLU
from bipolar.networks.rnn import RNN

SHAPES = ((36, 50, 128, 256), (12, 50, 32, 64))
"""Layers, times, batch, width."""
QUICK = ((4, 6, 4, 8),)
"""The same of a smoke test."""


def step(model: nn.Module, *inputs: Tensor) -> Callable[[], None]:
    def action() -> None:
        model.zero_grad()
        model(*inputs)[0].square().mean().backward()

    return action


def cases(quick: bool) -> Iterator[Case]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for layers, times, batch, width in QUICK if quick else SHAPES:
        tokens = torch.randint(50, (batch, times), device=device)
        operations = 12.0 * width**2 * layers * times * batch
        shape = f"{layers} layers, {times} times, batch {batch}, width {width}"
        library = nn.RNN(width, width, layers, batch_first=True).to(device)
        theirs = step(library, torch.randn(batch, times, width, device=device))
        for name, activation in {"BELU": BELU, "BReLU": BReLU, "tanh": nn.Tanh}.items():
            plain = {"dropout": 0.0, "recurrent_dropout": 0.0, "skip": 0.0}
            for options in ({}, plain) if name == "BELU" else (plain,):
                torch.manual_seed(0)
                wave, loop = (
                    RNN((times,), 50, activation, layers, width, engine=engine, **options).to(device)
                    for engine in ("wavefront", "loop")
                )
                ours, what = step(wave, tokens), f"{name}, {shape}" + ("" if options else ", with its masks")
                yield Case(what, "cell by cell", ours, step(loop, tokens), 4.0, speedup=True, operations=operations)
                if name == "tanh":
                    yield Case(what, "torch.nn.RNN", ours, theirs, None, operations=operations)
