"""Random numbers: every part of a run draws from a stream of its own, all derived from one seed.

Two runs with the same seed and different activations therefore see the same batches, crops and flips in the same
order, and a stream's position follows from (epoch, step) alone, so that a resumed run needs no stored position.
"""

from __future__ import annotations

import hashlib
import random


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed in [0, 2^63) for the stream that `names` name, e.g. `derive_seed(0, "order", epoch)`."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed Python's, NumPy's and torch's global generators and set torch's flags, whatever an earlier job left."""
    import os

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator, for users' own code
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
