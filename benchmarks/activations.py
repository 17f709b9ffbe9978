"""Forward and backward pass of the bipolar activations against their bases, and against what people write instead.

Limit: forward reads x and writes y, backward reads the incoming gradient and y and writes a gradient: 5 tensors moved.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Case
from bipolar.activations import bipolar

SHAPES = ((128, 64, 32, 32), (128, 256, 8, 8), (512, 1024), (128, 256))
MEGABYTE = 2**20


def clone_and_index(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What people copy from one another (here with the features where they belong)."""
    y = x.clone()
    y[:, ::2] = f(x[:, ::2])
    y[:, 1::2] = -f(-x[:, 1::2])
    return y


def stack_halves(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.stack([f(x[:, ::2]), -f(-x[:, 1::2])], dim=2).flatten(1, 2)


def multiply_signs(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    signs = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
    signs[1::2] = -1
    signs = signs.view(1, -1, *[1] * (x.ndim - 2))
    return f(x * signs) * signs


def forward_and_backward(function: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Callable[[], None]:
    def action() -> None:
        x.grad = None
        function(x).backward(gradient)

    return action


def compiled(device: str) -> Iterator[Case]:
    """Where inductor can compile: for a CPU it needs a C++ compiler."""
    if device == "cpu" and shutil.which("g++") is None:
        return
    for shape in SHAPES[1:3]:
        x = torch.randn(shape, device=device).requires_grad_()
        gradient = torch.randn_like(x).detach()
        for name, base in (("BReLU", F.relu), ("BELU", F.elu)):
            ours, theirs = (torch.compile(f, dynamic=False) for f in (lambda v, base=base: bipolar(base, v), base))
            actions = forward_and_backward(ours, x, gradient), forward_and_backward(theirs, x, gradient)
            what = f"{name} compiled, {tuple(shape)}, float32"
            yield Case(what, f"{base.__name__} compiled", *actions, 1.05, moved=5 * x.numel() * x.element_size())


def cases(quick: bool) -> Iterator[Case]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bases = {"BReLU": F.relu, "BELU": F.elu}
    shapes = SHAPES[-1:] if quick else SHAPES
    for shape in shapes:
        # bfloat16 once each of maps and matrices: where it is emulated, it takes very long
        for dtype in (torch.float32, torch.bfloat16) if shape in SHAPES[1:3] else (torch.float32,):
            for layout in ("contiguous", "channels_last") if len(shape) == 4 else ("matrix",):
                memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
                x = torch.randn(shape, dtype=dtype, device=device).to(memory_format=memory).requires_grad_()
                gradient = torch.randn_like(x).detach()
                size = x.numel() * x.element_size()
                where = f"{tuple(shape)}, {str(dtype).removeprefix('torch.')}, {layout}"
                for name, base in bases.items():
                    against = forward_and_backward(base, x, gradient)
                    easy = layout == "channels_last" or (layout == "matrix" and size >= MEGABYTE)
                    target = 1.15 if easy or name == "BELU" else 1.4
                    for pattern in ("interleaved",) if quick else ("interleaved", "halves"):
                        function = lambda x, base=base, pattern=pattern: bipolar(base, x, pattern=pattern)
                        ours = forward_and_backward(function, x, gradient)
                        yield Case(f"{name} {pattern}, {where}", base.__name__, ours, against, target, moved=5 * size)
                    others = {"clone and index": (clone_and_index, 3.0), "stack": (stack_halves, 1.0),
                              "multiply by signs": (multiply_signs, 1.0)}  # fmt: skip
                    ours = forward_and_backward(lambda x, base=base: bipolar(base, x), x, gradient)
                    for other, (function, least) in others.items():
                        theirs = forward_and_backward(lambda x, f=function, base=base: f(base, x), x, gradient)
                        yield Case(f"{name}, {where}", other, ours, theirs, least, speedup=True, moved=5 * size)
    if not quick:
        yield from compiled(device)
