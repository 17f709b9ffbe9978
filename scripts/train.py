#!/usr/bin/env python3
"""Train one network, or with -m a sweep of them:

python scripts/train.py activation=belu network=cnn dataset=fashion_mnist seed=3
python scripts/train.py -m activation=relu,brelu,elu,belu seed=0,1,2,3,4
"""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from bipolar import cli


@hydra.main(config_path="../configs", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    job = HydraConfig.get()
    return cli.execute(cfg, job.job.num if job.mode == RunMode.MULTIRUN else None)


if __name__ == "__main__":
    sys.exit(cli.main(main, sys.argv[1:]))
