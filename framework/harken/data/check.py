"""What is wrong with the data of a run, found before step 0: manifests here, targets by the objective's `Prepare`.

Cards and columns of indexes are read for all cuts, lines and labels for a seeded sample of them, or for all of them.
An objective joins in by a method `check` of its `Prepare` (`Checks`); nothing here knows one by name.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from harken.config.schema import DataConfig, RunConfig
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.data.lines import recordings_of
from harken.data.manifest import Manifest
from harken.data.mixture import is_mixture, read_mixture
from harken.data.selection import select
from harken.data.streams.shards import is_stream

SAMPLE = 256
"""Cuts of a manifest that are looked at one by one when not all are: a tenth of a second on a disk of one's own."""
FEW = 10
"""Missing files up to which a share says little; the loop allows a run as many (`harken.train.loop`)."""


@dataclass(frozen=True)
class Doubt:
    """Something found: what was expected, what was found, what to do. `wrong` refuses the run."""

    level: Literal["wrong", "warning", "note"]
    text: str


@dataclass(frozen=True)
class Cuts:
    """The cuts of a manifest that a run reads. role: `train` or `valid`.

    places: all of them, `(N,)`. sample: those to be looked at one by one, `(M,)`.
    """

    role: str
    manifest: Manifest
    places: NDArray[np.integer[Any]]
    sample: NDArray[np.integer[Any]]
    config: DataConfig

    @property
    def key(self) -> str:
        """The configuration key and the file, as messages name them."""
        return f"`data.{self.role}` {self.manifest.path}"

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the plain data of the cuts of the sample."""
        return (self.manifest.line(int(place)) for place in self.sample)

    def id_at(self, place: int) -> str:
        """Return the id of the cut at a place of the manifest."""
        return str(self.manifest.line(place)["id"])


@runtime_checkable
class Checks(Protocol):
    """A `Prepare` that knows what its targets need of the cuts."""

    def check(self, cuts: Cuts) -> Iterable[Doubt]:
        """Yield what is wrong with cuts for this objective."""
        ...


@dataclass
class Checked:
    """What was found, and what was done for it, a line each."""

    doubts: list[Doubt] = field(default_factory=list)
    done: list[str] = field(default_factory=list)

    def add(self, level: Literal["wrong", "warning", "note"], text: str) -> None:
        """Add a doubt unless it is there: training and validation often share their mistakes."""
        if Doubt(level, text) not in self.doubts:
            self.doubts.append(Doubt(level, text))

    def texts(self, level: str) -> list[str]:
        """Return the texts of a level."""
        return [doubt.text for doubt in self.doubts if doubt.level == level]

    def refusal(self) -> str:
        """Return what refuses the run, empty when nothing does."""
        wrong = self.texts("wrong")
        if len(wrong) < 2:
            return "".join(wrong)
        lines = [f"{len(wrong)} things are wrong with the data of this run:", *(f"  - {text}" for text in wrong)]
        return "\n".join(lines)


def check_data(config: RunConfig, prepare: Callable[[bool], Any], *, full: bool = False) -> Checked:
    """Look for what would spoil a run.

    prepare: builds the objective's `Prepare`, for training or validation. full: look at every cut instead of a sample.
    """
    began, checked, found = time.monotonic(), Checked(), []
    for role, path in (("train", config.data.train), ("valid", config.data.valid)):
        if path is None:
            continue
        parts: list[Cuts] = []
        try:
            part = prepare(role == "train")
            parts = [_cuts(role, manifest, config, full=full) for manifest in _manifests(path)]
            for cuts in parts:
                for doubt in (*_audio(cuts), *(part.check(cuts) if isinstance(part, Checks) else ())):
                    checked.add(doubt.level, doubt.text)
        except HarkenError as error:
            checked.add("wrong", str(error))
        found += parts
    _shared(checked, found)
    looked = ", ".join(f"{len(cuts.sample)} of {len(cuts.places)} cuts of {cuts.manifest.path}" for cuts in found)
    checked.done.append(f"indexes in whole, {looked or 'no cut'} one by one, in {time.monotonic() - began:.1f} s")
    return checked


def _manifests(path: str) -> list[Manifest]:
    """Open what a configuration names as data; a stream's cuts are known only when they are read."""
    if is_stream(path):
        return []
    return [leaf.manifest for leaf in read_mixture(path)] if is_mixture(path) else [Manifest.filled(path)]


def _cuts(role: str, manifest: Manifest, config: RunConfig, *, full: bool) -> Cuts:
    data = config.data
    places: NDArray[np.integer[Any]] = np.arange(len(manifest))
    if role == "train":
        places = select(np.asarray(manifest.seconds), data.min_seconds, data.max_seconds, data.crop_seconds).places
    sample = places
    if not full and len(places) > SAMPLE:
        rng = Draws(config.seed, 0).generator("check", role)
        sample = np.sort(rng.choice(places, SAMPLE, replace=False))
    return Cuts(role, manifest, places, sample, data)


def _audio(cuts: Cuts) -> Iterator[Doubt]:
    """Look whether audio files are there, and name what reading converts."""
    missing, example = 0, ""
    rates: Counter[int] = Counter()
    channels = 0
    for line in cuts.lines():
        recordings = list(recordings_of(line))
        sources = [source for recording in recordings for source in recording.get("sources") or ()]
        paths = [str(source["source"]) for source in sources if source.get("type") == "file"]
        lost = [path for path in paths if not Path(path).exists()]
        missing += bool(lost)
        example = example or (f"cut `{line['id']}`: {lost[0]}" if lost else "")
        found = {int(recording["sampling_rate"]) for recording in recordings if recording.get("sampling_rate")}
        rates.update(found - {cuts.config.sample_rate})
        channels += any(len(source.get("channels") or ()) > 1 for source in sources)
    of, allowed = len(cuts.sample), cuts.config.max_bad_share
    if missing:
        wrong = missing == of or missing > max(FEW, allowed * of)
        yield Doubt(
            "wrong" if wrong else "warning",
            f"{missing} of {of} cuts looked at in {cuts.key} lack their audio file, the first {example}: mount the "
            "corpus where the manifest says, or make the manifest anew with `harken data scan`",
        )
    for rate, count in rates.most_common():
        yield Doubt(
            "note",
            f"{count} of {of} cuts looked at in {cuts.key} are at {rate} Hz and are resampled to "
            f"{cuts.config.sample_rate} Hz at every reading",
        )
    if channels:
        yield Doubt(
            "note",
            f"{channels} of {of} cuts looked at in {cuts.key} are of files with several channels: what a cut names of "
            "them is read, and averaged to one",
        )


def _shared(checked: Checked, found: list[Cuts]) -> None:
    """Warn when cuts that are trained on are validated on, too."""
    for valid in (cuts for cuts in found if cuts.role == "valid"):
        hashes = np.sort(valid.manifest.hashes)
        for train in (cuts for cuts in found if cuts.role == "train"):
            own = np.asarray(train.manifest.hashes)[train.places]
            places = np.searchsorted(hashes, own).clip(max=len(hashes) - 1)
            shared = np.flatnonzero(hashes[places] == own)
            if len(shared):
                name = train.id_at(int(train.places[shared[0]]))
                checked.add(
                    "warning",
                    f"{len(shared)} cuts of {train.key} are in {valid.key}, too, the first `{name}`: validation "
                    "scores say nothing about new audio; take them out of one of the two",
                )
