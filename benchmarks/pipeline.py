"""The whole trainer (data, augmentation, records, statistics) against bare loops of the same network and precision."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.timing import Case, scratch, synchronize
from bipolar.networks.cnn import CNN
from bipolar.run import run
from bipolar.sweep import compose

AUGMENT = "dataset.augment={crop: 4, padding_mode: zero, flip: true}"


WIDTHS = ((32, 32, 64, 64), (4, 4, 8, 8))
"""A network that computes most of the time, and one so small that the data have to keep up."""


def _network(device: str, widths: Sequence[int]) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = CNN((3, 32, 32), 10, torch.nn.ReLU, widths).to(device, memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)


def _train(batches, device: str, widths: Sequence[int]) -> float:
    """Seconds of training on these batches, the first of which does not count."""
    model, optimizer = _network(device, widths)
    started = 0.0
    for index, (inputs, targets) in enumerate(batches):
        if index == 1:
            synchronize()
            started = time.perf_counter()
        inputs, targets = inputs.to(device, memory_format=torch.channels_last), targets.to(device)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    synchronize()
    return time.perf_counter() - started


def cases(quick: bool) -> Iterator[Case]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, batch_size = (4, 16) if quick else (50, 128)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size * size, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, len(images))
    folder = scratch()
    np.savez(
        folder / "images.npz", x_train=images, y_train=labels, x_test=images[:batch_size], y_test=labels[:batch_size]
    )
    count = iter(range(10**6))

    def ours(widths: Sequence[int]) -> float:
        """Seconds per update."""
        summary = run(
            compose(
                ["network=cnn", f"network.widths={[*widths]}", "activation=relu", "dataset=npz", AUGMENT,
                 f"dataset.path={folder}/images.npz", "dataset.valid_fraction=0.02", "trainer.precision=float32",
                 f"trainer.batch_size={batch_size}", f"trainer.max_steps={size - 2}",
                 f"output_root={folder}/{next(count)}"]
            )
        )  # fmt: skip
        return batch_size / float(summary["images_per_second"])

    def resident(widths: Sequence[int]) -> float:
        batch = torch.randn(batch_size, 3, 32, 32, device=device), torch.randint(10, (batch_size,), device=device)
        return _train([batch] * size, device, widths) / (size - 1)

    def loader(widths: Sequence[int]) -> float:
        from torch.utils.data import DataLoader, Dataset
        from torchvision import transforms

        class Images(Dataset):
            transform = transforms.Compose(
                [transforms.ToPILImage(), transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(),
                 transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)]
            )  # fmt: skip

            def __len__(self) -> int:
                return len(images)

            def __getitem__(self, index: int):
                return self.transform(images[index]), int(labels[index])

        return _train(DataLoader(Images(), batch_size, shuffle=True, num_workers=2), device, widths) / (size - 1)

    for widths in WIDTHS[1:] if quick else WIDTHS:
        name = f"trainer, CNN {' '.join(map(str, widths))}, batch {batch_size}, crop and flip"
        for peer, theirs, target in (
            ("bare loop over one resident batch", resident, 0.95),
            ("hand-written loop, DataLoader with 2 workers", loader, 2.0),
        ):
            actions = partial(ours, widths), partial(theirs, widths)
            yield Case(name, peer, *actions, target, speedup=True, times_itself=True)
