"""Learning-rate schedules: the factor on the base rate as a function of the step, with a linear warm-up.

All are pure functions of (step, total_steps), but `Plateau`, which also looks at the validation loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bipolar.errors import ConfigError, check_float, check_int


class Schedule:
    """Constant, after a warm-up in which the factor rises linearly from 1 / warmup_steps to 1."""

    def __init__(self, warmup_steps: int = 0) -> None:
        self.warmup_steps = check_int("warmup_steps", warmup_steps, 0)

    def factor(self, step: int, total_steps: int) -> float:
        """The factor for the update that follows `step` updates; `total_steps` includes the warm-up."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.decay(min(progress, 1.0))

    def decay(self, progress: float) -> float:
        """The factor when the fraction `progress` (0 to 1) of the steps after the warm-up is done."""
        return 1.0

    def observe(self, valid_loss: float) -> None:
        """Told after each validation."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


Constant = Schedule


class Cosine(Schedule):
    """Half a cosine from 1 to `final` (Loshchilov and Hutter, arXiv:1608.03983, without restarts)."""

    def __init__(self, final: float = 0.0, warmup_steps: int = 0) -> None:
        super().__init__(warmup_steps)
        self.final = check_float("final", final, 0, 1)

    def decay(self, progress: float) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


class Linear(Schedule):
    """A straight line from 1 to `final`."""

    def __init__(self, final: float = 0.0, warmup_steps: int = 0) -> None:
        super().__init__(warmup_steps)
        self.final = check_float("final", final, 0, 1)

    def decay(self, progress: float) -> float:
        return 1 + (self.final - 1) * progress


class Step(Schedule):
    """Multiplied by `gamma` at each of the `milestones`, fractions of the training (1/2 and 3/4: as for ResNets)."""

    def __init__(self, milestones: Sequence[float] = (0.5, 0.75), gamma: float = 0.1, warmup_steps: int = 0) -> None:
        super().__init__(warmup_steps)
        if not isinstance(milestones, (list, tuple)):
            raise ConfigError(f"milestones={milestones!r} is not allowed; give a list of fractions, such as [0.5,0.75]")
        self.milestones = [check_float("milestones", m, 0, 1) for m in milestones]
        self.gamma = check_float("gamma", gamma, 0, 1, open_low=True)

    def decay(self, progress: float) -> float:
        # A milestone that rounding puts a hair above the step it names still counts as reached.
        return self.gamma ** sum(progress >= milestone - 1e-12 for milestone in self.milestones)


class Plateau(Schedule):
    """Multiplied by `gamma` when the validation loss has not fallen for `patience` validations in a row.

    The authors' code decays like this, with patience 1 (a validation every 3188 steps).
    """

    def __init__(
        self, gamma: float = 0.5, patience: int = 1, threshold: float = 0.0, final: float = 0.0, warmup_steps: int = 0
    ) -> None:
        super().__init__(warmup_steps)
        self.gamma = check_float("gamma", gamma, 0, 1, open_low=True, open_high=True)
        self.patience = check_int("patience", patience)
        self.threshold = check_float("threshold", threshold)
        self.final = check_float("final", final, 0, 1)
        self._factor, self._best, self._waited = 1.0, math.inf, 0

    def decay(self, progress: float) -> float:
        return self._factor

    def observe(self, valid_loss: float) -> None:
        if valid_loss < self._best - self.threshold:
            self._best, self._waited = valid_loss, 0
            return
        self._waited += 1
        if self._waited >= self.patience:
            self._factor, self._waited = max(self._factor * self.gamma, self.final), 0

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self._factor, "best": self._best, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._factor, self._best, self._waited = state["factor"], state["best"], state["waited"]


def parse_interval(name: str, value: Any) -> Any:
    """A schedule of measurements: a function step -> bool from `every N steps` (0: never) or `log` (10 per decade)."""
    if value == "log":
        return _is_logarithmic
    if isinstance(value, str):
        raise ConfigError(f"{name}={value!r} is not allowed; give a number of steps (0: never) or log")
    every = check_int(name, value, 0)
    return (lambda step: step % every == 0) if every else (lambda step: False)


def _is_logarithmic(step: int) -> bool:
    if step < 2:
        return True
    nearest = round(10 * math.log10(step))
    return any(step == round(10 ** (k / 10)) for k in (nearest - 1, nearest, nearest + 1))
