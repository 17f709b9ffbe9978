"""Several small networks trained as one: `trainer.ensemble=K` in a sweep.

A step of a small network is mostly the calls that it takes, so K networks whose runs differ in their seed alone are
trained together: the weights of a layer are one tensor [K, out, in], a layer is one batched product, and an update one
call for all. Each run keeps its trainer, with its own data order, records, schedule, checkpoint and folder, and the
weights in its network are views into the common tensors: what it evaluates, saves and measures needs nothing else.
Steps at which activations are measured are computed one network at a time.

A run's figures are those that it has when trained alone, but for rounding. Convolutions gain nothing this way (batched
weights are a grouped convolution, which is slower than one after another): docs/performance.md has the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bipolar.activations import Bipolar
from bipolar.data.batches import Batch
from bipolar.device import autocast
from bipolar.errors import ConfigError, throw
from bipolar.networks.elementwise import Activation, is_elementwise
from bipolar.networks.mlp import MLP
from bipolar.schedules import Plateau
from bipolar.trainer import Outcome, Trainer, TrainerOptions

OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad)
"""Optimizers that treat each element by itself."""


def check(model: nn.Module | None, optimizer: torch.optim.Optimizer, schedule: Any, options: TrainerOptions) -> None:
    """Whether runs with this network (None: not known) can be trained together.

    Raises:
        ConfigError: why they cannot.
    """
    reason = None
    if not isinstance(model, MLP) or not all(_is_plain(block) for block in model.hidden):
        reason = "needs network=mlp, without normalization and dropout"
    elif any(_stacked(block.activation) is None for block in model.hidden):
        name = type(model.hidden[0].activation).__name__
        reason = f"needs an element-wise activation of torch or its bipolar version, not {name}"
    elif type(optimizer) not in OPTIMIZERS:
        names = ", ".join(each.__name__ for each in OPTIMIZERS)
        reason = f"needs an optimizer that treats each weight by itself ({names}), not {type(optimizer).__name__}"
    elif isinstance(schedule, Plateau):
        reason = "does not go with scheduler=plateau, which would give each network a rate of its own"
    elif options.accumulate > 1 or options.compile or options.precision == "float16":
        reason = "does not go with trainer.accumulate, trainer.compile or float16"
    if reason:
        raise ConfigError(f"trainer.ensemble={options.ensemble} {reason}")


def _is_plain(block: nn.Module) -> bool:
    return [name for name, _ in block.named_children()] == ["linear", "activation"]


def _stacked(activation: Any) -> Activation | None:
    """The same for tensors [K, N, features]."""
    if not is_elementwise(activation):
        return None
    return Bipolar(activation.fn, -1, activation.pattern) if isinstance(activation, Bipolar) else activation


class Ensemble:
    """The networks of these trainers, which are at the same step, as one."""

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        first = trainers[0]
        self.trainers = list(trainers)
        model = first.model
        assert isinstance(model, MLP)
        self.activations = [_stacked(block.activation) for block in model.hidden]
        self.members = list(zip(*(list(trainer.model.parameters()) for trainer in trainers), strict=True))
        self.parameters = [nn.Parameter(torch.stack([p.detach() for p in each])) for each in self.members]
        for stacked, each in zip(self.parameters, self.members, strict=True):
            for view, parameter in zip(stacked.detach().unbind(), each, strict=True):
                parameter.data = view
        self.optimizer = self._stack_optimizer()
        self.totals = torch.stack([trainer.totals for trainer in trainers])
        for view, trainer in zip(self.totals.unbind(), trainers, strict=True):
            trainer.totals = view

    def _stack_optimizer(self) -> torch.optim.Optimizer:
        optimizers = [trainer.optimizer for trainer in self.trainers]
        place = {each[0]: stacked for stacked, each in zip(self.parameters, self.members, strict=True)}
        stacked_groups = [
            {**group, "params": [place[parameter] for parameter in group["params"]]}
            for group in optimizers[0].param_groups
        ]
        make: Any = type(optimizers[0])  # its groups name all its options
        made: torch.optim.Optimizer = make(stacked_groups)
        for stacked, each in zip(self.parameters, self.members, strict=True):
            states = [optimizer.state.get(p, {}) for optimizer, p in zip(optimizers, each, strict=True)]
            if states[0]:
                made.state[stacked] = {
                    key: torch.stack([state[key] for state in states]) if _is_like(value, each[0]) else value
                    for key, value in states[0].items()
                }
        self._shared = False
        return made

    def _share_state(self) -> None:
        """Give each trainer's optimizer its part of the common state, which is updated in place from then on."""
        for stacked, each in zip(self.parameters, self.members, strict=True):
            for number, (trainer, parameter) in enumerate(zip(self.trainers, each, strict=True)):
                trainer.optimizer.state[parameter] = {
                    key: value[number] if _is_like(value, stacked) else value
                    for key, value in self.optimizer.state[stacked].items()
                }
        self._shared = True

    def train_step(self, batches: Sequence[Batch]) -> None:
        """An update of each network with its batch."""
        first = self.trainers[0]
        measure = first.is_measured(first.step)
        for trainer in self.trainers:
            trainer.set_learning_rates()
        for group, like in zip(self.optimizer.param_groups, first.optimizer.param_groups, strict=True):
            group["lr"] = like["lr"]
        if measure:
            self._measured_gradients(batches)
        else:
            self._gradients(batches)
        if first.options.grad_clip is not None:
            self._share_gradients()
            for trainer in self.trainers:
                nn.utils.clip_grad_norm_(trainer.model.parameters(), first.options.grad_clip)
        self.optimizer.step()
        if not self._shared:
            self._share_state()
        self.optimizer.zero_grad(set_to_none=True)
        for trainer, batch in zip(self.trainers, batches, strict=True):
            trainer.optimizer.zero_grad(set_to_none=True)
            trainer.count_step(batch)

    def _gradients(self, batches: Sequence[Batch]) -> None:
        first = self.trainers[0]
        inputs = torch.stack([inputs for inputs, _ in batches]).flatten(2)
        targets = torch.stack([targets for _, targets in batches])
        with autocast(first.device, first.precision):
            logits = self(inputs)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            loss = losses.view_as(targets).sum(1) / targets.shape[1]
        loss.sum().backward()
        with torch.no_grad():
            errors = (logits.argmax(2) != targets).sum(1) / targets.shape[1]
            self.totals += torch.stack([loss.detach().float(), errors], dim=1)

    def __call__(self, x: Tensor) -> Tensor:
        """[K, N, inputs] to logits [K, N, classes]."""
        *hidden, (weight, bias) = zip(self.parameters[::2], self.parameters[1::2], strict=True)
        for (w, b), activation in zip(hidden, self.activations, strict=True):
            assert activation is not None
            x = activation(torch.baddbmm(b[:, None], x, w.mT))
        return torch.baddbmm(bias[:, None], x, weight.mT)

    def _measured_gradients(self, batches: Sequence[Batch]) -> None:
        """One network after another, each with its statistics."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._share_gradients()
        for trainer, batch in zip(self.trainers, batches, strict=True):
            with trainer.statistics.measuring():
                trainer.forward_and_backward(batch)
            trainer.keep_statistics()

    def _share_gradients(self) -> None:
        for stacked, each in zip(self.parameters, self.members, strict=True):
            assert stacked.grad is not None
            for view, parameter in zip(stacked.grad.unbind(), each, strict=True):
                parameter.grad = view


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def train(trainers: Sequence[Trainer]) -> Iterator[tuple[int, Callable[[], Outcome]]]:
    """Train all to their ends.

    Yields each trainer's number as it ends, with a function that returns its outcome or raises what it raised.

    Those that are behind (checkpoints of an earlier try may be of different steps) catch up by themselves first.
    """
    loops = {number: trainer.loop() for number, trainer in enumerate(trainers)}
    waiting: dict[int, Batch] = {}
    ensemble: Ensemble | None = None
    while loops:
        for number in [number for number in loops if number not in waiting]:
            try:
                waiting[number] = next(loops[number])
                continue
            except StopIteration as ended:
                result = partial(_return, ended.value)
            except Exception as error:
                result = partial(throw, error)
            del loops[number]
            ensemble = None
            yield number, result
        least = min((trainers[number].step for number in waiting), default=0)
        now = [number for number in waiting if trainers[number].step == least]
        if len(now) < len(waiting) or len(now) == 1:
            for number in now:
                trainers[number].train_step(waiting.pop(number))
            continue
        if ensemble is None:
            ensemble = Ensemble([trainers[number] for number in now])
        ensemble.train_step([waiting.pop(number) for number in now])


def _return(outcome: Outcome) -> Outcome:
    return outcome
