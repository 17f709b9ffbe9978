"""Checkpoints: written atomically, and loadable with `torch.load(..., weights_only=True)`."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path` so that at any moment either the old or the new checkpoint is there, whole."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        torch.save(_without_views(state), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _without_views(state: Any) -> Any:
    """The same, but tensors that are parts of larger ones are copied: torch would save all of each.

    Parts of one run only: two names of one tensor, as tied weights are, stay one.
    """
    if isinstance(state, dict):
        copied = {key: _without_views(value) for key, value in state.items()}
        return copied if any(copied[key] is not value for key, value in state.items()) else state
    if isinstance(state, Tensor) and state.untyped_storage().nbytes() > state.numel() * state.element_size():
        return state.clone()
    return state


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint. RuntimeError if the file is damaged.

    Its tensors lie in host memory: `load_state_dict` moves what belongs on the device and leaves Adam's step counters
    where they are, and on a device each of their updates would be waited for.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds: of the zip file, of the pickle in it, of torch
        raise RuntimeError(f"{path} cannot be read; remove it to train from the start") from error
    return state


def random_state() -> dict[str, Any]:
    """The state of every global random generator, in types that a weights-only load admits."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
