"""`batch.max_seconds: auto`: limits from the cache of a run, or measured and put there."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from harken.config.schema import RunConfig
from harken.core import distributed
from harken.core.errors import HarkenError
from harken.core.files import write_json_atomic
from harken.data.limits import Limits
from harken.data.loader import TrainLoader
from harken.engine.deepspeed import DeepSpeedEngine
from harken.engine.kept import kept
from harken.engine.memory import device_gib
from harken.optim.ema import WeightAverage
from harken.train.checkpoint import versions
from harken.train.log import say
from harken.train.tune import Measured, Tuner, announce, limits_from, shapes, tune

CACHE = "batch_sizes.json"


@dataclass(frozen=True)
class Sizes:
    """What was measured, and the limits that follow."""

    measured: list[Measured]
    limits: Limits


def find_sizes(
    config: RunConfig, folder: Path | None, engine: DeepSpeedEngine, average: WeightAverage | None, loader: TrainLoader
) -> Sizes:
    """Return the limits of this model on this device: from the folder's cache, else measured; every rank calls it.

    Weights, optimiser and average are afterwards as they were.
    Raises HarkenError when a cut that is trained on does not fit alone, and for ZeRO 3.
    """
    if config.engine.zero_stage == 3:
        raise HarkenError(
            "`batch.max_seconds: auto` needs `engine.zero_stage` 0, 1 or 2, got 3: a pass of stage 3 that runs out of "
            "memory cannot be taken up; measure with stage 2, which `harken tune-batch` does, and give the numbers"
        )
    texts = config.objective.whole_cuts
    found = shapes(loader, texts=texts)
    gib = config.batch.memory_gib or min(distributed.gather([device_gib()]))
    key = _key(config, gib, [asdict(shape) for shape in found])
    measured = _read(folder, key)
    if not measured:
        say(f"measuring which batches fit in {config.batch.memory_share:g} of {gib:.2f} GiB, {len(found)} shapes")
        most = config.batch.seconds_per_step / distributed.world_size()
        tuner = Tuner(engine, average, loader, config.seed, most)
        with kept(engine, average):
            measured = [announce(one) for one in tune(tuner, found, gib * config.batch.memory_share)]
        _write(folder, key, measured)
    longest = float(loader.selection.seconds.max())
    return Sizes(measured, limits_from(measured, config.batch, longest, texts=texts))


def _key(config: RunConfig, gib: float, found: list[dict[str, Any]]) -> str:
    """Return a hash of all that decides how much memory a batch takes, and how much there is."""
    device = distributed.device()
    about = {
        "parts": {name: asdict(getattr(config, name)) for name in ("frontend", "encoder", "objective", "optimizer")},
        "batch": [config.batch.seconds_per_step, config.batch.memory_share],
        "engine": asdict(config.engine),
        "average": bool(config.train.ema_decay),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        # what is free on a machine is never twice the same; what was given is
        "memory": round(gib, 2) if device.type == "cuda" or config.batch.memory_gib else round(gib),
        "processes": distributed.world_size(),
        "versions": versions(),
        "shapes": found,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def _read(folder: Path | None, key: str) -> list[Measured]:
    text = ""
    if distributed.is_main() and folder is not None and (folder / CACHE).is_file():
        cache = json.loads((folder / CACHE).read_text(encoding="utf-8"))
        if cache["key"] == key:
            say(f"batch sizes as measured before, in {folder / CACHE}")
            text = json.dumps(cache["measured"])
    text = distributed.broadcast_text(text)
    return [Measured(**one) for one in json.loads(text)] if text else []


def _write(folder: Path | None, key: str, measured: list[Measured]) -> None:
    if distributed.is_main() and folder is not None:
        write_json_atomic(folder / CACHE, {"key": key, "measured": [asdict(one) for one in measured]})
