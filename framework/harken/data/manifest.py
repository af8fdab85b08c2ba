"""Indexed manifests: Lhotse cuts as plain JSONL with a memory-mapped index beside them (`harken.data.index`).

Opening and seeking read no line, so that they cost the same for any number of cuts, and processes share the pages.

Every rank and worker opens the manifest for itself: reads leave no position behind, so that a forked worker and its
parent cannot move each other's, and the first of several processes that miss the index writes it for all.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harken.core.errors import HarkenError
from harken.core.files import sha256_file
from harken.data.index import build_index, index_folder, is_current

if TYPE_CHECKING:
    from lhotse.cut import Cut


class Manifest:
    """A manifest opened through its index."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise HarkenError(f"no manifest at {self.path}; `harken data scan` makes one from audio files")
        self.card: dict[str, Any] = self._read_card()
        self._stream: FileIO | None = None

    @classmethod
    def filled(cls, path: str | Path) -> Manifest:
        """Open a manifest that must hold cuts.

        Raises HarkenError naming the file when it holds none.
        """
        manifest = cls(path)
        if not len(manifest):
            raise HarkenError(
                f"{manifest.path} holds no cuts, and at least one is needed: make it anew with `harken data scan`"
            )
        return manifest

    def _read_card(self) -> dict[str, Any]:
        path = index_folder(self.path) / "card.json"
        if not path.is_file():
            build_index(self.path, replace=False)
        card = self._unchanged(path)
        if not is_current(self.path):
            print(f"{self.path}: its index is an older one without all columns: indexing again", file=sys.stderr)
            build_index(self.path, replace=False)
            card = self._unchanged(path)
        return card

    def _unchanged(self, path: Path) -> dict[str, Any]:
        """Return the card at `path`; raise HarkenError when the manifest is not what was indexed."""
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found, again = self.path.stat(), f"run `harken data index {self.path}`"
        if card["bytes"] != found.st_size:
            raise HarkenError(
                f"{self.path} changed after it was indexed ({card['bytes']} bytes then, {found.st_size} now): {again}"
            )
        if found.st_mtime_ns >= path.stat().st_mtime_ns:  # copied, or edited without a change of its size
            if card["sha256"] != sha256_file(self.path):
                raise HarkenError(f"{self.path} changed after it was indexed (same size, other content): {again}")
            with suppress(OSError):  # the next to open it need not read it; a folder that is read-only is no harm
                os.utime(path)
        return card

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "card": self.card, "_stream": None}

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Byte offset of each line, and of the end, `(N + 1,)`."""
        return self._column("offsets")

    @cached_property
    def seconds(self) -> NDArray[np.float32]:
        """Duration of each cut, `(N,)`."""
        return self._column("seconds")

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        """`harken.core.draws.key` of each cut's id, `(N,)`."""
        return self._column("hashes")

    @cached_property
    def characters(self) -> NDArray[np.uint32]:
        """Characters of each cut's text, `(N,)`; 0 where it has none."""
        return self._column("characters")

    def _column(self, name: str) -> NDArray[Any]:
        path = index_folder(self.path) / f"{name}.npy"
        try:
            column: NDArray[Any] = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise HarkenError(f"{path} cannot be read ({error}): run `harken data index {self.path}`") from error
        return column

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def line(self, place: int) -> dict[str, Any]:
        """Return the plain data of the cut at a place."""
        if self._stream is None:
            self._stream = self.path.open("rb", buffering=0)
        start, end = int(self.offsets[place]), int(self.offsets[place + 1])
        raw = os.pread(self._stream.fileno(), end - start, start)
        data: dict[str, Any] = json.loads(raw)
        return data

    def __getitem__(self, place: int) -> Cut:
        """Return the Lhotse cut at a place."""
        from lhotse.serialization import deserialize_item

        cut: Cut = deserialize_item(self.line(place))
        return cut

    def __iter__(self) -> Iterator[Cut]:
        return (self[place] for place in range(len(self)))
