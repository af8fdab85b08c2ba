"""Which label belongs to which frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harken.config.schema import DataConfig
from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec
from harken.data.check import Cuts, Doubt
from harken.units.coverage import check_labels, check_rate, check_same_units
from harken.units.store import TOLERANCE, LabelStore


def open_units(data: DataConfig, spec: FrameSpec, classes: Sequence[int], *, train: bool, rows: int = 1) -> UnitReader:
    """Return the reader of `data.labels`, or of `data.valid_labels` where validation has its own.

    classes: of each store. rows: labels of a frame. Raises HarkenError for stores that are missing or do not fit.
    """
    if not data.labels:
        raise HarkenError("`data.labels` must name a unit store for each codebook; `harken units label` makes one")
    stores = data.labels
    if data.valid_labels and not train:
        stores = data.valid_labels
        for folder, other in zip(data.labels, stores, strict=True):
            check_same_units(LabelStore(folder).card, LabelStore(other).card)
    return UnitReader(stores, spec, classes, rows)


def units_fingerprint(data: DataConfig) -> dict[str, str]:
    """Return the clusterer and features of each codebook; a store of more cuts by the same ones is as good."""
    cards = [LabelStore(folder).card for folder in data.labels]
    return {f"data.labels[{index}]": card.made_of for index, card in enumerate(cards)}


class UnitReader:
    """Reads the labels of a batch at its frames: for each frame the label whose middle is nearest to the frame's.

    For MFCC units at 100 Hz and frames at 50 Hz that is every second label, as fairseq takes. Of a frame of patches
    there are `rows` labels.
    """

    def __init__(self, stores: Sequence[str], spec: FrameSpec, classes: Sequence[int], rows: int = 1) -> None:
        self.folders = list(stores)
        self.spec, self.rows = spec, rows
        self._stores: list[LabelStore] | None = None
        self._check(classes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stores": None}

    @property
    def stores(self) -> list[LabelStore]:
        """The stores, opened at first use in each process."""
        if self._stores is None:
            self._stores = [LabelStore(folder) for folder in self.folders]
        return self._stores

    def _check(self, classes: Sequence[int]) -> None:
        if len(self.folders) != len(classes):
            raise HarkenError(
                "`data.labels` must name one store for each codebook of `objective.classes`, "
                f"got {len(self.folders)} and {len(classes)}"
            )
        for store, count in zip(self.stores, classes, strict=True):
            if store.card.clusters != count:
                raise HarkenError(
                    f"`objective.classes` must equal the clusters of {store.folder}, "
                    f"got {count} and {store.card.clusters}"
                )
            if store.card.rows != self.rows:
                raise HarkenError(
                    f"{store.folder} must have {self.rows} labels of each time, one for each token of a frame, and has "
                    f"{store.card.rows}: label with a model of as many `encoder.rows`"
                )
            check_rate(store, self.spec)

    def check(self, cuts: Cuts) -> Iterator[Doubt]:
        """Yield what is wrong with the stores as the labels of cuts."""
        for store in self.stores:
            yield from check_labels(store, cuts)

    def read(self, batch: Batch, frames: int) -> NDArray[np.int32]:
        """Return `(B, frames * rows, C)` labels, frame by frame; padded frames hold 0 and belong to no loss.

        Raises HarkenError when a cut has fewer labels than its frames need (more than two missing).
        """
        lengths = self.spec.num_frames(batch.lengths).numpy()
        middle = (self.spec.receptive_field - 1) / 2 + self.spec.stride * np.arange(frames)
        labels = np.zeros((len(batch.ids), frames, self.rows, len(self.stores)), dtype=np.int32)
        for codebook, store in enumerate(self.stores):
            for row, (cut, count, start) in enumerate(zip(batch.ids, lengths, batch.starts.tolist(), strict=True)):
                values = store[cut].reshape(-1, self.rows)
                places = np.rint((start + middle[:count] - store.card.center) / store.card.hop).astype(np.int64)
                if count and places[-1] >= len(values) + TOLERANCE:
                    raise HarkenError(
                        f"cut `{cut}` has {len(values)} labels in {store.folder} and needs {int(places[-1]) + 1}: "
                        "the audio or the label rate changed"
                    )
                labels[row, :count, :, codebook] = values[places.clip(0, len(values) - 1)]
        return labels.reshape(len(batch.ids), frames * self.rows, -1)
