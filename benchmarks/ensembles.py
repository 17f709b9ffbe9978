"""Seeds of the small MLP trained as one (`trainer.ensemble`) against one run after another; and why not CNNs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.timing import Case, scratch
from benchmarks.training import step
from bipolar import BReLU
from bipolar.networks.cnn import CNN
from bipolar.run import run, run_together
from bipolar.sweep import compose

SEEDS = 8


def runs(activation: str, steps: int, together: bool) -> Callable[[], float]:
    """Seconds of whole runs, records and evaluations included."""
    options = [f"activation={activation}", "trainer.precision=float32", "trainer.progress=false",
               f"trainer.max_steps={steps}", f"trainer.ensemble={SEEDS if together else 1}"]  # fmt: skip

    def action() -> float:
        root = scratch()
        configs = [compose([*options, f"output_root={root}", f"seed={seed}"]) for seed in range(SEEDS)]
        started = time.perf_counter()
        if together:
            for _, ending in run_together(configs):
                ending()
        else:
            for cfg in configs:
                run(cfg)
        return time.perf_counter() - started

    return action


def batched_step(models: list[nn.Module], inputs: torch.Tensor, targets: torch.Tensor) -> Callable[[], None]:
    """By torch.func: stacked parameters, and the network mapped over them."""
    parameters, _ = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(parameters.values(), lr=0.0, momentum=0.9)
    mapped = torch.func.vmap(lambda values, x: torch.func.functional_call(models[0], values, (x,)))

    def action() -> None:
        optimizer.zero_grad()
        logits = mapped(parameters, inputs)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()

    return action


def cases(quick: bool) -> Iterator[Case]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = 4.0 if device == "cuda" else 1.5
    steps = 10 if quick else 200
    for activation in ("belu",) if quick else ("brelu", "belu"):
        name = f"{SEEDS} seeds of MLP 8 x 128, {activation}, {steps} updates each, trainer.ensemble={SEEDS}"
        ours, theirs = runs(activation, steps, together=True), runs(activation, steps, together=False)
        yield Case(name, "one run after another", ours, theirs, target, speedup=True, times_itself=True)
    count, size, widths = (2, 8, (4, 4)) if quick else (4, 128, (32, 32, 64, 64))
    models: list[nn.Module] = [CNN((3, 16, 16), 10, BReLU, widths).to(device) for _ in range(count)]
    inputs = torch.randn(count, size, 3, 16, 16, device=device)
    targets = torch.randint(10, (count, size), device=device)
    single = [step(model, x, y) for model, x, y in zip(models, inputs, targets, strict=True)]

    def one_after_another() -> None:
        for each in single:
            each()

    together = batched_step(models, inputs, targets)
    name = f"{count} CNNs {' '.join(map(str, widths))} by torch.func.vmap"
    yield Case(name, "one after another", together, one_after_another, None, speedup=True)
