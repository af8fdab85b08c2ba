"""YAML files merged left to right, then `key=value`, into a RunConfig that knows where each value came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from harken.config.registry import SLOTS
from harken.config.schema import RunConfig
from harken.config.structure import structure
from harken.core.errors import HarkenError, nearest

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Loaded:
    """A run's configuration and, for every dotted key, the file or argument that set it (`default` otherwise)."""

    config: RunConfig
    origin: dict[str, str]

    def table(self) -> str:
        """Return every resolved value with its origin, one line each."""
        rows = [
            (path, repr(value), self.origin.get(path, "default"))
            for path, value in flatten(asdict(self.config)).items()
        ]
        left, middle = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{path:{left}}  {value:{min(middle, 48)}}  # {origin}" for path, value, origin in rows)


def load(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Loaded:
    """Load and check a configuration.

    files: YAML files, or names of presets that harken ships. A file's `base:` (a name or a list) is merged before it.
    overrides: `key=value` with YAML values.
    Raises HarkenError for unreadable files, unknown keys, wrong types, missing values and broken rules.
    """
    layers = [layer for file in files for layer in _layers(_locate(str(file), Path.cwd()))]
    layers += [(_dotted(text), f"argument {text}") for text in overrides]
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for data, source in layers:
        _merge(merged, data, "", source, origin)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
    except OmegaConfBaseException as error:
        raise HarkenError(f"cannot resolve the configuration: {error}") from error
    return Loaded(structure(RunConfig, resolved), origin)  # type: ignore[arg-type]


def from_dict(data: Mapping[str, Any]) -> RunConfig:
    """Build a RunConfig from resolved plain data, as a checkpoint keeps it."""
    return structure(RunConfig, data)


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML that `load` reads back to the same values."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def presets() -> list[str]:
    """Names of the configurations that harken ships."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def flatten(data: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return `{dotted key: value}` of nested data."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        where = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, where))
        else:
            flat[where] = value
    return flat


def _locate(name: str, folder: Path) -> Path:
    for path in (folder / name, PRESETS / f"{name}.yaml"):
        if path.is_file():
            return path
    raise HarkenError(f"no configuration file or preset `{name}`{nearest(name, presets())}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the plain data of a configuration file.

    Raises HarkenError when it cannot be read or holds no group of keys.
    """
    try:
        data = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise HarkenError(f"cannot read the configuration {path}: {error}") from error
    except YAMLError as error:
        raise HarkenError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise HarkenError(f"{path} must hold a group of keys, got {type(data).__name__}")
    return {str(key): value for key, value in data.items()}


def _layers(path: Path) -> list[tuple[dict[str, Any], str]]:
    data = read_yaml(path)
    base = data.pop("base", [])
    names = [base] if isinstance(base, str) else list(base)
    layers = [layer for name in names for layer in _layers(_locate(name, path.parent))]
    return [*layers, (data, str(path))]


def _dotted(text: str) -> dict[str, Any]:
    if "=" not in text:
        raise HarkenError(f"an override is `key=value`, got `{text}`")
    try:
        data = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except (YAMLError, OmegaConfBaseException) as error:
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        raise HarkenError(f"the value of an override must be YAML, got `{text}`: {why}") from error
    if not isinstance(data, dict):
        raise HarkenError(f"an override is `key=value`, got `{text}`")
    return {str(key): value for key, value in data.items()}


def _merge(target: dict[str, Any], data: Mapping[str, Any], path: str, source: str, origin: dict[str, str]) -> None:
    if path in SLOTS and "name" in data and data["name"] != target.get("name", data["name"]):
        # another part has other keys: what was said of the old one does not carry over
        target.clear()
        for known in [key for key in origin if key.startswith(f"{path}.")]:
            del origin[known]
    for name, value in data.items():
        where = f"{path}.{name}" if path else name
        if isinstance(value, Mapping) and isinstance(target.get(name, {}), dict):
            _merge(target.setdefault(name, {}), value, where, source, origin)
        else:
            target[name] = value
            origin[where] = source
