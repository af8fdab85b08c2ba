"""Speech entries of `queen.1c` as 16 kHz FLAC files, decoded and checked in parallel processes."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from harken.core.files import atomic_path

RATE = 16000
MIN_SECONDS = 0.3
MAX_PEAK = 0.999  # of full scale
MIN_PEAK = 1e-3  # of full scale: below this an entry is silent
LINES_EVERY = 1000


@dataclass(frozen=True, kw_only=True)
class Job:
    """One speech entry: its identifier and its place in the data file."""

    id: str
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Sound:
    """What became of one entry: a FLAC file of `samples` samples at 16 kHz, or the reason why there is none."""

    id: str
    samples: int = 0
    overshoots: bool = False  # the decoder went above full scale, the file does not
    reason: str = ""
    kept: bool = False  # the file was there from an earlier run


def sound_id(key: str) -> str:
    """Return the identifier of a speech entry: its name in lower case with nothing but letters, digits and `_`."""
    return re.sub(r"[^a-z0-9_]", "-", key.lower())


def flac_path(folder: Path, identifier: str) -> Path:
    """Return where the FLAC file of an identifier lies below `folder`."""
    return folder / identifier[:2] / f"{identifier}.flac"


def extract(job: Job, *, data_file: Path, folder: Path, force: bool) -> Sound:
    """Decode, check, resample and write one entry; an entry that fails is returned with its reason, never raised."""
    with data_file.open("rb") as stream:
        stream.seek(job.offset)
        blob = stream.read(job.size)
    try:
        wave, rate = soundfile.read(io.BytesIO(blob), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        return Sound(id=job.id, reason=f"unreadable: {error}")
    mono = wave.mean(axis=1)
    if not np.isfinite(mono).all():
        return Sound(id=job.id, reason="not finite")
    peak = float(np.abs(mono).max(initial=0.0))
    if len(mono) < MIN_SECONDS * rate:
        return Sound(id=job.id, reason=f"shorter than {MIN_SECONDS} s")
    if peak < MIN_PEAK:
        return Sound(id=job.id, reason="silent")
    overshoots = peak > MAX_PEAK
    path = flac_path(folder, job.id)
    samples = 0 if force else existing_samples(path, len(mono) * RATE / rate)
    if samples:
        return Sound(id=job.id, samples=samples, overshoots=overshoots, kept=True)
    resampled = soxr.resample(mono, rate, RATE, quality="HQ")
    # MP3 decoding overshoots full scale in a quarter of the entries: those are turned down, since clipping distorts.
    resampled *= min(1.0, MAX_PEAK / float(np.abs(resampled).max()))
    with atomic_path(path) as temporary:
        soundfile.write(temporary, resampled, RATE, subtype="PCM_16", format="FLAC")
    return Sound(id=job.id, samples=len(resampled), overshoots=overshoots)


def existing_samples(path: Path, expected: float) -> int:
    """Return the samples of a finished file from an earlier run, 0 when it is missing or of another length."""
    if not path.exists():
        return 0
    try:
        info = soundfile.info(path)
    except (soundfile.LibsndfileError, RuntimeError):
        return 0
    fits = info.samplerate == RATE and info.channels == 1 and abs(info.frames - expected) <= 2
    return int(info.frames) if fits else 0


def extract_all(jobs: Sequence[Job], *, data_file: Path, folder: Path, force: bool, processes: int) -> list[Sound]:
    """Extract every entry in `processes` processes, in the order of `jobs`."""
    for leftover in folder.glob("*/.*.tmp"):  # of a run that was killed while it wrote
        leftover.unlink()
    with ProcessPoolExecutor(max_workers=processes) as pool:
        results = pool.map(_Extract(data_file=data_file, folder=folder, force=force), jobs, chunksize=32)
        return list(progress(results, len(jobs)))


@dataclass(frozen=True, kw_only=True)
class _Extract:
    """`extract` with its arguments bound, so that a process can be sent it."""

    data_file: Path
    folder: Path
    force: bool

    def __call__(self, job: Job) -> Sound:
        return extract(job, data_file=self.data_file, folder=self.folder, force=self.force)


def progress(results: Iterator[Sound], total: int) -> Iterator[Sound]:
    """Pass results on with a bar on a terminal, with a line now and then elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(results, total=total, desc="audio", unit="file")
        return
    for done, result in enumerate(results, start=1):
        if done % LINES_EVERY == 0 or done == total:
            print(f"audio: {done} of {total} files", flush=True)
        yield result
