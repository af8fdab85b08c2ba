"""Whether label stores and the cuts of a manifest belong together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec
from harken.data.check import Cuts, Doubt
from harken.units.check import check_units
from harken.units.store import TOLERANCE, UNREADABLE, Card, LabelStore


def check_rate(store: LabelStore, spec: FrameSpec) -> None:
    """Raise HarkenError when a store's labels cannot be those of a frontend's frames."""
    card = store.card
    if card.sample_rate != spec.sample_rate:
        raise HarkenError(
            f"{store.folder} was labelled at {card.sample_rate} Hz, the frontend reads {spec.sample_rate} Hz"
        )
    if spec.stride % card.hop:
        raise HarkenError(
            f"{store.folder} has {card.rate:g} labels a second (one each {card.hop} samples), and the frontend gives "
            f"{spec.rate:g} frames (one each {spec.stride}): labels must come as often as frames or a whole number of "
            "times as often; label with other features, or take another frontend"
        )


def check_same_units(train: Card, valid: Card) -> None:
    """Raise HarkenError when `data.valid_labels` are other units than `data.labels`."""
    if train.made_of != valid.made_of:
        raise HarkenError(
            "`data.valid_labels` must be made by the clusterer of `data.labels`, or a unit of one means another in the "
            f"other, got {valid.made_of} and {train.made_of}: label the validation set with that clusterer"
        )


def check_labels(store: LabelStore, cuts: Cuts) -> Iterator[Doubt]:
    """Yield what is wrong with a store as the labels of cuts.

    Presence and lengths are compared for all cuts, by hashes and durations; labels are looked at in the sample.
    """
    rows = store.rows(np.asarray(cuts.manifest.hashes)[cuts.places])
    absent = np.flatnonzero(rows < 0)
    again = f"`harken units label {cuts.manifest.path} ... --out NEW`"
    if len(absent):
        yield Doubt(
            "wrong",
            f"label store {store.folder} has no labels for {len(absent)} of {len(rows)} cuts of {cuts.key}, the first "
            f"`{cuts.id_at(int(cuts.places[absent[0]]))}`: it was made from another manifest; run {again}",
        )
    there = rows >= 0
    places, rows = cuts.places[there], rows[there]
    if not len(rows):
        return
    expected = store.card.labels_of(np.asarray(cuts.manifest.seconds)[places])
    found = store.index[rows + 1] - store.index[rows]
    allowed = TOLERANCE * store.card.rows
    off = np.flatnonzero(np.abs(found - expected) > allowed)
    if len(off):
        first = off[0]
        yield Doubt(
            "wrong",
            f"{len(off)} of {len(rows)} cuts of {cuts.key} have another number of labels in {store.folder} than their "
            f"duration gives at {store.card.rate:g} a second, the first `{cuts.id_at(int(places[first]))}` "
            f"{found[first]} instead of {expected[first]} (up to {allowed} more or fewer are allowed): the audio or "
            f"its cuts changed after labelling; run {again}",
        )
    yield from _own(store, cuts)
    looked = store.rows(np.asarray(cuts.manifest.hashes)[cuts.sample])
    report = check_units(store, looked[looked >= 0])
    for text in report.problems:
        yield Doubt("wrong", f"labels of {cuts.key} in {store.folder}: {text}")
    for text in report.warnings:
        yield Doubt("warning", f"labels of {cuts.key} in {store.folder}: {text}")


def _own(store: LabelStore, cuts: Cuts) -> Iterator[Doubt]:
    """Yield how many cuts have a filling instead of labels, because their audio could not be labelled."""
    if not (names := list(store.without_own)):
        return
    share, allowed = len(names) / store.card.cuts, cuts.config.max_bad_share
    yield Doubt(
        "wrong" if share > allowed else "warning",
        f"{len(names)} of {store.card.cuts} cuts of {store.folder} have no labels of their own, the first "
        f"`{names[0]}`, and `data.max_bad_share` allows {100 * allowed:g}%: their audio could not be labelled "
        f"({store.folder / UNREADABLE} says why); run `harken data verify {cuts.manifest.path} --clean CLEAN.jsonl`, "
        "and label that",
    )
