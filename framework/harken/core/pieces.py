"""Long work in pieces: what each found is kept in a folder that all machines see, until all of it is put together.

The work is cut into chunks, the same ones however many pieces there are. Piece 3 of 8 does the chunks 3, 11, 19, ...
that are not there yet; the command without a piece does what is left and puts all together. So a piece that is started
again goes on, and pieces may run anywhere, at any time, or not at all.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harken.core.errors import HarkenError
from harken.core.files import remove, sync, write_json_atomic


@dataclass(frozen=True)
class Piece:
    """One of `count` pieces, `number` from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Piece:
        """Read `3/8`.

        Raises HarkenError when it is no such fraction.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise HarkenError(f"`--piece` must be a number of a count, such as 3/8 with 1 to 8 before it, got {text!r}")
        return cls(int(found[1]), int(found[2]))

    def of(self, chunks: int) -> range:
        """Return the chunks of this piece."""
        return range(self.number - 1, chunks, self.count)

    def __str__(self) -> str:
        """Write it as it is read."""
        return f"{self.number}/{self.count}"


class Pieces:
    """What was found in each of `chunks` chunks, as JSON in `folder`. plan: what the results depend on."""

    def __init__(self, folder: Path, plan: Mapping[str, Any], chunks: int) -> None:
        """Make the folder, or find it.

        Raises HarkenError when it holds results of another plan.
        """
        self.folder, self.chunks = folder, chunks
        wanted = json.loads(json.dumps({**plan, "chunks": chunks}))
        if not (folder / "plan.json").is_file():
            with shared_folder(folder) as new:
                write_json_atomic(new / "plan.json", wanted)
        try:
            found = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise HarkenError(f"{folder} must hold pieces of this work, or not be there: {error}; remove it") from error
        if found != wanted:
            keys = [key for key in wanted if found.get(key) != wanted[key]]
            raise HarkenError(
                f"{folder} holds pieces of other work, its {', '.join(keys) or 'plan'} differs: "
                "give the arguments it was begun with, or remove it"
            )

    def work(self, piece: Piece, do: Callable[[int], Any]) -> int:
        """Do the chunks of a piece that are not there yet; return how many those were."""
        left = [chunk for chunk in piece.of(self.chunks) if not self._path(chunk).is_file()]
        for chunk in left:
            write_json_atomic(self._path(chunk), do(chunk))
        return len(left)

    def results(self, do: Callable[[int], Any]) -> Iterator[Any]:
        """Yield what was found in every chunk, in order; a chunk that is not there is done now."""
        for chunk in range(self.chunks):
            self.work(Piece(chunk + 1, self.chunks), do)
            yield json.loads(self._path(chunk).read_text(encoding="utf-8"))

    def remove(self) -> None:
        """Remove the folder, once all is put together."""
        remove(self.folder)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}.json"


@contextmanager
def shared_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that takes the name `path`, unless another process, on any machine, was first: then it goes.

    A folder at `path` that is not empty stays as it is, whoever made it; the caller looks what is in it.
    """
    new = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(new)
        new.mkdir()
        yield new
        sync(new)
        if not (path.is_dir() and any(path.iterdir())):
            try:
                new.rename(path)  # fails, and is not done in part, where a folder is that is not empty
            except OSError:
                if not path.is_dir():
                    raise
    except OSError as error:
        raise HarkenError(f"cannot write {path}: {error.strerror or error}: {error.filename}") from error
    finally:
        remove(new)
