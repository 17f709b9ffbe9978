"""Networks. Each is built from the shape of its input, the number of classes and a maker of activation modules.

What the rest of the library asks of a network (`Network`) is one method: `layers()`, the layers in the order in which
they run. Initialization and the statistics work from it. `tests/test_networks.py` checks every network in `configs/`.

A recurrent network is called with characters and a state and returns logits and the next state; what it has besides is
said in `Recurrent`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

MakeActivation = Callable[[], nn.Module]
"""Makes a new activation module for each layer."""


class Layer(NamedTuple):
    """One layer: the linear map that holds its weights, and the activation behind it (None for the output layer)."""

    name: str
    linear: nn.Module
    activation: nn.Module | None


def layer_of_block(name: str, block: nn.Module, linear: str) -> Layer:
    """The layer that a block of named modules is: its linear map under the name `linear`, and its `activation`."""
    return Layer(name, block.get_submodule(linear), block.get_submodule("activation"))


@runtime_checkable
class Network(Protocol):
    def layers(self) -> list[Layer]:
        """The layers in the order in which they run, the output layer last; names are unique and readable."""
        ...


@runtime_checkable
class Recurrent(Network, Protocol):
    """A network that reads text: model(characters [B, T], state or None) -> (logits [B, T, classes], next state)."""

    observers: list[Callable[[int, Tensor, Tensor], None]]
    """Called in every forward pass with a layer's number (from 0), its pre-activations and its activations [..., H]."""

    def probe(self, tokens: Tensor) -> Tensor:
        """One time step in which forward hooks fire, for initializations that look at data."""
        ...


def layers_of(model: nn.Module) -> list[Layer]:
    """`model.layers()`, for code that holds the model as an nn.Module."""
    if not isinstance(model, Network):
        raise TypeError(f"{type(model).__name__} has no layers() method: see bipolar/networks/__init__.py")
    return model.layers()
