#!/usr/bin/env python3
"""Download data sets.

python scripts/download.py fashion_mnist
python scripts/download.py mnist cifar10 --root ~/data
"""

import argparse
import os
import sys
from pathlib import Path

from omegaconf import OmegaConf

from bipolar.errors import ConfigError, check_choice
from bipolar.sweep import CONFIGS


def main() -> int:
    names = {
        path.stem: config.dataset
        for path in sorted((CONFIGS / "dataset").glob("*.yaml"))
        if "download" in (config := OmegaConf.load(path))
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", metavar="DATASET", help=f"from {', '.join(names)}")
    parser.add_argument("--root", default=os.environ.get("BIPOLAR_DATA", "data"), help="default: $BIPOLAR_DATA or data")
    args = parser.parse_args()
    try:
        for name in args.datasets:
            check_choice("dataset", name, names)
        from bipolar.data.sources import torchvision_images

        for name in args.datasets:
            arrays = torchvision_images(names[name], str(Path(args.root).expanduser()))
            sizes = f"{len(arrays.y_train):,} training and {len(arrays.y_test):,} test images"
            print(f"{name}: {sizes} in {args.root}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
