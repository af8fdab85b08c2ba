"""Lhotse's audio backend for training: libsndfile first, everything that Lhotse can read behind it.

Lhotse's default asks all of its backends about every file before it reads the file with libsndfile, and one of them
searches Python's path for torchaudio each time: a fifth of what reading short FLAC files takes (docs/LOG.md).
"""

from __future__ import annotations

import contextlib
from io import BytesIO
from pathlib import Path
from typing import Any

from lhotse.audio.backend import (
    CompositeAudioBackend,
    LibsndfileBackend,
    get_current_audio_backend,
    set_current_audio_backend,
)

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
"""For which Lhotse's default takes libsndfile too, when it can read them."""


class SoundfileFirst(CompositeAudioBackend):  # type: ignore[misc]  # Lhotse ships no types
    """Reads with libsndfile what it is made for, and the rest, or what it cannot read, as Lhotse's default does."""

    def __init__(self, backends: list[Any]) -> None:
        super().__init__(backends)
        self.soundfile = LibsndfileBackend()

    def read_audio(
        self, path_or_fd: Any, offset: float = 0.0, duration: float | None = None, *args: Any, **others: Any
    ) -> Any:
        """Return samples `(C, S)` and their rate; raises Lhotse's errors."""
        in_memory = isinstance(path_or_fd, BytesIO)
        if in_memory or (isinstance(path_or_fd, str | Path) and str(path_or_fd).lower().endswith(SUFFIXES)):
            place = path_or_fd.tell() if in_memory else 0
            with contextlib.suppress(Exception):  # Lhotse tries the others, and says what each had against the file
                return self.soundfile.read_audio(path_or_fd, offset, duration)
            if in_memory:
                path_or_fd.seek(place)
        return super().read_audio(path_or_fd, offset, duration, *args, **others)


def use_soundfile_first() -> None:
    """Have Lhotse read by libsndfile first, unless the user has chosen a backend."""
    current = get_current_audio_backend()
    if type(current) is CompositeAudioBackend:
        set_current_audio_backend(SoundfileFirst(current.backends))
