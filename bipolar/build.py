"""From a configuration to objects: one function per configuration group.

A group's file names its class or function in `_target_`, so that a user's own needs no change here. `name` is for
people and run ids. Names of options in error messages are those of the command line (`network.pool`, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import hydra.utils
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from bipolar.data.batches import Augmentation, Batches, carve_validation
from bipolar.data.sources import Arrays, check_shape
from bipolar.device import choose_device
from bipolar.errors import ConfigError, check_float, check_int, prefixed
from bipolar.networks import MakeActivation
from bipolar.recording.loggers import Logger, make_loggers
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


@contextmanager
def _group(name: str) -> Iterator[None]:
    """Errors of building a group's object are errors of its configuration, and name the group."""
    with prefixed(name):
        try:
            yield
        except ConfigError:
            raise
        except (TypeError, ValueError, IndexError) as error:
            raise ConfigError(str(error).splitlines()[0]) from error


def activation(cfg: DictConfig) -> MakeActivation:
    make = _maker(cfg.activation)
    with _group("activation"):
        make()
    return make


def network(cfg: DictConfig, input_shape: Sequence[int], classes: int) -> nn.Module:
    make = _maker(cfg.network)
    make_activation = activation(cfg)
    with _group("network"):
        model: nn.Module = make(input_shape, classes, make_activation)
    return model


def initialization(cfg: DictConfig) -> Callable[..., list[dict[str, Any]]]:
    with _group("init"):
        check_int("samples", cfg.init.samples)
        made: Callable[..., list[dict[str, Any]]] = _maker(cfg.init, "samples")()
    return made


def arrays(cfg: DictConfig) -> Arrays:
    with _group("dataset"):
        made: Arrays = _maker(cfg.dataset, "valid_fraction", "split_seed", "train_size", "augment")()
    return made


def batches(cfg: DictConfig, data: Arrays, device: torch.device) -> Batches:
    with _group("dataset.augment"):
        augmentation = Augmentation(**cfg.dataset.augment)
    with _group("dataset"):
        splits = carve_validation(data, cfg.dataset.valid_fraction, cfg.dataset.split_seed, cfg.dataset.train_size)
    return Batches(splits, data.classes, device, cfg.trainer.batch_size, cfg.seed, augmentation)


def optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    make = _maker(cfg.optimizer)
    with _group("optimizer"):
        for name, value in cfg.optimizer.items():
            if name == "betas":
                if not isinstance(value, ListConfig) or len(value) != 2:
                    raise ConfigError(f"betas={value} is not allowed; give two numbers, such as [0.9,0.999]")
                for beta in value:
                    check_float("betas", beta, 0, 1, open_high=True)
            elif name in ("lr", "eps", "momentum", "weight_decay"):
                check_float(str(name), value, open_low=name == "lr")
        made: torch.optim.Optimizer = make(list(model.parameters()))  # torch checks the rest
    return made


def schedule(cfg: DictConfig) -> Schedule:
    with _group("scheduler"):
        made: Schedule = _maker(cfg.scheduler)()
    return made


def trainer_options(cfg: DictConfig) -> TrainerOptions:
    options = OmegaConf.to_container(cfg.trainer, resolve=True)
    assert isinstance(options, dict)
    with _group("trainer"):
        return TrainerOptions(**{str(key): value for key, value in options.items()})


def loggers(cfg: DictConfig) -> list[Logger]:
    chosen = OmegaConf.to_container(cfg.logger, resolve=True)
    assert isinstance(chosen, dict)
    return make_loggers({str(key): value for key, value in chosen.items()}, progress=bool(cfg.trainer.progress))


def _options(node: DictConfig) -> str:
    return f"activation={node.name}" + "".join(
        f" activation.{key!s}={value}" for key, value in node.items() if key not in ("name", "_target_")
    )


def check(cfg: DictConfig) -> None:
    """Look at everything that can be wrong with a configuration without data, at almost no cost.

    Raises:
        ConfigError: one line: what is wrong, what is allowed, the nearest name.
    """
    if isinstance(cfg.seed, bool) or not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise ConfigError(f"seed={cfg.seed!r} is not allowed; give an integer of at least 0")
    options = trainer_options(cfg)
    with _group("trainer"):
        choose_device(options.device)
    loggers(cfg)
    initialization(cfg)
    schedule(cfg)
    shape, classes = [3, 32, 32], 10
    if "shape" in cfg.dataset:
        with _group("dataset"):
            shape, classes = check_shape(cfg.dataset.shape), check_int("classes", cfg.dataset.classes)
    with torch.device("meta"):
        model = network(cfg, shape, classes)
        try:
            model(torch.empty(2, *shape))
        except (TypeError, IndexError) as error:
            raise ConfigError(f"{_options(cfg.activation)} cannot be used: {str(error).splitlines()[0]}") from error
    optimizer(cfg, model)
