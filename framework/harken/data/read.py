"""Audio of a cut as samples: one channel, one rate, no surprise."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from harken.core import progress

if TYPE_CHECKING:
    from lhotse.cut import Cut

Samples = NDArray[np.float32]


class UnreadableAudioError(Exception):
    """The audio of a cut cannot be decoded or holds no finite samples; the loader replaces the cut."""


def read_cut(cut: Cut, sample_rate: int) -> Samples:
    """Return the samples `(S,)` of a cut in [-1, 1]: channels averaged, resampled to `sample_rate`.

    Raises UnreadableAudioError, naming the cut and its file.
    """
    _prepare_lhotse()
    file = _file(cut)
    named = f"cut `{cut.id}` ({file or 'no file'})"
    try:
        with progress.reading(f"{file or 'no file'} (cut `{cut.id}`)"):
            audio = cut.load_audio()
    except Exception as error:  # every backend of Lhotse raises its own kinds; all mean the same here
        raise UnreadableAudioError(f"{named} cannot be read: {reason(error, Path(file) if file else None)}") from error
    if audio is None or audio.size == 0:
        raise UnreadableAudioError(f"{named} holds no samples")
    samples: Samples = audio[0] if len(audio) == 1 else audio.mean(axis=0, dtype=np.float32)
    if not np.isfinite(samples).all():
        raise UnreadableAudioError(f"{named} holds samples that are not finite")
    return resample(samples, cut.sampling_rate, sample_rate)


def resample(samples: Samples, source_rate: float, target_rate: float) -> Samples:
    """Resample with soxr's high-quality filter."""
    if source_rate == target_rate:
        return samples
    import soxr

    result: Samples = soxr.resample(samples, source_rate, target_rate, quality="HQ")
    return result


def reason(error: Exception, path: Path | None) -> str:
    """Return in one line why a file cannot be read: Lhotse's message has a paragraph for each backend it tried."""
    try:
        size = path.stat().st_size if path is not None else None
    except OSError as missing:
        return str(missing.strerror).lower()
    if size == 0:
        return "empty file (0 bytes)"
    found = re.search(r"Exception #0 \(<class '[^']*'>\): <class '[^']*'>: (.*)", str(error))
    words = " ".join((found.group(1) if found else str(error)).split())
    # libsndfile's own words, without the path that is named beside them
    return (re.sub(r"^(Error opening .*?: |Error : )", "", words) or repr(error))[:300]


@functools.cache
def _prepare_lhotse() -> None:
    from harken.data.backend import use_soundfile_first

    use_soundfile_first()


def _file(cut: Cut) -> str | None:
    sources = getattr(getattr(cut, "recording", None), "sources", None)
    return str(sources[0].source) if sources and sources[0].type == "file" else None
