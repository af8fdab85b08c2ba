"""From plain data to dataclasses: types, unknown keys and missing values are checked, all mistakes told at once."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast

from harken.config.registry import SLOTS, SlotConfig, find
from harken.core.errors import HarkenError, nearest

_T = TypeVar("_T")


def structure(cls: type[_T], data: Mapping[str, Any]) -> _T:
    """Build `cls` from nested plain data.

    Raises HarkenError that lists every unknown key (with the nearest name), wrong type and missing value.
    """
    mistakes: list[str] = []
    value = _dataclass(cls, data, "", mistakes)
    if mistakes:
        raise HarkenError("\n".join(mistakes))
    return cast(_T, value)


def _dataclass(cls: type[Any], data: Any, path: str, mistakes: list[str]) -> Any:
    if not isinstance(data, Mapping):
        mistakes.append(f"`{path}` must be a group of keys, got {data!r}")
        return None
    if issubclass(cls, SlotConfig):
        cls = _slot_class(cls, data, path, mistakes)
    hints = typing.get_type_hints(cls)
    known = {item.name: item for item in fields(cls)}
    before = len(mistakes)
    mistakes.extend(
        f"unknown key `{_join(path, str(name))}`{nearest(str(name), known)}" for name in data if name not in known
    )
    values: dict[str, Any] = {}
    for name, item in known.items():
        if name in data:
            values[name] = _value(hints[name], data[name], _join(path, name), mistakes)
        elif _required(item):
            mistakes.append(f"missing value for `{_join(path, name)}` ({_name(hints[name])})")
    if len(mistakes) > before:
        return None
    try:
        return cls(**values)
    except HarkenError as error:
        mistakes.append(str(error))
        return None


def _slot_class(cls: type[Any], data: Mapping[str, Any], path: str, mistakes: list[str]) -> type[Any]:
    if path not in SLOTS or "name" not in data:
        return cls
    try:
        return find(path, str(data["name"])).config
    except HarkenError as error:
        mistakes.append(str(error))
        return cls


def _value(hint: Any, value: Any, path: str, mistakes: list[str]) -> Any:
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        inner = [option for option in typing.get_args(hint) if option is not type(None)]
        words = [word for option in inner[1:] for word in typing.get_args(option)]  # `float | Literal["auto"]`
        if value in words:
            return value
        if words:
            before = len(mistakes)
            found = _value(inner[0], value, path, mistakes)
            if len(mistakes) > before:
                mistakes[before:] = [f"`{path}` must be {_name(inner[0])} or {', '.join(words)}, got {value!r}"]
            return found
        return _value(inner[0], value, path, mistakes)
    if is_dataclass(hint):
        return _dataclass(cast(type[Any], hint), value, path, mistakes)
    if origin is Literal:
        if value not in typing.get_args(hint):
            mistakes.append(f"`{path}` must be one of {', '.join(map(repr, typing.get_args(hint)))}, got {value!r}")
        return value
    if origin is tuple:
        return _tuple(typing.get_args(hint)[0], value, path, mistakes)
    if origin is dict:
        return dict(value) if isinstance(value, Mapping) else _wrong(hint, value, path, mistakes)
    return _scalar(hint, value, path, mistakes)


def _tuple(inner: Any, value: Any, path: str, mistakes: list[str]) -> Any:
    if not isinstance(value, list | tuple):
        return _wrong(f"list of {_name(inner)}", value, path, mistakes)
    return tuple(_value(inner, item, f"{path}[{index}]", mistakes) for index, item in enumerate(value))


def _scalar(hint: Any, value: Any, path: str, mistakes: list[str]) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 5e-4 as text
        try:
            return float(value)
        except ValueError:
            return _wrong(hint, value, path, mistakes)
    if hint is int and isinstance(value, bool):
        return _wrong(hint, value, path, mistakes)
    if hint is Any or isinstance(value, hint):
        return value
    if hint is str and isinstance(value, int):  # a name made of digits
        return str(value)
    return _wrong(hint, value, path, mistakes)


def _wrong(hint: Any, value: Any, path: str, mistakes: list[str]) -> None:
    mistakes.append(f"`{path}` must be {_name(hint)}, got {value!r}")


def _required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _name(hint: Any) -> str:
    return hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint).replace("typing.", ""))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
