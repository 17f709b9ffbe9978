"""From a configuration to objects: one function per configuration group.

A group's file names its class or function in `_target_`, so that a user's own needs no change here. `name` is for
people and run ids. Names of options in error messages are those of the command line (`network.pool`, ...).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from bipolar.activations import Bipolar
from bipolar.data.batches import Augmentation, Batches, carve_validation
from bipolar.data.sources import Arrays, check_shape
from bipolar.data.streams import TextBatches
from bipolar.data.text import Text
from bipolar.device import choose_device
from bipolar.errors import ConfigError, check_bool, check_float, check_int, prefixed
from bipolar.networks import MakeActivation, Recurrent
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
def _group(name: str, target: str = "bipolar.") -> Iterator[None]:
    """Errors of building a group's object are errors of its configuration, and name the group.

    Those of a user's own class are its bugs as likely, and keep their traceback.
    """
    with prefixed(name):
        try:
            yield
        except ConfigError:
            raise
        except (TypeError, ValueError, IndexError) as error:
            if not _is_known(target):
                raise
            raise ConfigError(str(error).splitlines()[0]) from error


def _is_known(target: str) -> bool:
    return target.startswith(("bipolar.", "torch."))


def activation(cfg: DictConfig) -> MakeActivation:
    make = _maker(cfg.activation)
    with _group("activation", cfg.activation._target_):
        made = make()
    if cfg.twin and not isinstance(made, Bipolar):
        raise ConfigError(f"twin=true needs a bipolar activation, such as brelu; {cfg.activation.name} is not one")
    return make


def network(cfg: DictConfig, input_shape: Sequence[int], classes: int) -> nn.Module:
    make = _maker(cfg.network)
    make_activation = activation(cfg)
    with _group("network", cfg.network._target_):
        model: nn.Module = make(input_shape, classes, make_activation)
    return model


def twin(cfg: DictConfig, model: nn.Module) -> nn.Module:
    """The model itself, or where `twin` is set the base network with its sign-flipped weights."""
    if not cfg.twin:
        return model
    from bipolar.symmetry import SymmetryError, fold

    try:
        return fold(model, strict=False)
    except SymmetryError as error:
        raise ConfigError(f"twin=true is not possible: {error}") from error


def initialization(cfg: DictConfig) -> Callable[..., list[dict[str, Any]]]:
    with _group("init", cfg.init._target_):
        check_int("samples", init_samples(cfg))
        made: Callable[..., list[dict[str, Any]]] = _maker(cfg.init, "samples")()
    return made


def init_samples(cfg: DictConfig) -> Any:
    """How many training samples the initialization is shown; most do not look at them."""
    return cfg.init.get("samples", 1)


def is_text(cfg: DictConfig) -> bool:
    """Whether the data set is a text, by the one option that all texts have."""
    return "sequence_length" in cfg.dataset


def arrays(cfg: DictConfig) -> Arrays | Text:
    of_batches = (
        ("sequence_length", "evaluation_size")
        if is_text(cfg)
        else ("valid_fraction", "split_seed", "train_size", "augment")
    )
    with _group("dataset", cfg.dataset._target_):
        made: Arrays | Text = _maker(cfg.dataset, *of_batches)()
    return made


def batches(cfg: DictConfig, data: Arrays | Text, device: torch.device) -> Batches | TextBatches:
    if isinstance(data, Text):
        with _group("dataset"):
            options = cfg.dataset.sequence_length, cfg.dataset.get("evaluation_size")
            return TextBatches(data, device, cfg.trainer.batch_size, *options)
    with _group("dataset.augment"):
        augmentation = Augmentation(**(cfg.dataset.get("augment") or {}))
    with _group("dataset"):
        splits = carve_validation(
            data,
            cfg.dataset.get("valid_fraction", 0.1),
            cfg.dataset.get("split_seed", 0),
            cfg.dataset.get("train_size"),
        )
    trainer = cfg.trainer
    return Batches(
        splits, data.classes, device, trainer.batch_size, cfg.seed, augmentation, channels_last=trainer.channels_last
    )


def optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    make = _maker(cfg.optimizer)
    with _group("optimizer", cfg.optimizer._target_):
        for name, value in cfg.optimizer.items():
            if name == "betas":
                if not isinstance(value, ListConfig) or len(value) != 2:
                    raise ConfigError(f"betas={value} is not allowed; give two numbers, such as [0.9,0.999]")
                for beta in value:
                    check_float("betas", beta, 0, 1, open_high=True)
            elif name in ("lr", "eps", "momentum", "weight_decay"):
                check_float(str(name), value, open_low=name == "lr")
        parameters = list(model.parameters())
        # With a scaled loss torch's fused SGD begins from what happens to be in memory if it skips its first step.
        fused = cfg.trainer.precision != "float16" and _can_be_fused(make, parameters)
        options = {"fused": True} if fused else {}
        made: torch.optim.Optimizer = make(parameters, **options)  # torch checks the rest
    return made


def _can_be_fused(make: Callable[..., Any], parameters: Sequence[nn.Parameter]) -> bool:
    """Whether torch can update all weights in one call: a tenth of a small network's step is spared."""
    assert isinstance(make, partial)
    names = inspect.signature(make.func).parameters if make.func.__module__.startswith("torch.optim.") else ()
    is_chosen = not {"fused", "foreach", "differentiable"}.isdisjoint(make.keywords)
    on_device = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return "fused" in names and on_device and not is_chosen


def schedule(cfg: DictConfig) -> Schedule:
    with _group("scheduler", cfg.scheduler._target_):
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


SHAPES = {
    "digits": [1, 8, 8],
    "mnist": [1, 28, 28],
    "fashion_mnist": [1, 28, 28],
    "cifar10": [3, 32, 32],
    "cifar100": [3, 32, 32],
}
"""Shapes of samples that are known without the data; a data set may also say its own as `shape`."""


def _options(node: DictConfig) -> str:
    return f"activation={node.name}" + "".join(
        f" activation.{key!s}={value}" for key, value in node.items() if key not in ("name", "_target_")
    )


def check(cfg: DictConfig) -> None:
    """Look at everything that can be wrong with a configuration without data, at almost no cost.

    Raises:
        ConfigError: one line: what is wrong, what is allowed, the nearest name.
    """
    check_seed(cfg)
    for name in ("output_root", "experiment_name"):
        if not isinstance(cfg[name], str) or not cfg[name]:
            raise ConfigError(f"{name}={cfg[name]!r} is not allowed; give the name of a folder")
    if ".." in Path(cfg.experiment_name).parts or Path(cfg.experiment_name).is_absolute():
        raise ConfigError(f"experiment_name={cfg.experiment_name} is not allowed; it is a folder below output_root")
    check_bool("twin", cfg.twin)
    options = trainer_options(cfg)
    with _group("trainer"):
        choose_device(options.device)
    loggers(cfg)
    initialization(cfg)
    made_schedule = schedule(cfg)
    with torch.device("meta"):
        made_optimizer = optimizer(cfg, nn.Linear(1, 1))
    _try_network(cfg)
    if options.ensemble > 1:
        from bipolar import ensemble

        ensemble.check(hollow_network(cfg), made_optimizer, made_schedule, options)


def check_seed(cfg: DictConfig) -> None:
    check_int("seed", cfg.seed, 0)


_tried: set[str] = set()
"""What was tried of networks: the jobs of a sweep mostly share theirs, and one of a thousand layers takes seconds."""


def _try_network(cfg: DictConfig) -> None:
    samples = OmegaConf.create({key: cfg.dataset.get(key) for key in ("name", "shape", "classes", "sequence_length")})
    parts = [OmegaConf.to_container(part, resolve=True) for part in (cfg.activation, cfg.network, samples)]
    key = json.dumps([*parts, cfg.twin], default=str)
    if key not in _tried:
        if (model := hollow_network(cfg)) is not None:
            twin(cfg, model)
        _tried.add(key)


def hollow_network(cfg: DictConfig) -> nn.Module | None:
    """The network with arbitrary values, after a try with two samples.

    None where it cannot be told: for a user's own network and data whose shape is not known before one looks at them.
    """
    shape, classes = SHAPES.get(cfg.dataset.name, [3, 32, 32]), 10
    if is_text(cfg):
        with _group("dataset"):
            shape = [check_int("sequence_length", cfg.dataset.sequence_length)]
    if "shape" in cfg.dataset:
        with _group("dataset"):
            shape, classes = check_shape(cfg.dataset.shape), check_int("classes", cfg.dataset.classes)
    are_ours = _is_known(cfg.network._target_) and _is_known(cfg.activation._target_)
    if cfg.dataset.name not in SHAPES and not is_text(cfg) and not _is_known(cfg.network._target_):
        return None
    with torch.device("meta"):
        model = network(cfg, shape, classes)
    # Without values nothing is allocated or drawn, but torch computes a layer's shapes in Python then, 30 times as slow
    # as two samples in memory as it is found. A user's module may keep tensors that do not move there.
    is_small = sum(parameter.numel() for parameter in model.parameters()) <= 2**24
    device = "cpu" if are_ours and is_small else "meta"
    if device == "cpu":
        model = model.to_empty(device=device)
    if isinstance(model, Recurrent) != is_text(cfg):
        what, others = ("a text", "images") if is_text(cfg) else ("no text", "text")
        raise ConfigError(
            f"network={cfg.network.name} does not go with dataset={cfg.dataset.name}: it reads {others}, and this "
            f"is {what}"
        )
    try:
        with torch.device(device), torch.no_grad():
            model(torch.zeros(2, 2, dtype=torch.long) if is_text(cfg) else torch.zeros(2, *shape))
    except (TypeError, IndexError) as error:
        if not are_ours:
            raise
        raise ConfigError(f"{_options(cfg.activation)} cannot be used: {str(error).splitlines()[0]}") from error
    return model
