"""Checkpoints that are whole or absent: written under a temporary name, synced, checksummed, renamed.

checkpoints/step-00001000/
    model.safetensors    plain weights, readable without DeepSpeed
    average.safetensors  their moving average, where one is kept
    config.yaml          the resolved configuration
    state.json           step, data position, counters
    engine/              DeepSpeed's shards: optimiser state
    versions.json        of harken, torch, DeepSpeed, Python
    checksums.json       SHA-256 of every other file; written last
checkpoints/best.json    the best checkpoints, best first
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from harken import __version__
from harken.config.saved import (
    AVERAGE,
    CHECKPOINTS,
    CHECKSUMS,
    WEIGHTS,
    checkpoint_names,
    checksums,
    damaged,
    save_model,
)
from harken.config.schema import RunConfig
from harken.core import distributed
from harken.core.errors import HarkenError
from harken.core.files import remove, sync, write_json_atomic
from harken.engine.base import Engine
from harken.optim.ema import WeightAverage
from harken.train.log import say
from harken.train.state import TrainState

CONTENTS = {"engine", WEIGHTS, AVERAGE, "config.yaml", "state.json", "versions.json", CHECKSUMS}


@dataclass
class Checkpoints:
    """The checkpoints of a run: saves, finds the newest whole one, keeps the last N and the best M."""

    folder: Path
    config: RunConfig

    @property
    def root(self) -> Path:
        """The folder that holds them."""
        return self.folder / CHECKPOINTS

    def names(self) -> list[str]:
        """Names of the checkpoints, oldest first."""
        return checkpoint_names(self.root)

    def save(
        self, engine: Engine, state: TrainState, average: WeightAverage | None, score: float | None = None
    ) -> None:
        """Write a checkpoint of the current step; every rank calls it. `score` is its validation metric."""
        name = f"step-{state.step:08d}"
        target, temporary = self.root / name, self.root / f".{name}.tmp"
        if distributed.is_main():
            self.root.mkdir(parents=True, exist_ok=True)
            for leftover in self.root.glob(".step-*.tmp"):
                remove(leftover)
            temporary.mkdir()
        distributed.barrier()
        engine.save(temporary / "engine")
        weights = engine.weights()
        distributed.barrier()
        if distributed.is_main():
            save_model(temporary, self.config, weights)
            if average is not None:
                save_file(average.state_dict(), temporary / AVERAGE)
            write_json_atomic(temporary / "state.json", state.to_dict())
            write_json_atomic(temporary / "versions.json", versions())
            write_json_atomic(temporary / CHECKSUMS, checksums(temporary))
            sync(temporary)
            if target.is_dir() and strangers(target):  # a damaged one into which the user put something
                target.replace(self.root / f"kept-{name}-{time.time_ns()}")
            remove(target)
            temporary.replace(target)
            sync_folder(self.root)
            self._rank(name, score)
            self._prune()
        distributed.barrier()

    def _rank(self, name: str, score: float | None) -> None:
        entries = [entry for entry in self._best() if entry["folder"] != name]
        if score is not None and math.isfinite(score):  # NaN has no place in an order, and nothing wrong is best
            entries.append({"folder": name, "score": score, "metric": self.config.checkpoint.metric})
        entries.sort(key=lambda entry: entry["score"], reverse=self.config.checkpoint.higher_is_better)
        write_json_atomic(self.root / "best.json", entries[: max(1, self.config.checkpoint.keep_best)])

    def _best(self) -> list[dict[str, Any]]:
        path = self.root / "best.json"
        if not path.is_file():
            return []
        entries: list[dict[str, Any]] = json.loads(path.read_text())
        return [entry for entry in entries if (self.root / entry["folder"]).is_dir()]

    def _prune(self) -> None:
        keep = self.config.checkpoint
        kept = set(self.names()[-keep.keep_last :]) | {entry["folder"] for entry in self._best()[: keep.keep_best]}
        for name in self.names():
            if name not in kept:
                strange = strangers(self.root / name)
                if strange:
                    say(f"WARNING checkpoint {self.root / name} is kept: `{strange[0]}` in it is none of harken's")
                else:
                    remove(self.root / name)

    def newest(self) -> Path | None:
        """Return the newest whole checkpoint, saying aloud which damaged ones were passed over; same on every rank."""
        found = ""
        if distributed.is_main():
            for name in reversed(self.names()):
                damage = damaged(self.root / name)
                if damage is None:
                    found = name
                    break
                say(f"WARNING checkpoint {self.root / name} is damaged ({damage}): trying the one before it")
            else:
                if self.names():
                    found = "!"
        found = distributed.broadcast_text(found)
        if found == "!":
            raise HarkenError(
                f"every checkpoint in {self.root} is damaged; move the folder away to start from the beginning"
            )
        return self.root / found if found else None

    def state(self, path: Path) -> TrainState:
        """Return the counters of a checkpoint."""
        return TrainState.from_dict(json.loads((path / "state.json").read_text()))

    def load(self, path: Path, engine: Engine, average: WeightAverage | None) -> None:
        """Load weights, optimiser and average of a checkpoint; every rank calls it."""
        engine.load(path / "engine")
        if average is not None and (path / AVERAGE).is_file():
            average.load_state_dict(load_file(path / AVERAGE))


def strangers(folder: Path) -> list[str]:
    """Return what a checkpoint's folder holds that harken did not write: nothing that the user put there is removed."""
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in CONTENTS)


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entry to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    import deepspeed
    import lhotse
    import torch

    return {
        "harken": __version__,
        "torch": str(torch.__version__),
        "deepspeed": str(deepspeed.__version__),
        "lhotse": str(lhotse.__version__),
        "python": platform.python_version(),
    }
