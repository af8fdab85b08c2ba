"""What continuing a run needs of an optimiser, by parameters' names: the same for every ZeRO stage and rank count.

optimizer.safetensors    `KEY/PARAMETER`: shaped as the parameter, or a single number
optimizer.json           {optimizer: the name of its class, loss_scaler: of fp16, counters: of the engine, parameters:
                         {PARAMETER: {tensors: [KEY], numbers: {KEY: number}, group: {KEY: number}}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from harken.core.errors import HarkenError
from harken.core.files import write_json_atomic

OPTIMIZER = "optimizer.safetensors"
DETAILS = "optimizer.json"
Number = bool | int | float
START_ANEW = "start another `--exp` from its weights with `train.init_from`"


@dataclass(frozen=True)
class OptimizerState:
    """The state of a torch optimiser, whole, in host memory.

    optimizer: the name of its class. tensors: {parameter: {key: tensor}}, each shaped as the parameter, or without an
    axis (a step count). numbers: {parameter: {key: number}}. groups: {parameter: {key: number}}, what the optimiser
    itself has changed in the group that holds the parameter; what the configuration says is not among it.
    loss_scaler: of fp16, else empty. counters: of the engine.
    """

    optimizer: str
    tensors: dict[str, dict[str, Tensor]]
    numbers: dict[str, dict[str, Number]]
    groups: dict[str, dict[str, Number]]
    loss_scaler: dict[str, Number]
    counters: dict[str, int]

    def write(self, folder: Path) -> None:
        """Write `optimizer.safetensors` and `optimizer.json` into a folder."""
        flat = {f"{key}/{name}": value for name, state in self.tensors.items() for key, value in state.items()}
        save_file(flat, folder / OPTIMIZER)
        parameters = {
            name: {"tensors": list(state), "numbers": self.numbers[name], "group": self.groups[name]}
            for name, state in self.tensors.items()
        }
        details = {
            "optimizer": self.optimizer,
            "loss_scaler": self.loss_scaler,
            "counters": self.counters,
            "parameters": parameters,
        }
        write_json_atomic(folder / DETAILS, details)


@dataclass(frozen=True)
class Snapshot:
    """A moment of a run: copies of all weights {name: tensor} and of the optimiser's state, in host memory."""

    weights: dict[str, Tensor]
    optimizer: OptimizerState


class SavedTensors:
    """A safetensors file of which one tensor at a time is read, so that the whole is never in memory.

    Raises HarkenError where it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = cast(Any, safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise HarkenError(f"cannot read {path}: {error}; use another checkpoint") from error
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(self._file.get_slice(name).get_shape()) for name in list(self._file.keys())
        }

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU."""
        value: Tensor = self._file.get_tensor(name)
        return value


class SavedOptimizer:
    """The optimiser's state in a checkpoint, read one tensor at a time.

    Raises HarkenError for a checkpoint that has none, and for one of a harken that wrote DeepSpeed's shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.details: dict[str, Any] = json.loads((folder / DETAILS).read_text())
        except (OSError, ValueError) as error:
            if (folder / "engine").is_dir():
                raise HarkenError(
                    f"{folder} keeps the optimiser as DeepSpeed's shards in `engine/`, which this harken does not "
                    f"read, and has no `{DETAILS}`: continue with the harken that its versions.json names, or "
                    f"{START_ANEW}"
                ) from error
            raise HarkenError(f"cannot read {folder / DETAILS}: {error}; use another checkpoint") from error
        self.parameters: dict[str, dict[str, Any]] = self.details["parameters"]
        self._tensors = SavedTensors(folder / OPTIMIZER)

    def keys(self, parameter: str) -> list[str]:
        """Return the keys of the tensors that a parameter has."""
        keys: list[str] = self.parameters[parameter]["tensors"]
        return keys

    def read(self, key: str, parameter: str) -> Tensor:
        """Return a tensor of a parameter's state, on the CPU."""
        return self._tensors.read(f"{key}/{parameter}")

    @cached_property
    def shaped(self) -> frozenset[str]:
        """The keys whose tensors are shaped as their parameters; others hold one number."""
        return frozenset(name.partition("/")[0] for name, shape in self._tensors.shapes.items() if shape)

    def check(self, optimizer: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise HarkenError unless this is the state of this optimiser and of exactly these parameters."""
        if self.details["optimizer"] != optimizer:
            raise HarkenError(
                f"{self.folder} holds the state of the optimiser {self.details['optimizer']}, and this run has "
                f"{optimizer}: give the old `optimizer`, or {START_ANEW}"
            )
        for name in [*shapes, *self.parameters]:
            if name not in self.parameters or name not in shapes:
                now, then = ("is", "was not") if name in shapes else ("is not", "was")
                raise HarkenError(
                    f"`{name}` {now} trained by this run and {then} in {self.folder}: "
                    f"train the same parameters (freezing is a setting of `objective`), or {START_ANEW}"
                )
            for key in self.keys(name):
                expected = shapes[name] if key in self.shaped else ()
                found = self._tensors.shapes.get(f"{key}/{name}")
                if found != expected:
                    raise HarkenError(
                        f"the optimiser's `{key}` of `{name}` in {self.folder} must have shape {expected}, found "
                        f"{'none' if found is None else found}: use another checkpoint"
                    )

    def check_shared(self, parameters: Sequence[str]) -> None:
        """Raise HarkenError where parameters that share a partition's one step count do not have the same."""
        first, expected = parameters[0], self._single(parameters[0])
        for name in parameters[1:]:
            found = self._single(name)
            if found != expected:
                raise HarkenError(
                    f"the optimiser's state of `{name}` in {self.folder} has {found}, and that of `{first}` "
                    f"{expected}: ZeRO keeps one for both, so continue with `engine.zero_stage: 0`"
                )

    def _single(self, parameter: str) -> dict[str, Any]:
        """Return the numbers of a parameter's state; of what is shaped as the parameter, the key stands for it."""
        numbers: dict[str, Any] = self.parameters[parameter]["numbers"]
        found = {key: key if key in self.shaped else self.read(key, parameter).item() for key in self.keys(parameter)}
        return found | numbers

    def group(self, parameters: Sequence[str]) -> dict[str, Number]:
        """Return the numbers that the optimiser had changed in the group of these parameters.

        Raises HarkenError where they were of several groups with different numbers.
        """
        first: dict[str, Number] = self.parameters[parameters[0]]["group"]
        for name in parameters[1:]:
            if self.parameters[name]["group"] != first:
                raise HarkenError(
                    f"`{name}` and `{parameters[0]}` were in groups of their own when {self.folder} was saved, with "
                    f"{self.parameters[name]['group']} and {first}: give the old `objective` and `optimizer`, or "
                    f"{START_ANEW}"
                )
        return first


def single(value: Tensor, like: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return a state of one number on the device where torch's optimisers keep it for a parameter `like`."""
    on_device = group.get("fused") or group.get("capturable")
    return value.clone().to(like.device if on_device else torch.device("cpu"))
