"""From arrays to batches: the whole data set lies on the training device, and batches are made there.

Images stay uint8 until they are in a batch; crop and flip are one gather for the whole batch, whose result lies in
memory as channels_last, the layout convolutions want. The order of samples follows from (seed, epoch) and the
augmentation from (seed, epoch, step), so that any step can be made again without storing a generator's state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bipolar.data.sources import Array, Arrays
from bipolar.errors import ConfigError, check_bool, check_choice, check_float, check_int
from bipolar.seeding import derive_seed

PADDING_MODES = ("reflect", "zero")
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Augmentation:
    """Random crop out of an image padded by `crop` pixels on each side, and horizontal flip with probability 1/2."""

    crop: int = 0
    padding_mode: str = "reflect"
    flip: bool = False

    def __post_init__(self) -> None:
        check_int("crop", self.crop, 0)
        check_choice("padding_mode", self.padding_mode, PADDING_MODES)
        check_bool("flip", self.flip)

    @property
    def active(self) -> bool:
        return self.crop > 0 or self.flip


@dataclass(frozen=True)
class Split:
    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)


def carve_validation(
    arrays: Arrays, valid_fraction: float, split_seed: int, train_size: int | None = None
) -> dict[str, tuple[Array, Array]]:
    """Split the training arrays into `train` and `valid` at random; `test` is left as it is.

    The validation split does not depend on the run's seed: all runs choose on the same samples. `train_size` keeps
    only so many of the remaining training samples.
    """
    check_float("valid_fraction", valid_fraction, 0, 1, open_low=True, open_high=True)
    check_int("split_seed", split_seed, 0)
    order = np.random.default_rng([split_seed, 0x5A11]).permutation(len(arrays.y_train))
    valid, train = np.split(order, [max(1, round(valid_fraction * len(order)))])
    if train_size is not None:
        if check_int("train_size", train_size) > len(train):
            raise ConfigError(f"train_size={train_size} is not allowed; there are {len(train)} training samples")
        train = train[:train_size]
    if len(train) == 0:
        raise ConfigError(f"valid_fraction={valid_fraction} leaves no training samples of {len(order)}")
    return {
        "train": (arrays.x_train[train], arrays.y_train[train]),
        "valid": (arrays.x_train[valid], arrays.y_train[valid]),
        "test": (arrays.x_test, arrays.y_test),
    }


class Batches:
    """Batches of (inputs, targets) on `device`: inputs float32 [B, C, H, W] (channels_last) or [B, ...], targets [B].

    Images are normalised per channel with the mean and standard deviation of the training split.

    Args:
        splits: `train`, `valid` and `test` arrays, from `carve_validation`.
        classes: number of classes.
        device: where it lies and batches are made.
        batch_size: samples of a training batch; the incomplete last batch of an epoch is dropped.
        seed: the run's seed, from which order and augmentation are derived.
        augmentation: of training images; None for none.
        channels_last: the memory format of images.
    """

    unit = "images"
    is_text = False

    def __init__(
        self,
        splits: dict[str, tuple[Array, Array]],
        classes: int,
        device: torch.device,
        batch_size: int,
        seed: int,
        augmentation: Augmentation | None = None,
        channels_last: bool = True,
    ) -> None:
        self.classes = classes
        self.device = device
        self.batch_size = batch_size
        self.seed = seed
        self.channels_last = channels_last
        self.augmentation = augmentation or Augmentation()
        x_train = splits["train"][0]
        self.images = x_train.dtype == np.uint8
        if self.augmentation.active and not self.images:
            raise ConfigError("dataset.augment is for images; this data set has none")
        if len(x_train) < batch_size:
            raise ConfigError(
                f"trainer.batch_size={batch_size} is not allowed; there are {len(x_train)} training samples"
            )
        if self.images:
            height, width, channels = x_train.shape[1:]
            self.input_shape: tuple[int, ...] = (channels, height, width)
            smallest = min(height, width)
            if self.augmentation.crop >= smallest:
                raise ConfigError(
                    f"dataset.augment.crop={self.augmentation.crop} is not allowed; images have {smallest} pixels"
                )
            # a constant channel (std 0) is only centred
            mean, std = _channel_moments(x_train)
            self._shift = torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1)
            self._scale = torch.tensor(1 / np.where(std > 0, std, 1), dtype=torch.float32, device=device).view(-1, 1, 1)
        else:
            self.input_shape = x_train.shape[1:]
        self.splits = {
            name: Split(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))
            for name, (x, y) in splits.items()
        }
        self._train_source = _pad(self.splits["train"].inputs, self.augmentation) if self.images else None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.splits["train"]) // self.batch_size

    def train(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The training batches of `epoch` (0, 1, ...) from `first_step` on."""
        split = self.splits["train"]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        order = torch.randperm(len(split), generator=generator).to(self.device)
        for step in range(first_step, self.steps_per_epoch):
            index = order[step * self.batch_size : (step + 1) * self.batch_size]
            if self.augmentation.active:
                inputs = self._augmented(index, derive_seed(self.seed, "augment", epoch, step))
            else:
                inputs = split.inputs[index]
            yield self._prepare(inputs), split.targets[index]

    def evaluation(self, name: str, batch_size: int = 1024) -> Iterator[Batch]:
        """All samples of a split in order, without augmentation; the last batch may be smaller."""
        split = self.splits[name]
        for start in range(0, len(split), batch_size):
            stop = start + batch_size
            yield self._prepare(split.inputs[start:stop]), split.targets[start:stop]

    def sample(self, size: int) -> Tensor:
        """The inputs of the first `size` training samples, prepared: for initializations that look at data."""
        return self._prepare(self.splits["train"].inputs[:size])

    def _prepare(self, inputs: Tensor) -> Tensor:
        if not self.images:
            return inputs
        # NHWC in memory seen as NCHW is channels_last: no copy
        images = (inputs.permute(0, 3, 1, 2).float() - self._shift) * self._scale
        return images if self.channels_last else images.contiguous()

    def _augmented(self, index: Tensor, seed: int) -> Tensor:
        assert self._train_source is not None
        _, height, width = self.input_shape
        generator = torch.Generator(self.device).manual_seed(seed)
        size, choices = (len(index), 1), 2 * self.augmentation.crop + 1
        rows = torch.arange(height, device=self.device).expand(len(index), height)
        columns = torch.arange(width, device=self.device).expand(len(index), width)
        if self.augmentation.flip:
            mirror = torch.randint(2, size, generator=generator, device=self.device, dtype=torch.bool)
            columns = torch.where(mirror, columns.flip(1), columns)
        if self.augmentation.crop:
            rows = rows + torch.randint(choices, size, generator=generator, device=self.device)
            columns = columns + torch.randint(choices, size, generator=generator, device=self.device)
        return self._train_source[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def _channel_moments(images: Array) -> tuple[Array, Array]:
    """Mean and standard deviation per channel of uint8 images [N, H, W, C], from exact counts of the 256 values."""
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])])
    values = np.arange(256)
    mean = counts @ values / counts.sum(1)
    variance = (counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1)
    return mean, np.sqrt(variance)


def _pad(images: Tensor, augmentation: Augmentation) -> Tensor:
    """uint8 [N, H, W, C] padded by `crop` on each side; reflected padding does not repeat the border pixel."""
    crop = augmentation.crop
    if crop == 0:
        return images
    if augmentation.padding_mode == "zero":
        return torch.nn.functional.pad(images, (0, 0, crop, crop, crop, crop))
    for dim in (1, 2):
        size = images.shape[dim]
        index = torch.arange(-crop, size + crop, device=images.device).abs()
        index = torch.where(index < size, index, 2 * (size - 1) - index)
        images = images.index_select(dim, index)
    return images
