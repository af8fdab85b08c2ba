"""Indexed manifests: Lhotse cuts as plain JSONL with a memory-mapped index beside them.

`train.jsonl` has the sidecar `train.jsonl.idx/`: `offsets.npy` (byte offset of each line, and the end), `seconds.npy`
(duration of each cut) and `card.json` (size and checksum of the manifest). Opening and seeking read no line.

Every rank and worker opens the manifest for itself: reads leave no position behind, so that a forked worker and its
parent cannot move each other's, and the first of several processes that miss the index writes it for all.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harken.core.errors import HarkenError
from harken.core.files import atomic_folder, remove, sha256_file, sync

if TYPE_CHECKING:
    from lhotse.cut import Cut

INDEX_FILES = ("card.json", "offsets.npy", "seconds.npy")


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
        offsets: NDArray[np.int64] = np.load(index_folder(self.path) / "offsets.npy", mmap_mode="r")
        return offsets

    @cached_property
    def seconds(self) -> NDArray[np.float32]:
        """Duration of each cut, `(N,)`."""
        seconds: NDArray[np.float32] = np.load(index_folder(self.path) / "seconds.npy", mmap_mode="r")
        return seconds

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


def index_folder(path: Path) -> Path:
    """Return the folder of a manifest's index."""
    return path.with_name(path.name + ".idx")


def build_index(path: str | Path, *, replace: bool = True) -> int:
    """Index a manifest and return its number of cuts.

    replace: otherwise an index that another process has written meanwhile is left as it is.
    Raises HarkenError naming the line that is not a cut with an id and a duration, or whose id was there before.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise HarkenError(
            f"a manifest is plain JSONL so that it can be read at any line, got {path}; decompress it first"
        )
    try:
        offsets, seconds = _read_lines(path)
        if replace:
            with atomic_folder(index_folder(path), kind="index of a manifest", files=INDEX_FILES) as folder:
                _write_index(folder, path, offsets, seconds)
        else:
            _write_first(path, offsets, seconds)
    except OSError as error:
        raise HarkenError(f"cannot index {path}: {error}") from error
    return len(seconds)


def _read_lines(path: Path) -> tuple[list[int], list[float]]:
    """Return the byte offset of each line and of the end, and the seconds of each cut."""
    offsets, seconds, seen = [0], [], set()
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                data = json.loads(raw)
                cut_id, duration = str(data["id"]), float(data["duration"])
            except (ValueError, KeyError, TypeError) as error:
                raise HarkenError(
                    f"{path} line {number} is not a Lhotse cut with `id` and `duration`: {error!r}"
                ) from error
            if not 0 < duration < math.inf:
                raise HarkenError(f"{path} line {number}: `duration` must be positive seconds, got {duration}")
            if cut_id in seen:
                raise HarkenError(
                    f"{path} line {number}: cut id `{cut_id}` occurs twice; draws and labels are keyed by id"
                )
            seen.add(cut_id)
            seconds.append(duration)
            offsets.append(offsets[-1] + len(raw))
    return offsets, seconds


def _write_index(folder: Path, path: Path, offsets: list[int], seconds: list[float]) -> None:
    np.save(folder / "offsets.npy", np.asarray(offsets, dtype=np.int64))
    np.save(folder / "seconds.npy", np.asarray(seconds, dtype=np.float32))
    card = {
        "cuts": len(seconds),
        "hours": sum(seconds) / 3600,
        "bytes": offsets[-1],
        "sha256": sha256_file(path),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _write_first(path: Path, offsets: list[int], seconds: list[float]) -> None:
    """Write the index unless one is there when this one is finished: a folder never takes the name of a full one."""
    folder = index_folder(path)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir()
        _write_index(temporary, path, offsets, seconds)
        sync(temporary)
        with suppress(OSError):
            temporary.rename(folder)
        if not (folder / "card.json").is_file():
            raise OSError(f"{folder} is there and is no index: remove it")
    finally:
        remove(temporary)
