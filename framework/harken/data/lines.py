"""What the plain data of a manifest's line says, without building Lhotse's objects from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def supervisions_of(line: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the supervisions of a cut as plain data; those of a mixed cut are its tracks'."""
    yield from line.get("supervisions") or ()
    for track in line.get("tracks") or ():
        yield from track.get("cut", {}).get("supervisions") or ()


def text_of(line: Mapping[str, Any]) -> str:
    """Return the text of a cut as training sees it: its supervisions', joined with spaces."""
    return " ".join(part["text"].strip() for part in supervisions_of(line) if part.get("text"))


def recordings_of(line: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the recordings of a cut as plain data; those of a mixed cut are its tracks'."""
    parts = [line, *(track.get("cut", {}) for track in line.get("tracks") or ())]
    yield from (part["recording"] for part in parts if part.get("recording"))
