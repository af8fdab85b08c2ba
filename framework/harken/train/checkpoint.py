"""Checkpoints that are whole or absent: written under a temporary name, synced, checksummed, renamed.

The training thread copies what a checkpoint holds and goes on; another thread writes it. Nothing is in two of its
files, and nothing in them depends on the number of ranks or the ZeRO stage.

checkpoints/step-00001000/
    model.safetensors      plain weights, readable without DeepSpeed
    average.safetensors    their moving average, where one is kept
    optimizer.safetensors  the optimiser's state by the names of parameters
    optimizer.json         what of it is no tensor (see harken.engine.state)
    config.yaml            the resolved configuration
    state.json             step, data position, counters
    versions.json          of harken, torch, DeepSpeed, Python
    checksums.json         SHA-256 of every other file; written last
checkpoints/best.json      the best checkpoints, best first
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from harken import __version__
from harken.config.saved import (
    AVERAGE,
    CHECKPOINTS,
    CHECKSUMS,
    WEIGHTS,
    checkpoint_name,
    checkpoint_names,
    checkpoint_step,
    checksums,
    damaged,
    save_model,
)
from harken.config.schema import RunConfig
from harken.core import distributed
from harken.core.errors import HarkenError
from harken.core.files import remove, sync, write_json_atomic
from harken.engine.base import Engine
from harken.engine.state import DETAILS, OPTIMIZER, Snapshot
from harken.optim.ema import WeightAverage
from harken.train.log import say
from harken.train.state import TrainState
from harken.train.writer import Writer

CONTENTS = {WEIGHTS, AVERAGE, OPTIMIZER, DETAILS, "config.yaml", "state.json", "versions.json", CHECKSUMS}


@dataclass(frozen=True)
class Moment:
    """Copies of all that a checkpoint holds. state: see TrainState. score: of its validation."""

    snapshot: Snapshot
    average: dict[str, Tensor] | None
    state: dict[str, Any]
    score: float | None


@dataclass
class Checkpoints:
    """The checkpoints of a run: saves, finds the newest whole one, keeps the last N and the best M."""

    folder: Path
    config: RunConfig
    _writer: Writer = field(default_factory=Writer)

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
        """Copy the current step and begin to write it; every rank calls it. `score` is its validation metric.

        Waits for the checkpoint before, and raises what `wait` raises for it.
        """
        self.wait()
        snapshot = engine.snapshot()
        if snapshot is not None:
            kept = None if average is None else average.snapshot()
            self._writer.start(partial(self._write, Moment(snapshot, kept, state.to_dict(), score)))

    def wait(self) -> None:
        """Wait until what was saved is on the disk; every rank calls it.

        Raises the error that writing ended with, in the other ranks a HarkenError that quotes it.
        """
        error = self._writer.finish()
        told = distributed.broadcast_text("" if error is None else str(error) or repr(error))
        if error is not None:
            raise error
        if told:
            raise HarkenError(told)

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written, on the main process: the next `save` or `wait` raises why."""
        return self._writer.failed

    def close(self) -> None:
        """Let a run that ends by another error finish its checkpoint; what then goes wrong is only said."""
        error = self._writer.finish()
        if error is not None:
            say(f"WARNING {error}")

    def _write(self, moment: Moment) -> None:
        """Write, sync and rename a checkpoint, in the writer's thread: there are no collectives in it."""
        name = checkpoint_name(moment.state["step"])
        temporary = self.root / f".{name}.tmp"
        try:
            self._write_files(moment, temporary)
            self._put(temporary, name)
            self._rank(name, moment.score)
            self._prune(TrainState.from_dict(moment.state).sound_until())
        except (OSError, SafetensorError, HarkenError) as error:
            with suppress(OSError):  # a full disk has room for the other files of the run again
                remove(temporary)
            reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else error
            raise HarkenError(
                f"checkpoint {self.root / name} could not be written ({reason}): see that the folder is there and its "
                "disk has room; the checkpoints before it are as they were, and the same command continues from there"
            ) from error

    def _write_files(self, moment: Moment, temporary: Path) -> None:
        self.root.mkdir(exist_ok=True)  # without parents: where the run's own folder has gone, its disk has
        for leftover in self.root.glob(".step-*.tmp"):
            remove(leftover)
        temporary.mkdir()
        save_model(temporary, self.config, moment.snapshot.weights)
        if moment.average is not None:
            save_file(moment.average, temporary / AVERAGE)
        moment.snapshot.optimizer.write(temporary)
        write_json_atomic(temporary / "state.json", moment.state)
        write_json_atomic(temporary / "versions.json", versions())
        write_json_atomic(temporary / CHECKSUMS, checksums(temporary))
        sync(temporary)

    def _put(self, temporary: Path, name: str) -> None:
        target = self.root / name
        if target.is_dir() and strangers(target):  # a damaged one into which the user put something
            target.replace(self.root / f"kept-{name}-{time.time_ns()}")
        remove(target)
        temporary.replace(target)
        sync_folder(self.root)

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

    def _prune(self, sound_until: int | None) -> None:
        keep = self.config.checkpoint
        kept = set(self.names()[-keep.keep_last :]) | {entry["folder"] for entry in self._best()[: keep.keep_best]}
        if sound_until is not None:  # what an alarm that has begun to count would have the run go back to
            kept |= set([name for name in self.names() if checkpoint_step(name) <= sound_until][-1:])
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
            found = self.first_whole(reversed(self.names())) or ("!" if self.names() else "")
        found = distributed.broadcast_text(found)
        if found == "!":
            raise HarkenError(
                f"every checkpoint in {self.root} is damaged; move the folder away to start from the beginning"
            )
        return self.root / found if found else None

    def first_whole(self, names: Iterable[str], damage_of: Callable[[Path], str | None] = damaged) -> str:
        """Return the first of some checkpoints without damage, "" when all have some, saying aloud what is passed over.

        damage_of: what is wrong with a checkpoint's folder, None for a whole one.
        """
        for name in names:
            damage = damage_of(self.root / name)
            if damage is None:
                return name
            say(f"WARNING checkpoint {self.root / name} is damaged ({damage}): trying the one before it")
        return ""

    def state(self, path: Path) -> TrainState:
        """Return the counters of a checkpoint."""
        return TrainState.from_dict(json.loads((path / "state.json").read_text()))

    def load(self, path: Path, engine: Engine, average: WeightAverage | None) -> None:
        """Load weights, optimiser and average of a checkpoint; every rank calls it."""
        engine.restore(path)
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
