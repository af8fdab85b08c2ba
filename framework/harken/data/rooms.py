"""Simulated rooms: impulse responses of boxes by image sources, and their manifest."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.core.files import atomic_folder
from harken.data.parallel import in_parallel
from harken.data.read import Samples
from harken.data.reverberation import direct_sound
from harken.data.scan import scan

# ranges that living rooms, offices and small halls fall into; harken's choice
LENGTH, HEIGHT = (3.0, 10.0), (2.5, 4.0)  # metres
SECONDS = (0.2, 0.8)  # of the reverberation time, in which sound falls by 60 dB
APART = 0.5  # metres from any wall, and between speaker and microphone, at least


def simulate(out: Path, count: int, *, seed: int = 1, sample_rate: int = 16000, jobs: int | None = None) -> float:
    """Write `count` impulse responses into `NAME.audio/` and their manifest `NAME.jsonl`, which is `out`.

    A response follows from (seed, its number). jobs: see `in_parallel`. Returns their mean length in seconds.
    Raises HarkenError without pyroomacoustics, or where `out` cannot be written.
    """
    if out.suffix != ".jsonl" or count < 1:
        raise HarkenError(f"--out must end in .jsonl and --count be at least 1, got {out} and {count}")
    _package()
    names = [f"room-{number:05d}.wav" for number in range(count)]
    with atomic_folder(out.with_suffix(".audio"), kind="simulated rooms", files=names) as folder:
        work = partial(_write, folder=folder, seed=seed, sample_rate=sample_rate)
        seconds = sum(in_parallel(work, names, jobs=jobs, what="rooms"))
    scan(out.with_suffix(".audio"), out)
    return seconds / count


def _write(name: str, *, folder: Path, seed: int, sample_rate: int) -> float:
    import soundfile

    response = simulated(name, seed, sample_rate)
    soundfile.write(folder / name, response, sample_rate, subtype="FLOAT")
    return len(response) / sample_rate


def simulated(name: str, seed: int, sample_rate: int) -> Samples:
    """Return the impulse response `(R,)` of a drawn room from a drawn place to another, cut off where it fell by 60 dB.

    Source: the image-source model, Allen and Berkley 1979, by pyroomacoustics; walls by Sabine's formula.
    """
    rooms, rng = _package(), Draws(seed, 0).generator("room", name)
    size = np.array([*rng.uniform(*LENGTH, 2), rng.uniform(*HEIGHT)])
    seconds = float(rng.uniform(*SECONDS))
    speaker, microphone = _places(size, rng)
    absorption, order = rooms.inverse_sabine(seconds, size)
    room = rooms.ShoeBox(size, fs=sample_rate, materials=rooms.Material(absorption), max_order=order)
    room.add_source(speaker)
    room.add_microphone(microphone)
    room.compute_rir()
    response: Samples = np.asarray(room.rir[0][0], dtype=np.float32)
    return response[: direct_sound(response) + int(seconds * sample_rate)]


def _places(size: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw two places `(2, 3)` in metres, away from the walls and from each other."""
    while True:
        places = rng.uniform(APART, size - APART, (2, 3))
        if np.linalg.norm(places[0] - places[1]) >= APART:
            return places


def _package() -> Any:
    try:
        package = importlib.import_module("pyroomacoustics")
    except ImportError as error:
        raise HarkenError(
            f"simulating rooms needs pyroomacoustics, which does not import ({error}); "
            "`pip install pyroomacoustics` brings it"
        ) from error
    package.constants.set("num_threads", 1)  # processes share the cores
    return package
