#!/usr/bin/env python3
"""Download data sets.

python scripts/download.py fashion_mnist
python scripts/download.py mnist cifar10 --root ~/data
python scripts/download.py cifar10-heldout     # CIFAR-10, batch 5 held out: see below

`cifar10-heldout` writes cifar10-heldout.npz, made of the training images of CIFAR-10 alone: batches 1 to 4 to train on,
batch 5 held out for testing. The official test set stays unread. The experiments of the profile cpu use it.
"""

import argparse
import os
import sys
from pathlib import Path

from omegaconf import OmegaConf

from bipolar.errors import ConfigError, check_choice
from bipolar.sweep import CONFIGS

HELD_OUT = "cifar10-heldout"


def main() -> int:
    names = {
        path.stem: config.dataset
        for path in sorted((CONFIGS / "dataset").glob("*.yaml"))
        if "download" in (config := OmegaConf.load(path))
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", metavar="DATASET", help=f"from {', '.join([*names, HELD_OUT])}")
    parser.add_argument("--root", default=os.environ.get("BIPOLAR_DATA", "data"), help="default: $BIPOLAR_DATA or data")
    args = parser.parse_args()
    try:
        for name in args.datasets:
            check_choice("dataset", name, [*names, HELD_OUT])
        import numpy as np

        from bipolar.data.sources import hold_out, torchvision_images

        for name in args.datasets:
            if name == HELD_OUT:
                arrays = hold_out(torchvision_images("CIFAR10", str(Path(args.root).expanduser())), 10_000)
                keys = ("x_train", "y_train", "x_test", "y_test")
                np.savez(Path(args.root).expanduser() / f"{name}.npz", **{key: getattr(arrays, key) for key in keys})
                print(f"{name}: {len(arrays.y_train):,} training and {len(arrays.y_test):,} test images in {args.root}")
                continue
            arrays = torchvision_images(names[name], str(Path(args.root).expanduser()))
            sizes = f"{len(arrays.y_train):,} training and {len(arrays.y_test):,} test images"
            print(f"{name}: {sizes} in {args.root}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
