#!/usr/bin/env python3
"""Download data sets.

python scripts/download.py fashion_mnist
python scripts/download.py mnist cifar10 ptb --root ~/data
python scripts/download.py cifar10-heldout     # CIFAR-10, batch 5 held out: see below

`cifar10-heldout` writes cifar10-heldout.npz, made of the training images of CIFAR-10 alone: batches 1 to 4 to train on,
batch 5 held out for testing. The official test set stays unread. The experiments of the profile cpu use it.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bipolar.errors import ConfigError, check_choice
from bipolar.sweep import CONFIGS

HELD_OUT = "cifar10-heldout"


def main() -> int:
    configs = {path.stem: OmegaConf.load(path) for path in sorted((CONFIGS / "dataset").glob("*.yaml"))}
    names = [name for name, config in configs.items() if "download" in config]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", metavar="DATASET", help=f"from {', '.join([*names, HELD_OUT])}")
    parser.add_argument("--root", default=os.environ.get("BIPOLAR_DATA", "data"), help="default: $BIPOLAR_DATA or data")
    args = parser.parse_args()
    root = Path(args.root).expanduser()
    try:
        for name in args.datasets:
            check_choice("dataset", name, [*names, HELD_OUT])
        for name in args.datasets:
            print(f"{name}: {_get(name, configs, root)} in {root}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _get(name: str, configs: dict[str, Any], root: Path) -> str:
    """Download one data set; returns its sizes in words."""
    import numpy as np

    from bipolar.data import sources, text

    if name in ("ptb", "text8"):
        found = getattr(text, name)(str(root))
        return ", ".join(f"{len(getattr(found, part)):,} {part}" for part in ("train", "valid", "test")) + " characters"
    arrays = sources.torchvision_images("CIFAR10" if name == HELD_OUT else configs[name].dataset, str(root))
    if name == HELD_OUT:
        arrays = sources.hold_out(arrays, 10_000)
        keys = ("x_train", "y_train", "x_test", "y_test")
        np.savez(root / f"{name}.npz", **{key: getattr(arrays, key) for key in keys})
    return f"{len(arrays.y_train):,} training and {len(arrays.y_test):,} test images"


if __name__ == "__main__":
    sys.exit(main())
