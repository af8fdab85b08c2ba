"""Saved models as plain folders: `config.yaml` and `model.safetensors`, readable without DeepSpeed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harken.config.load import from_dict, read_yaml, to_yaml
from harken.config.schema import RunConfig
from harken.core import distributed
from harken.core.errors import HarkenError
from harken.core.files import sha256_file, write_text_atomic

CHECKPOINTS = "checkpoints"
WEIGHTS = "model.safetensors"
AVERAGE = "average.safetensors"
CHECKSUMS = "checksums.json"
USED = (WEIGHTS, AVERAGE, "config.yaml")
"""What using a model reads of a checkpoint; the optimiser's state is twice as large."""


_NAME = re.compile(r"step-\d{8,}")  # what a user calls step-best is the user's


def checkpoint_name(step: int) -> str:
    """Return what the checkpoint of a step is called."""
    return f"step-{step:08d}"


def checkpoint_step(name: str) -> int:
    """Return the step of a checkpoint by its name."""
    return int(name.removeprefix("step-"))


def checkpoint_names(root: Path) -> list[str]:
    """Return the names of a run's checkpoints in the folder that holds them, the oldest first."""
    return sorted(path.name for path in root.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())


def find_model(path: str | Path) -> Path:
    """Return the folder that holds weights: `path` itself, or the best (else the newest) checkpoint of an experiment.

    A damaged checkpoint of an experiment is named and the next one is taken.
    Raises HarkenError when there is none, and when a damaged one was asked for by its own name.
    """
    path = Path(path)
    if (path / WEIGHTS).is_file():
        _check(path)
        return path
    root = path / CHECKPOINTS
    ranking = root / "best.json"
    try:
        best: list[str] = [entry["folder"] for entry in json.loads(ranking.read_text())] if ranking.is_file() else []
    except (ValueError, KeyError, TypeError) as error:
        raise HarkenError(
            f"{ranking} is no list of checkpoints ({error!r}): remove it, or name a checkpoint's folder"
        ) from error
    newest = reversed(checkpoint_names(root))
    there = [root / name for name in dict.fromkeys([*best, *newest]) if (root / name).is_dir()]
    if not there:
        raise HarkenError(
            f"no model at {path}: expected `{WEIGHTS}` in it, or checkpoints of a run in `{CHECKPOINTS}/`"
        )
    for folder in there:
        if intact(folder):
            return folder
    raise HarkenError(f"every checkpoint in {root} is damaged: restore a copy, or train again")


def intact(folder: Path) -> bool:
    """Whether what using a checkpoint reads is as it was written; damage is said aloud by the main process."""
    damage = damaged(folder, USED)
    if damage is not None and distributed.is_main():
        print(f"WARNING checkpoint {folder} is damaged ({damage}): trying another one", flush=True)
    return damage is None


def _check(folder: Path) -> None:
    """Raise HarkenError for a damaged checkpoint; a model that no run saved has no checksums."""
    of_a_run = (folder / CHECKSUMS).is_file() or (folder / "state.json").is_file()
    damage = damaged(folder, USED) if of_a_run else None
    if damage is not None:
        raise HarkenError(f"checkpoint {folder} is damaged ({damage}): restore a copy, or name another one")


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder but `checksums.json`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


def damaged(folder: Path, names: Sequence[str] | None = None) -> str | None:
    """Return what is wrong with a checkpoint, None when every file (of `names`) is as it was written."""
    try:
        expected: dict[str, str] = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError) as error:
        return f"no readable {CHECKSUMS}: {error}"
    for name, digest in expected.items():
        if names is not None and name not in names:
            continue
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_file(path) != digest:
            return f"{name} is not as it was written"
    return None


def save_model(folder: Path, config: RunConfig, weights: Mapping[str, Tensor]) -> None:
    """Write `config.yaml` and `model.safetensors` into an existing folder."""
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS)
    write_text_atomic(folder / "config.yaml", to_yaml(config))


def load_config(folder: Path) -> RunConfig:
    """Read the configuration of a saved model.

    Raises HarkenError when it is missing, damaged or of another version's keys.
    """
    return from_dict(read_yaml(folder / "config.yaml"))


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a saved model onto the CPU, those to use it with: averaged where the run kept an average.

    Raises HarkenError for a missing or damaged file.
    """
    weights = _read(folder / WEIGHTS)
    if not (folder / AVERAGE).is_file():
        return weights
    # only parameters are averaged: buffers are the model's own
    return weights | {name: value for name, value in _read(folder / AVERAGE).items() if name in weights}


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of the file that decides the weights `load_weights` gives."""
    return sha256_file(folder / (AVERAGE if (folder / AVERAGE).is_file() else WEIGHTS))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise HarkenError(f"cannot read the weights {path}: {error}") from error


def load_into(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Load weights whose names and shapes must all match.

    Raises HarkenError listing what is missing, left over, or of another shape.
    """
    wrong = misfits(_shapes(model.state_dict()), _shapes(weights))
    if wrong:
        raise HarkenError(f"the weights in {source} do not fit the model: {wrong}")
    model.load_state_dict(dict(weights))


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}


def misfits(own: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Return which of the shapes found are missing, left over or not those of a model, "" when they all fit."""
    wrong = [f"missing `{name}`" for name in own if name not in found]
    wrong += [f"unknown `{name}`" for name in found if name not in own]
    wrong += [
        f"`{name}` has shape {found[name]}, expected {shape}"
        for name, shape in own.items()
        if name in found and found[name] != shape
    ]
    return "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")


def average_weights(folders: Sequence[Path]) -> dict[str, Tensor]:
    """Return the mean of the weights of saved models, summed in float64.

    Raises HarkenError when there are none or their weights differ in name or shape.
    """
    if not folders:
        raise HarkenError("nothing to average: no model was found")
    total = {name: value.double() for name, value in load_weights(folders[0]).items()}
    for folder in folders[1:]:
        weights = load_weights(folder)
        if {name: value.shape for name, value in weights.items()} != {
            name: value.shape for name, value in total.items()
        }:
            raise HarkenError(
                f"{folders[0]} and {folder} hold other weights: only checkpoints of one model can be averaged"
            )
        for name, value in weights.items():
            total[name] += value
    return {name: (value / len(folders)).float() for name, value in total.items()}
