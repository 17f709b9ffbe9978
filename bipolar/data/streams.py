"""From a text to batches: `batch_size` streams that are read in parallel, `sequence_length` characters at a time.

The text is cut into as many equal pieces as a batch has samples, and each step reads on where the one before it
stopped, so that a recurrent network can carry its state over. The text lies on the training device as it is stored
(a byte a character). Nothing about the order is random: truncated back-propagation reads a text from front to back.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bipolar.data.batches import Batch
from bipolar.data.text import Text
from bipolar.errors import DataError, check_int


class TextBatches:
    """Batches of (inputs, targets) on `device`, both int64 [B, T]: the targets are the inputs one character later.

    Every part of the text is read in `batch_size` streams. The characters that are left over at the end of a part, less
    than a sequence per stream in training and less than one per stream in evaluation, are not read.

    Args:
        text: the text.
        device: where it lies and batches are made.
        batch_size: streams (B).
        sequence_length: characters of each that a step reads (T).
        evaluation_size: use only so many characters of the validation and the test part; None for all.

    Raises:
        DataError: a part of the text is too short.
    """

    unit = "characters"
    is_text = True

    def __init__(
        self,
        text: Text,
        device: torch.device,
        batch_size: int,
        sequence_length: int,
        evaluation_size: int | None = None,
    ) -> None:
        self.text = {"digest": text.digest, "vocabulary": text.vocabulary, "entropy": text.entropy}
        """What a run keeps of its text."""
        self.classes = len(text.vocabulary)
        self.device = device
        self.batch_size = batch_size
        self.sequence_length = check_int("sequence_length", sequence_length)
        self.input_shape = (sequence_length,)
        needed = {"train": batch_size * sequence_length + 1, "valid": batch_size + 1, "test": batch_size + 1}
        self.splits: dict[str, Tensor] = {}
        for name, least in needed.items():
            part = getattr(text, name)
            if name != "train" and evaluation_size is not None:
                part = part[: check_int("evaluation_size", evaluation_size)]
            if len(part) < least:
                of = f"trainer.batch_size={batch_size}"
                if name == "train":
                    of += f" streams of dataset.sequence_length={sequence_length}"
                raise DataError(
                    f"the {name} part of the text has {len(part):,} characters; {of} need at least {least:,}"
                )
            self.splits[name] = torch.from_numpy(part).to(device)

    @property
    def steps_per_epoch(self) -> int:
        return (len(self.splits["train"]) - 1) // (self.batch_size * self.sequence_length)

    def train(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The training batches of an epoch from `first_step` on: the same in every epoch."""
        inputs, targets = self._streams("train")
        for step in range(first_step, self.steps_per_epoch):
            yield self._part(inputs, targets, step)

    def evaluation(self, name: str) -> Iterator[Batch]:
        """All of a part; the last batch may be shorter."""
        inputs, targets = self._streams(name)
        for step in range(-(-inputs.shape[1] // self.sequence_length)):
            yield self._part(inputs, targets, step)

    def sample(self, size: int) -> Tensor:
        """The inputs of `size` places of the training part [size, T], for initializations that look at data."""
        text = self.splits["train"]
        last = len(text) - self.sequence_length - 1
        starts = torch.arange(size, device=self.device) * last // max(1, size - 1)  # exact, however long the text
        return text[starts[:, None] + torch.arange(self.sequence_length, device=self.device)].long()

    def _streams(self, name: str) -> tuple[Tensor, Tensor]:
        text = self.splits[name]
        length = (len(text) - 1) // self.batch_size
        end = self.batch_size * length
        return text[:end].view(self.batch_size, length), text[1 : end + 1].view(self.batch_size, length)

    def _part(self, inputs: Tensor, targets: Tensor, step: int) -> Batch:
        columns = slice(step * self.sequence_length, (step + 1) * self.sequence_length)
        return inputs[:, columns].long(), targets[:, columns].long()
