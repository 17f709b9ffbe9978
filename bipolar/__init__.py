"""bipolar: experiments with bipolar activation functions (Eidnes and Nøkland, arXiv:1709.04054).

`from bipolar import BReLU` imports torch and nothing else; `import bipolar` alone imports not even that, so that the
commands can answer `--help` and skip finished runs at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bipolar.activations import (
        BELU,
        BGELU,
        BSELU,
        BatchAxisReLU,
        Bipolar,
        BLeakyReLU,
        BReLU,
        BSiLU,
        batch_axis_relu,
        bipolar,
    )

__version__ = "0.1.0"

__all__ = [
    "BELU",
    "BGELU",
    "BSELU",
    "BLeakyReLU",
    "BReLU",
    "BSiLU",
    "BatchAxisReLU",
    "Bipolar",
    "batch_axis_relu",
    "bipolar",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from bipolar import activations

        return getattr(activations, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
