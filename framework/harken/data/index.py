"""The index of a manifest: what is asked of every cut, in columns that are memory-mapped.

`train.jsonl` has the sidecar `train.jsonl.idx/`:

    card.json       cuts, hours, size and checksum of the manifest, and the columns there are
    offsets.npy     (N + 1) int64: the byte at which each line begins, and the end
    seconds.npy     (N) float32: duration of each cut
    hashes.npy      (N) uint64: `harken.core.draws.key` of each cut's id
    characters.npy  (N) uint32: characters of each cut's text, 0 where it has none

There is no column of sources: cuts of different corpora are in different manifests.

It is built by several processes, each of which reads ranges of the manifest's bytes. A finished range is a file in
`.train.jsonl.idx.pieces/`, which a kill leaves for the next call; it is used again while the manifest is the same.
"""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import os
import sys
import uuid
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harken.core.draws import key
from harken.core.errors import HarkenError
from harken.core.files import (
    atomic_folder,
    atomic_path,
    check_replaceable,
    remove,
    sha256_file,
    sync,
    write_json_atomic,
)
from harken.data.lines import text_of
from harken.data.parallel import default_jobs, in_parallel

COLUMNS = {"offsets": np.int64, "seconds": np.float32, "hashes": np.uint64, "characters": np.uint32}
INDEX_FILES = ("card.json", *(f"{name}.npy" for name in COLUMNS))
EARLIER_FILES = ("card.json", "offsets.npy", "seconds.npy")
PIECE_BYTES = 32 << 20
"""Bytes of the manifest that are read between two savings: half a second of work, a few MB of memory."""


def index_folder(path: Path) -> Path:
    """Return the folder of a manifest's index."""
    return path.with_name(path.name + ".idx")


def is_current(path: Path) -> bool:
    """Whether a manifest has an index with all of its columns."""
    card = index_folder(path) / "card.json"
    return card.is_file() and json.loads(card.read_text(encoding="utf-8")).get("columns") == list(COLUMNS)


def build_index(path: str | Path, *, replace: bool = True, jobs: int | None = None) -> int:
    """Index a manifest and return its number of cuts.

    replace: otherwise an index that another process has written meanwhile is left as it is.
    jobs: processes; None takes one for each core where there is work for it.
    Raises HarkenError naming the line that is not a cut with an id and a duration, or whose id was there before.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise HarkenError(
            f"a manifest is plain JSONL so that it can be read at any line, got {path}; decompress it first"
        )
    try:
        with _alone(path) as alone:
            if replace or not is_current(path):
                _build(path, alone=alone, replace=replace, jobs=jobs)
        return int(json.loads((index_folder(path) / "card.json").read_text(encoding="utf-8"))["cuts"])
    except OSError as error:
        raise HarkenError(f"cannot index {path}: {error}") from error


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Let one process at a time index a manifest; yield False where the file system knows no locks.

    The manifest itself is locked, so that no file is left; `flock`, as a record lock would end with the first of this
    process's handles that is closed.
    """
    with path.open("r+b" if os.access(path, os.W_OK) else "rb") as stream:  # NFS locks only what may be written
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path} is being indexed by another process: waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def _build(path: Path, *, alone: bool, replace: bool, jobs: int | None) -> None:
    folder, before = index_folder(path), path.stat()
    if replace:  # before minutes of work
        check_replaceable(folder, kind="index of a manifest", files=_own_files(folder))
    pieces_folder = folder.with_name(f".{folder.name}.pieces" if alone else f".{folder.name}.{uuid.uuid4().hex}.pieces")
    pieces = _plan(path, before, pieces_folder)
    with ThreadPoolExecutor(1) as beside:  # hashing holds no lock of Python's: it costs no time beside the reading
        checksum = beside.submit(sha256_file, path)
        _read_pieces(path, pieces, jobs)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise HarkenError(f"{path} changed while it was indexed: run `harken data index {path}` when it is finished")

    def fill(temporary: Path) -> None:
        _merge(path, pieces, temporary, checksum.result())

    if replace or (folder / "card.json").is_file():
        with atomic_folder(folder, kind="index of a manifest", files=_own_files(folder)) as temporary:
            fill(temporary)
    else:
        _write_first(folder, fill)
    remove(pieces_folder)


def _own_files(folder: Path) -> tuple[str, ...]:
    """Return which files an index of harken's own has here: older ones have fewer columns."""
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    return EARLIER_FILES if found == set(EARLIER_FILES) else INDEX_FILES


def _write_first(folder: Path, fill: Callable[[Path], None]) -> None:
    """Write the index unless one is there when this one is finished: a folder never takes the name of a full one."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir()
        fill(temporary)
        sync(temporary)
        with suppress(OSError):
            temporary.rename(folder)
        if not (folder / "card.json").is_file():
            raise OSError(f"{folder} is there and is no index: remove it")
    finally:
        remove(temporary)


@dataclass(frozen=True)
class Piece:
    """The lines of a manifest that begin at one of the bytes from `start` to before `end`, and where they go."""

    path: Path
    start: int
    end: int
    out: Path


@dataclass(frozen=True)
class BadLine:
    """A line that is no cut: the byte at which it begins, and what is wrong with it."""

    at: int
    words: str


def _plan(path: Path, found: os.stat_result, folder: Path) -> list[Piece]:
    """Divide a manifest into pieces; those of another state of it are removed."""
    plan = {
        "bytes": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "piece_bytes": PIECE_BYTES,
        "columns": list(COLUMNS),
    }
    try:
        same = json.loads((folder / "plan.json").read_text(encoding="utf-8")) == plan
    except (OSError, ValueError):
        same = False
    if not same:
        remove(folder)
        folder.mkdir(parents=True)
        write_json_atomic(folder / "plan.json", plan)
    starts = range(0, max(1, found.st_size), PIECE_BYTES)
    return [
        Piece(path, start, min(start + PIECE_BYTES, found.st_size), folder / f"{number:06d}.npz")
        for number, start in enumerate(starts)
    ]


def _read_pieces(path: Path, pieces: list[Piece], jobs: int | None) -> None:
    """Read the pieces that are not there yet.

    Raises HarkenError for the first line that is no cut.
    """
    todo = [piece for piece in pieces if not piece.out.is_file()]
    if len(todo) < len(pieces):
        done = len(pieces) - len(todo)
        print(f"{path}: {done} of {len(pieces)} pieces of its index are there already", file=sys.stderr, flush=True)
    if multiprocessing.current_process().daemon:  # such a process may have no children
        jobs = 1
    jobs = min(jobs or default_jobs(), max(1, len(todo)))
    results = map(read_piece, todo) if len(todo) == 1 else in_parallel(read_piece, todo, jobs=jobs, what="index pieces")
    for bad in results:
        if bad is not None:
            raise HarkenError(f"{path} line {_line_number(path, bad.at)}{bad.words}")


def read_piece(piece: Piece) -> BadLine | None:
    """Write the columns of a piece's lines; return the first line that is no cut, and then nothing is written."""
    starts, seconds, hashes, characters = array("q"), array("d"), array("Q"), array("L")
    with piece.path.open("rb", buffering=1 << 20) as stream:
        if piece.start:  # the line that the piece before it ends in is that piece's
            stream.seek(piece.start - 1)
            stream.readline()
        at = stream.tell()
        while at < piece.end and (raw := stream.readline()):
            try:
                data = json.loads(raw)
                name, duration, text = str(data["id"]), float(data["duration"]), text_of(data)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                return BadLine(at, f" is not a Lhotse cut with `id` and `duration`: {error!r}")
            if not 0 < duration < math.inf:
                return BadLine(at, f": `duration` must be positive seconds, got {duration}")
            starts.append(at)
            seconds.append(duration)
            hashes.append(key(name))
            characters.append(len(text))
            at += len(raw)
    with atomic_path(piece.out) as temporary, temporary.open("wb") as out:
        np.savez(
            out,
            offsets=np.frombuffer(starts, dtype=np.int64),
            seconds=np.frombuffer(seconds, dtype=np.float64),
            hashes=np.frombuffer(hashes, dtype=np.uint64),
            characters=np.asarray(characters, dtype=np.uint32),
        )
    return None


def _line_number(path: Path, at: int) -> int:
    """Return the number, from 1, of the line that begins at a byte."""
    number = 1
    with path.open("rb") as stream:
        while at > 0 and (block := stream.read(min(at, 1 << 24))):
            number += block.count(b"\n")
            at -= len(block)
    return number


def _merge(path: Path, pieces: list[Piece], folder: Path, checksum: str) -> None:
    """Write the columns of all pieces end to end, and the card."""
    counts = []
    for piece in pieces:
        with np.load(piece.out) as part:
            counts.append(len(part["offsets"]))
    total, size = sum(counts), pieces[-1].end
    columns: dict[str, Any] = {
        name: np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(total + (name == "offsets"),)
        )
        for name, dtype in COLUMNS.items()
    }
    first, hours = 0, 0.0
    for piece, count in zip(pieces, counts, strict=True):
        with np.load(piece.out) as part:
            for name, column in columns.items():
                column[first : first + count] = part[name]
            hours += float(part["seconds"].sum()) / 3600
        first += count
    columns["offsets"][total] = size
    _refuse_twins(path, columns["offsets"], np.asarray(columns["hashes"]))
    for column in columns.values():
        column.flush()
    card = {"cuts": total, "hours": round(hours, 6), "bytes": size, "sha256": checksum, "columns": list(COLUMNS)}
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _refuse_twins(path: Path, offsets: NDArray[np.int64], hashes: NDArray[np.uint64]) -> None:
    """Raise HarkenError for the first line whose id an earlier line has: equal hashes show where to compare ids."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    later = np.sort(order[1:][ordered[1:] == ordered[:-1]])
    if not len(later):
        return

    with path.open("rb") as stream:

        def name(place: int) -> str:
            stream.seek(int(offsets[place]))
            return str(json.loads(stream.read(int(offsets[place + 1] - offsets[place])))["id"])

        for place in later.tolist():
            found = name(place)
            low, high = np.searchsorted(ordered, hashes[place]), np.searchsorted(ordered, hashes[place], side="right")
            if any(other < place and name(other) == found for other in order[low:high].tolist()):
                raise HarkenError(
                    f"{path} line {place + 1}: cut id `{found}` occurs twice; draws and labels are keyed by id"
                )
