"""What measuring every layer costs: a training step with statistics against one without, and against usual hooks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.timing import Case, synchronize
from benchmarks.training import BATCH, step
from bipolar import BReLU
from bipolar.networks import layers_of
from bipolar.networks.cnn import CNN
from bipolar.networks.mlp import MLP
from bipolar.statistics import ActivationStatistics

DEFAULT_INTERVAL = 50
PAIRS = 9


def usual_hooks(model: nn.Module) -> list[dict[str, float]]:
    """As in many a tutorial: each layer's activations are copied to the host, and figures fetched one by one."""
    records: list[dict[str, float]] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        for tensor in (output, args[0]):
            values = tensor.detach().cpu()
            channel_means = values.transpose(0, 1).flatten(1).mean(1)
            figures = {"mean": values.mean(), "variance": values.var(), "zeros": (values == 0).float().mean(),
                       "channels": channel_means.square().mean().sqrt(), "largest": values.abs().max()}  # fmt: skip
            records.append({name: figure.item() for name, figure in figures.items()})

    for layer in layers_of(model):
        if layer.activation is not None:
            layer.activation.register_forward_hook(hook)
    return records


def with_statistics(model: nn.Module, inputs: Tensor, targets: Tensor, every: int) -> Callable[[], None]:
    """`every` steps, of which one is measured."""
    measured = ActivationStatistics(model, inputs[:2], always_hooked=False)
    one = step(model, inputs, targets)

    def action() -> None:
        with measured.measuring():
            one()
        measured.snapshot()
        for _ in range(every - 1):
            with measured.measuring(False):
                one()

    return action


def extra(action: Callable[[], None], without: Callable[[], None]) -> Callable[[], float]:
    """Seconds that `action` takes longer than `without`: the median of many pairs."""

    def seconds() -> float:
        differences = []
        for _ in range(PAIRS):
            started = time.perf_counter()
            without()
            synchronize()
            between = time.perf_counter()
            action()
            synchronize()
            differences.append(time.perf_counter() - between - (between - started))
        return max(statistics.median(differences), 1e-9)

    return seconds


def steps(action: Callable[[], None], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            action()

    return run


def cases(quick: bool) -> Iterator[Case]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    networks = {"MLP of 8 x 128": (MLP, (64,)), "CNN 32 32 64 64 128 128": (CNN, (3, 32, 32))}
    for title, (network, shape) in list(networks.items())[: 1 if quick else None]:
        inputs, targets = torch.randn(BATCH, *shape, device=device), torch.randint(10, (BATCH,), device=device)
        often_measured, seldom_measured, plain, hooked = (network(shape, 10, BReLU).to(device) for _ in range(4))
        if len(shape) == 3:  # as the trainer has it
            inputs = inputs.to(memory_format=torch.channels_last)
            for model in (often_measured, seldom_measured, plain, hooked):
                model.to(memory_format=torch.channels_last)
        without = step(plain, inputs, targets)
        usual_hooks(hooked)
        usual = step(hooked, inputs, targets)
        often = with_statistics(often_measured, inputs, targets, 1)
        yield Case(f"{title}, measured at every step", "without statistics", often, without, 1.10)
        yield Case(f"{title}, what a recorded step costs more", "usual hooks with .item()", extra(often, without),
                   extra(usual, without), 5.0, speedup=True, times_itself=True)  # fmt: skip
        if not quick:
            seldom = with_statistics(seldom_measured, inputs, targets, DEFAULT_INTERVAL)
            peers = steps(without, DEFAULT_INTERVAL)
            yield Case(f"{title}, measured every {DEFAULT_INTERVAL} steps", "without statistics", seldom, peers, 1.02)
