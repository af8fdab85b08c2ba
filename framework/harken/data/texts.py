"""How long the texts of a manifest's cuts are: what some objectives' memory depends on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from harken.data.manifest import Manifest
from harken.data.mixture import Joined


def characters(manifest: Manifest | Joined) -> NDArray[np.int32]:
    """Return `(N,)` characters of each cut's text, spaces between its supervisions included; 0 without a text.

    From the index where it has them, else every line is read once.
    """
    known = getattr(manifest, "characters", None)
    if known is not None:
        return np.asarray(known, dtype=np.int32)
    return np.fromiter((len(_text(manifest, place)) for place in range(len(manifest))), np.int32, len(manifest))


def _text(manifest: Manifest | Joined, place: int) -> str:
    parts = (part.get("text") or "" for part in manifest.line(place).get("supervisions", ()))
    return " ".join(text.strip() for text in parts if text)
