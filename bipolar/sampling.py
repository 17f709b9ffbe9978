"""Text from a trained recurrent network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from bipolar import build, checkpoint
from bipolar.errors import ConfigError, DataError, check_float, check_int
from bipolar.networks import Recurrent
from bipolar.recording.folder import read_json
from bipolar.seeding import derive_seed


def load(folder: Path) -> tuple[nn.Module, str]:
    """The network of a run folder as its last checkpoint has it, in evaluation mode, and its vocabulary.

    Raises:
        DataError: this is no run folder, it has no checkpoint, or its network reads no text.
    """
    from omegaconf import DictConfig, OmegaConf

    if not (folder / "config.yaml").is_file():
        raise DataError(f"{folder} is no run folder (it has no config.yaml)")
    text = read_json(folder / "environment.json").get("text") if (folder / "environment.json").is_file() else None
    if text is None:
        raise DataError(
            f"{folder} is no run on a text; one is made by: python scripts/train.py network=rnn dataset=ptb"
        )
    if not (folder / "checkpoint.pt").is_file():
        raise DataError(f"{folder} has no checkpoint.pt to take the weights from")
    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig)
    vocabulary = str(text["vocabulary"])
    model = build.twin(cfg, build.network(cfg, (cfg.dataset.sequence_length,), len(vocabulary)))
    assert isinstance(model, Recurrent)
    model.load_state_dict(checkpoint.load(folder / "checkpoint.pt")["model"])
    return model.eval(), vocabulary


def encode(prime: str, vocabulary: str) -> list[int]:
    """The characters of `prime` as indices.

    Raises:
        ConfigError: it is empty, or has a character that the network has not seen.
    """
    if not prime:
        raise ConfigError("prime='' is not allowed; give at least one character to begin with")
    unknown = next((character for character in prime if character not in vocabulary), None)
    if unknown is not None:
        known = "".join(character for character in vocabulary if character.isprintable())
        raise ConfigError(f"prime has the character {unknown!r}, which this run's text has not; it has {known}")
    return [vocabulary.index(character) for character in prime]


@torch.no_grad()
def sample(
    model: nn.Module, vocabulary: str, prime: str, length: int, temperature: float = 1.0, seed: int = 0
) -> Iterator[str]:
    """`length` characters that the network continues `prime` with, one at a time.

    Args:
        temperature: of the distribution that a character is drawn from: below 1 likelier ones, 0 always the likeliest.
        seed: of the draws.
    """
    check_int("length", length, 0)
    check_float("temperature", temperature)
    generator = torch.Generator().manual_seed(derive_seed(check_int("seed", seed, 0), "sample"))
    logits, state = model(torch.tensor([encode(prime, vocabulary)]), None)
    for _ in range(length):
        index = _draw(logits[0, -1], temperature, generator)
        yield vocabulary[index]
        logits, state = model(torch.tensor([[index]]), state)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    shares = torch.softmax(logits.double() / temperature, dim=0)
    return int(torch.multinomial(shares, 1, generator=generator))
