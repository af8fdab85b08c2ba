"""Saved models as plain folders: `config.yaml` and `model.safetensors`, readable without DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harken.config.load import from_dict, read_yaml, to_yaml
from harken.config.schema import RunConfig
from harken.core.errors import HarkenError
from harken.core.files import write_text_atomic

CHECKPOINTS = "checkpoints"
WEIGHTS = "model.safetensors"


def find_model(path: str | Path) -> Path:
    """Return the folder that holds weights: `path` itself, or the best (else the newest) checkpoint of an experiment.

    Raises HarkenError when there is none.
    """
    path = Path(path)
    if (path / WEIGHTS).is_file():
        return path
    ranking = path / CHECKPOINTS / "best.json"
    try:
        best: list[str] = [entry["folder"] for entry in json.loads(ranking.read_text())] if ranking.is_file() else []
    except (ValueError, KeyError, TypeError) as error:
        raise HarkenError(
            f"{ranking} is no list of checkpoints ({error!r}): remove it, or name a checkpoint's folder"
        ) from error
    newest = sorted((folder.name for folder in (path / CHECKPOINTS).glob("step-*")), reverse=True)
    for name in [*best, *newest]:
        if (path / CHECKPOINTS / name / WEIGHTS).is_file():
            return path / CHECKPOINTS / name
    raise HarkenError(f"no model at {path}: expected `{WEIGHTS}` in it, or checkpoints of a run in `{CHECKPOINTS}/`")


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
    """Read the weights of a saved model onto the CPU.

    Raises HarkenError for a missing or damaged file.
    """
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise HarkenError(f"cannot read the weights {folder / WEIGHTS}: {error}") from error


def load_into(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Load weights whose names and shapes must all match.

    Raises HarkenError listing what is missing, left over, or of another shape.
    """
    own = model.state_dict()
    wrong = [f"missing `{name}`" for name in own if name not in weights]
    wrong += [f"unknown `{name}`" for name in weights if name not in own]
    wrong += [
        f"`{name}` has shape {tuple(weights[name].shape)}, expected {tuple(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if wrong:
        raise HarkenError(
            f"the weights in {source} do not fit the model: "
            + "; ".join(wrong[:5])
            + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        )
    model.load_state_dict(dict(weights))


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
