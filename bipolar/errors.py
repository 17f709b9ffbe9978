"""Errors that a user can mend, and the checks that raise them.

Every message says in one line what was wrong, what is allowed, and the nearest allowed name.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class ConfigError(ValueError):
    """A wrong value given by the user. The commands print it as one line and exit with status 2."""


class DataError(ConfigError):
    """Data that is missing, damaged or of the wrong form."""


def nearest(value: str, allowed: Iterable[str]) -> str:
    """`" (did you mean 'X'?)"` for the allowed name nearest to `value`, or an empty text."""
    names = {name.lower(): name for name in allowed}
    matches = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.5)
    return f" (did you mean {names[matches[0]]!r}?)" if matches else ""


def throw(error: BaseException) -> Any:
    """`raise`, as a function."""
    raise error


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    names = list(allowed)
    if value not in names:
        raise ConfigError(f"{name}={value!r} is not allowed; choose from {', '.join(names)}{nearest(value, names)}")
    return str(value)


def check_int(name: str, value: Any, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name}={value!r} is not allowed; give an integer of at least {minimum}")
    return value


def check_float(
    name: str, value: Any, low: float = 0.0, high: float = math.inf, *, open_low: bool = False, open_high: bool = False
) -> float:
    """A finite number in [low, high], an end being excluded where `open_low` or `open_high` says so."""
    number = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    above = number and (value > low or (value == low and not open_low))
    below = number and (value < high or (value == high and not open_high))
    if not (above and below):
        left = "(" if open_low or low == -math.inf else "["
        right = ")" if open_high or high == math.inf else "]"
        low_text = "-inf" if low == -math.inf else f"{low:g}"
        high_text = "inf" if high == math.inf else f"{high:g}"
        raise ConfigError(f"{name}={value!r} is not allowed; give a number in {left}{low_text}, {high_text}{right}")
    return float(value)


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is not allowed; give true or false")
    return value


@contextmanager
def prefixed(prefix: str) -> Iterator[None]:
    """Name the option in a ConfigError raised inside as the user knows it: `pool=...` becomes `network.pool=...`."""
    try:
        yield
    except DataError:
        raise
    except ConfigError as error:
        separator = "." if re.match(r"[\w.]+=", str(error)) else ": "
        raise ConfigError(f"{prefix}{separator}{error}") from error
