"""The one registry: a part is found by its slot and its name, and its file is imported only when it is asked for.

`encoder.name: transformer` is the file `harken/encoders/transformer.py`; a name with a dot (`mylab.encoders.mine`) is
a module of the user's own. Nothing is scanned or imported at start-up, and adding a part edits no list.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from harken.core.errors import HarkenError, nearest

SLOTS: dict[str, str] = {
    "frontend": "harken.frontends",
    "encoder": "harken.encoders",
    "objective": "harken.objectives",
    "optimizer": "harken.optim.optimizers",
    "schedule": "harken.optim.schedules",
}

# modules beside the parts that hold none
HELPERS = frozenset({"base", "backbone", "saved", "stack", "teacher", "token_decoder", "transcripts"})


@dataclass(frozen=True, kw_only=True)
class SlotConfig:
    """Base of every part's configuration; `name` selects the part.

    whole_cuts: an objective sets it whose target belongs to a cut as a whole (its transcript, its speaker's words), so
        that a crop of the audio would be taught what it does not hold: such a run may not crop.
    whole_tensors: an optimiser sets it that needs each parameter whole, so that ZeRO, which gives a rank slices of
        many parameters strung together, may not divide them.
    """

    whole_cuts: ClassVar[bool] = False
    whole_tensors: ClassVar[bool] = False

    name: str


@dataclass(frozen=True)
class Part:
    """A registered part: the class that is built and the dataclass that configures it."""

    build: Callable[..., Any]
    config: type[SlotConfig]


_parts: dict[tuple[str, str], Part] = {}
_T = TypeVar("_T", bound=type)


def register(slot: str, config: type[SlotConfig]) -> Callable[[_T], _T]:
    """Register the decorated class under its module's name; it is built as `cls(config, **context)`."""

    def decorate(cls: _T) -> _T:
        name = cls.__module__
        package = SLOTS[slot] + "."
        _parts[slot, name.removeprefix(package) if name.startswith(package) else name] = Part(cls, config)
        return cls

    return decorate


def available(slot: str) -> list[str]:
    """Names of the parts that harken ships for a slot; `HELPERS` and modules that begin with `_` are none."""
    package = importlib.import_module(SLOTS[slot])
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return sorted(name for name in names if not name.startswith("_") and name not in HELPERS)


def find(slot: str, name: str) -> Part:
    """Import and return a part.

    Raises HarkenError when the slot has no part of that name, naming the nearest.
    """
    module = name if "." in name else f"{SLOTS[slot]}.{name}"
    if "." not in name and name not in available(slot):
        raise HarkenError(
            f"`{slot}.name` must be one of harken's {slot}s or a module path, got `{name}`"
            f"{nearest(name, available(slot))}"
        )
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise HarkenError(f"`{slot}.name` is `{name}`, and importing the module `{module}` failed: {error}") from error
    if (slot, name) not in _parts:
        raise HarkenError(
            f"module `{module}` registers no {slot}; decorate its class with @register({slot!r}, ItsConfig)"
        )
    return _parts[slot, name]


def build(slot: str, config: SlotConfig, **context: Any) -> Any:
    """Build the part that `config.name` names."""
    return find(slot, config.name).build(config, **context)
