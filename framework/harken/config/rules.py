"""Rules that numbers of a configuration obey, told by the key that the user wrote."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harken.core.errors import HarkenError

_RULES: dict[str, Callable[[float], bool]] = {
    "must be positive": lambda value: value > 0,
    "must be at least 0": lambda value: value >= 0,
    "must lie in 0..1": lambda value: 0 <= value <= 1,
}


def check_numbers(
    config: object,
    group: str,
    *,
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    shares: Sequence[str] = (),
) -> None:
    """Check fields of a group: each is a number, a tuple of them, or None, which obeys every rule.

    positive: fields above 0. not_negative: fields of at least 0. shares: fields in 0..1.
    Raises HarkenError with a line for each field that breaks its rule; NaN breaks them all.
    """
    mistakes = []
    for (rule, holds), names in zip(_RULES.items(), (positive, not_negative, shares), strict=True):
        for name in names:
            value = getattr(config, name)
            values = value if isinstance(value, tuple) else (value,)
            if not all(item is None or holds(item) for item in values):
                found = list(value) if isinstance(value, tuple) else value
                mistakes.append(f"`{group}.{name}` {rule}, got {found}")
    if mistakes:
        raise HarkenError("\n".join(mistakes))


def check_factors(factors: Mapping[str, Any], key: str) -> None:
    """Check that a group, and every group in it, holds numbers of at least 0.

    Raises HarkenError with a line for each that is not.
    """
    mistakes = []
    for name, value in factors.items():
        if isinstance(value, Mapping):
            check_factors(value, f"{key}.{name}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            mistakes.append(f"`{key}.{name}` must be a number of at least 0, got {value!r}")
    if mistakes:
        raise HarkenError("\n".join(mistakes))
