"""What measuring every layer costs: a training step with statistics against one without, and against usual hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.timing import Case
from benchmarks.training import BATCH, step
from bipolar import BReLU
from bipolar.networks import layers_of
from bipolar.networks.cnn import CNN
from bipolar.networks.mlp import MLP
from bipolar.statistics import ActivationStatistics

DEFAULT_INTERVAL = 50


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
    statistics = ActivationStatistics(model, inputs[:2])
    one = step(model, inputs, targets)

    def action() -> None:
        with statistics.measuring():
            one()
        statistics.take()
        for _ in range(every - 1):
            one()

    return action


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
        measured, plain, hooked = (network(shape, 10, BReLU).to(device) for _ in range(3))
        without = step(plain, inputs, targets)
        usual_hooks(hooked)
        usual = step(hooked, inputs, targets)
        often = with_statistics(measured, inputs, targets, 1)
        yield Case(f"{title}, measured at every step", "without statistics", often, without, 1.10)
        yield Case(f"{title}, measured at every step", "hooks with .item()", often, usual, None, speedup=True)
        if not quick:
            seldom = with_statistics(measured, inputs, targets, DEFAULT_INTERVAL)
            peers = steps(without, DEFAULT_INTERVAL)
            yield Case(f"{title}, measured every {DEFAULT_INTERVAL} steps", "without statistics", seldom, peers, 1.02)
