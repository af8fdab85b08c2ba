"""The packed label store: unsigned integers in one memory-mapped file, an index, and a card that says what they are.

A store is a folder:

    card.json       what the labels are (`Card`); written last, so a store without it is unfinished
    ids.txt         cut ids, sorted, one a line
    index.npy       (N + 1) int64: where each cut's labels begin; the last entry is the total
    labels.bin      the labels of all cuts, end to end, uint8 or uint16
    plan.json       the card and the hashes of the manifests: by it a continued labelling knows that it is the same
    unreadable.tsv  cuts without labels of their own, with reasons
    pieces/         while labelling only: for each finished piece, which of its cuts could not be labelled
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harken.core.errors import HarkenError
from harken.core.files import write_json_atomic


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a store's labels are.

    clusters: K. center: sample at the middle of what label 0 saw. hop: samples between labels. features: what was
    clustered, with the hash of its model. clusterer: hash of the centroids. cuts, labels: how many there are.
    """

    clusters: int
    sample_rate: int
    hop: int
    center: float
    features: str
    clusterer: str
    dtype: str
    cuts: int
    labels: int

    @property
    def rate(self) -> float:
        """Labels a second."""
        return self.sample_rate / self.hop

    def write(self, folder: Path) -> None:
        """Write card.json into the folder of a store."""
        write_json_atomic(folder / "card.json", asdict(self))


class LabelStore:
    """Read access to a store; opening costs the same for any size, and processes share the pages."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.card = self._read_card()

    def _read_card(self) -> Card:
        path = self.folder / "card.json"
        if not path.is_file():
            unfinished = (self.folder / "pieces").is_dir()
            hint = (
                "its labelling did not finish: run the same `harken units label` again"
                if unfinished
                else "`harken units label` makes one"
            )
            raise HarkenError(f"no finished label store at {self.folder}; {hint}")
        try:
            card = Card(**json.loads(path.read_text(encoding="utf-8")))
            expected = card.labels * np.dtype(card.dtype).itemsize
            found = (self.folder / "labels.bin").stat().st_size
        except (OSError, ValueError, TypeError) as error:
            raise HarkenError(f"{self.folder} is no label store ({error}); `harken units label` makes one") from error
        if found != expected:
            raise HarkenError(
                f"{self.folder}/labels.bin must be {expected} bytes by its card, found {found}: make the labels again"
            )
        return card

    @cached_property
    def ids(self) -> list[str]:
        """Cut ids in the order of the store."""
        with self._reading("ids.txt") as path:
            return path.read_text(encoding="utf-8").splitlines()

    @cached_property
    def index(self) -> NDArray[np.int64]:
        """Where each cut's labels begin."""
        with self._reading("index.npy") as path:
            index: NDArray[np.int64] = np.load(path, mmap_mode="r")
            if index.shape != (self.card.cuts + 1,) or index[-1] != self.card.labels:
                raise ValueError(f"expected {self.card.cuts + 1} places up to {self.card.labels}")
            return index

    @contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        try:
            yield self.folder / name
        except (OSError, ValueError) as error:
            raise HarkenError(f"{self.folder / name} cannot be read: {error}; make the labels again") from error

    @cached_property
    def values(self) -> NDArray[np.unsignedinteger[Any]]:
        """All labels, memory-mapped."""
        return np.memmap(self.folder / "labels.bin", dtype=self.card.dtype, mode="r")

    def __getitem__(self, cut: str) -> NDArray[np.unsignedinteger[Any]]:
        """Return the labels of a cut.

        Raises HarkenError when the store has none for it.
        """
        place = bisect_left(self.ids, cut)
        if place == len(self.ids) or self.ids[place] != cut:
            raise HarkenError(
                f"label store {self.folder} has no labels for cut `{cut}`: it was made from another manifest"
            )
        return self.values[self.index[place] : self.index[place + 1]]
