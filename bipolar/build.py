"""From a configuration to objects: one function per configuration group.

A group's file names its class or function in `_target_`, so that a user's own needs no change here. `name` is for
people and run ids. Names of options in error messages are those of the command line (`network.pool`, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import hydra.utils
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from bipolar.data.batches import Augmentation, Batches, carve_validation
from bipolar.data.sources import Arrays
from bipolar.errors import ConfigError, check_float, prefixed
from bipolar.networks import MakeActivation
from bipolar.schedules import Schedule
from bipolar.trainer import TrainerOptions


def _maker(node: DictConfig, *left_out: str) -> Callable[..., Any]:
    """The target of `node` with its options bound, to be called with the rest of the arguments."""
    options = OmegaConf.to_container(node, resolve=True)
    assert isinstance(options, dict)
    kept = {key: value for key, value in options.items() if key not in ("name", *left_out)}
    try:
        made = hydra.utils.instantiate({**kept, "_partial_": True}, _convert_="all")
    except hydra.errors.InstantiationException as error:
        raise ConfigError(f"_target_={kept.get('_target_')!r} cannot be used: {str(error).splitlines()[0]}") from error
    assert isinstance(made, partial)
    return made


def activation(cfg: DictConfig) -> MakeActivation:
    make = _maker(cfg.activation)
    with prefixed("activation"):
        try:
            make()
        except TypeError as error:
            raise ConfigError(str(error)) from error
    return make


def network(cfg: DictConfig, input_shape: Sequence[int], classes: int) -> nn.Module:
    make = _maker(cfg.network)
    make_activation = activation(cfg)
    with prefixed("network"):
        model: nn.Module = make(input_shape, classes, make_activation)
    return model


def initialization(cfg: DictConfig) -> Callable[..., list[dict[str, Any]]]:
    with prefixed("init"):
        made: Callable[..., list[dict[str, Any]]] = _maker(cfg.init, "samples")()
    return made


def arrays(cfg: DictConfig) -> Arrays:
    with prefixed("dataset"):
        made: Arrays = _maker(cfg.dataset, "valid_fraction", "split_seed", "train_size", "augment")()
    return made


def batches(cfg: DictConfig, data: Arrays, device: torch.device) -> Batches:
    with prefixed("dataset.augment"):
        augmentation = Augmentation(**cfg.dataset.augment)
    with prefixed("dataset"):
        splits = carve_validation(data, cfg.dataset.valid_fraction, cfg.dataset.split_seed, cfg.dataset.train_size)
    with prefixed("trainer"):
        return Batches(splits, data.classes, device, cfg.trainer.batch_size, cfg.seed, augmentation)


def optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    make = _maker(cfg.optimizer)
    with prefixed("optimizer"):
        check_float("lr", cfg.optimizer.lr, open_low=True)
        try:
            made: torch.optim.Optimizer = make(list(model.parameters()))
        except (ValueError, TypeError) as error:  # torch checks the rest
            raise ConfigError(str(error).splitlines()[0]) from error
    return made


def schedule(cfg: DictConfig) -> Schedule:
    with prefixed("scheduler"):
        made: Schedule = _maker(cfg.scheduler)()
    return made


def trainer_options(cfg: DictConfig) -> TrainerOptions:
    options = OmegaConf.to_container(cfg.trainer, resolve=True)
    assert isinstance(options, dict)
    with prefixed("trainer"):
        return TrainerOptions(**{str(key): value for key, value in options.items()})


def check(cfg: DictConfig) -> None:
    """Look at everything that can be wrong with a configuration without data, at almost no cost.

    Raises:
        ConfigError: one line: what is wrong, what is allowed, the nearest name.
    """
    if isinstance(cfg.seed, bool) or not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise ConfigError(f"seed={cfg.seed!r} is not allowed; give an integer of at least 0")
    trainer_options(cfg)
    initialization(cfg)
    schedule(cfg)
    shape, classes = (3, 32, 32), 10
    if "shape" in cfg.dataset:
        shape, classes = cfg.dataset.shape, cfg.dataset.classes
    with torch.device("meta"):
        model = network(cfg, shape, classes)
        try:
            model(torch.empty(2, *shape))
        except IndexError as error:
            raise ConfigError(f"activation: {error}") from error
    optimizer(cfg, model)
