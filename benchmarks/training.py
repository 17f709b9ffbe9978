"""A training step of the reference networks: with a bipolar activation against its base.

Limit: the products of convolutions and linear layers, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import Case
from bipolar import BELU, BReLU
from bipolar.networks.cnn import CNN
from bipolar.networks.mlp import MLP

BATCH = 128


def step(model: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)  # a rate of 0: the work stays the same

    def action() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    return action


def operations(model: nn.Module, inputs: Tensor) -> float:
    """Of the products of a training step: forward, and twice as many backward."""
    counted = 0.0

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal counted
        weight = module.weight
        assert isinstance(weight, Tensor)
        counted += 2.0 * output.numel() * weight[0].numel()

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    model(inputs)
    for handle in handles:
        handle.remove()
    return 3 * counted


def cases(quick: bool) -> Iterator[Case]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    targets = torch.randint(10, (BATCH,), device=device)
    networks: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
        "MLP of 8 x 128": (MLP, (64,)),
        "CNN 32 32 64 64 128 128": (CNN, (3, 32, 32)),
    }
    for title, (network, shape) in list(networks.items())[: 1 if quick else None]:
        inputs = torch.randn(BATCH, *shape, device=device)
        if len(shape) == 3:
            inputs = inputs.to(memory_format=torch.channels_last)
        for name, bipolar, base in (("BReLU", BReLU, nn.ReLU), ("BELU", BELU, nn.ELU)):
            models = [network(shape, 10, activation).to(device) for activation in (bipolar, base)]
            if len(shape) == 3:
                models = [model.to(memory_format=torch.channels_last) for model in models]
            ours, theirs = (step(model, inputs, targets) for model in models)
            work = operations(models[0], inputs)
            yield Case(f"{title}, {name}", f"with {base.__name__}", ours, theirs, 1.03, operations=work)
