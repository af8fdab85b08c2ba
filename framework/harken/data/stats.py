"""`harken data stats`: what is in a manifest, and what the sampling plan makes of it; no audio is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harken.config.schema import BatchConfig
from harken.core.errors import HarkenError
from harken.data.lines import supervisions_of, text_of
from harken.data.manifest import Manifest
from harken.data.parallel import with_progress
from harken.data.plan import make_plan
from harken.data.selection import select

EIGHTHS = " ▏▎▍▌▋▊▉█"
MAX_BINS = 20


@dataclass(frozen=True, kw_only=True)
class Durations:
    """Seconds of the cuts of a manifest. bins: (from, to, cuts, hours); the last may be wider than the others."""

    hours: float
    min: float
    median: float
    mean: float
    p90: float
    max: float
    bins: list[tuple[float, float, int, float]]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts of a manifest. Rates are over the seconds of the cuts that have a text.

    fastest: the cut with the most characters a second and how many: a text that is not of its audio shows here.
    """

    cuts: int
    words: int
    distinct_words: int
    characters: int
    words_a_second: float
    characters_a_second: float
    fastest: tuple[str, float]


@dataclass(frozen=True, kw_only=True)
class Batches:
    """What the sampling plan of one epoch makes of a manifest.

    padding: share of a batch's seconds that is padding. fill: share of `max_seconds` that the batches hold, padding
    included. too_long: cuts longer than `max_seconds`, which the plan leaves out.
    """

    max_seconds: float
    parts: int
    micro_batches: int
    cuts_a_batch: float
    padding: float
    fill: float
    too_long: int


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Everything that is known of a manifest. speakers: hours of each, the largest first."""

    path: str
    cuts: int
    durations: Durations
    texts: Texts | None
    speakers: dict[str, float]
    cuts_without_speaker: int
    sample_rates: dict[str, int]
    batches: Batches | None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def length(seconds: float) -> str:
    """Return an amount of audio in words: hours, or minutes where it is less than a tenth of one."""
    return f"{seconds / 3600:.2f} h" if seconds >= 360 else f"{seconds / 60:.2f} min"


def describe(manifest: Manifest, *, max_seconds: float = 60.0, parts: int = 2) -> Stats:
    """Read the lines of a manifest once and count.

    max_seconds, parts: of the sampling plan (`batch.max_seconds`, `batch.parts` of a run).
    Raises HarkenError for an empty manifest.
    """
    if not len(manifest):
        raise HarkenError(f"{manifest.path} holds no cut")
    seconds = np.asarray(manifest.seconds)
    counted = _Lines()
    lines = (manifest.line(place) for place in range(len(manifest)))
    for line in with_progress(lines, len(manifest), "reading the manifest"):
        counted.add(line)
    return Stats(
        path=str(manifest.path),
        cuts=len(manifest),
        durations=durations(seconds),
        texts=counted.texts(),
        speakers={name: total / 3600 for name, total in counted.speakers.most_common()},
        cuts_without_speaker=counted.without_speaker,
        sample_rates={str(rate): count for rate, count in counted.rates.most_common()},
        batches=batches(seconds, max_seconds, parts),
    )


def durations(seconds: NDArray[np.float32]) -> Durations:
    """Describe durations `(N,)` in seconds, N > 0."""
    exact = seconds.astype(np.float64)
    rounded = np.round(exact, 4)  # stored in single precision: 14.2 s would fall below 14.2
    edges = bin_edges(rounded)
    place = np.clip(np.searchsorted(edges, rounded, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(place, minlength=len(edges) - 1)
    hours = np.bincount(place, weights=exact, minlength=len(edges) - 1) / 3600
    rows = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), hours.tolist(), strict=True)
    return Durations(
        hours=float(exact.sum()) / 3600,
        min=float(exact.min()),
        median=float(np.median(exact)),
        mean=float(exact.mean()),
        p90=float(np.quantile(exact, 0.9)),
        max=float(exact.max()),
        bins=list(rows),
    )


def bin_edges(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return round edges: equal steps of 1, 2 or 5 x 10^k to the 99th percentile, and one for the tail.

    There are at most 20 steps, and fewer for fewer durations.
    """
    count = min(MAX_BINS, 4 + math.isqrt(len(seconds)))
    low, top = float(seconds.min()), float(np.quantile(seconds, 0.99))
    raw = max((top - low) / (count - 1), 0.01)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(top / step - 1e-9)
    edges = np.round(step * np.arange(first, max(last, first + 1) + 1, dtype=np.float64), 4)
    longest = float(seconds.max())
    if longest > edges[-1]:
        edges = np.append(edges, longest)
    return edges


def batches(seconds: NDArray[np.float32], max_seconds: float, parts: int) -> Batches | None:
    """Plan one epoch and measure it; None where every cut is longer than `max_seconds`."""
    too_long = int((seconds > max_seconds).sum())
    if too_long == len(seconds):
        return None
    selection = select(seconds, 0.0, max_seconds, None)
    batch = BatchConfig(max_seconds=max_seconds, seconds_per_step=max_seconds, parts=parts)
    plan = make_plan(selection.seconds, batch, np.random.default_rng(0))
    padded = float(plan.padded_seconds(selection.seconds).sum())
    return Batches(
        max_seconds=max_seconds,
        parts=parts,
        micro_batches=len(plan),
        cuts_a_batch=len(selection) / len(plan),
        padding=1 - float(selection.seconds.sum(dtype=np.float64)) / padded,
        fill=padded / (len(plan) * max_seconds),
        too_long=too_long,
    )


@dataclass
class _Lines:
    """Counts over the lines of a manifest."""

    speakers: Counter[str] = field(default_factory=Counter)
    rates: Counter[int] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    without_speaker: int = 0
    with_text: int = 0
    seconds: float = 0.0
    characters: int = 0
    fastest: tuple[str, float] = ("", -1.0)

    def add(self, line: Mapping[str, Any]) -> None:
        """Count one cut, given as the plain data of its line."""
        duration = float(line["duration"])
        spoken = {part["speaker"] for part in supervisions_of(line) if part.get("speaker")}
        for speaker in spoken:
            self.speakers[speaker] += duration / len(spoken)  # type: ignore[assignment]
        self.without_speaker += not spoken
        rate = (line.get("recording") or {}).get("sampling_rate")
        if rate:
            self.rates[int(rate)] += 1
        text = text_of(line)
        if text:
            self.with_text += 1
            self.seconds += duration
            self.characters += len(text)
            self.words.update(text.split())
            self.fastest = max(
                self.fastest, (str(line["id"]), len(text) / max(duration, 1e-3)), key=lambda item: item[1]
            )

    def texts(self) -> Texts | None:
        if not self.with_text:
            return None
        return Texts(
            cuts=self.with_text,
            words=self.words.total(),
            distinct_words=len(self.words),
            characters=self.characters,
            words_a_second=self.words.total() / self.seconds,
            characters_a_second=self.characters / self.seconds,
            fastest=self.fastest,
        )


def render(stats: Stats, *, width: int = 40, unicode: bool = True) -> str:
    """Return the statistics for a terminal. unicode: bars in eighths of a character, `#` otherwise."""
    d = stats.durations
    lines = [
        f"{stats.path}: {stats.cuts} cuts, {length(3600 * d.hours)}",
        f"  seconds     min {d.min:.2f}  median {d.median:.2f}  mean {d.mean:.2f}  p90 {d.p90:.2f}  max {d.max:.2f}",
        "  rates       " + (", ".join(f"{count} at {rate} Hz" for rate, count in stats.sample_rates.items()) or "none"),
        f"  speakers    {_speakers(stats)}",
        f"  texts       {_texts(stats)}",
        f"  plan        {_batches(stats.batches)}",
        "",
    ]
    most = max(count for _, _, count, _ in d.bins)
    places = max(0, math.ceil(-math.log10(d.bins[0][1] - d.bins[0][0]) - 1e-9))
    names = [f"{low:.{places}f}-{high:.{places}f} s" for low, high, _, _ in d.bins]
    left = max(map(len, names))
    for name, (_, _, count, hours) in zip(names, d.bins, strict=True):
        filled = bar(count / most, width, unicode=unicode)
        lines.append(f"  {name:>{left}} {filled:{width}} {count:>8} {length(3600 * hours):>10}")
    return "\n".join(lines)


def bar(share: float, width: int, *, unicode: bool = True) -> str:
    """Return a bar of `share` (0..1) of `width` characters; what is not zero shows."""
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    if not unicode:
        return "#" * math.ceil(eighths / 8)
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).rstrip()


def _speakers(stats: Stats) -> str:
    if not stats.speakers:
        return "none named"
    name, hours = next(iter(stats.speakers.items()))
    missing = f"; {stats.cuts_without_speaker} cuts name none" if stats.cuts_without_speaker else ""
    least = length(3600 * min(stats.speakers.values()))
    return f"{len(stats.speakers)}; most {name} {length(3600 * hours)}, least {least}{missing}"


def _texts(stats: Stats) -> str:
    texts = stats.texts
    if texts is None:
        return "none"
    name, rate = texts.fastest
    return (
        f"{texts.cuts} cuts, {texts.words} words ({texts.distinct_words} distinct), "
        f"{texts.words_a_second:.2f} words/s, {texts.characters_a_second:.1f} characters/s (most: {name}, {rate:.1f})"
    )


def _batches(plan: Batches | None) -> str:
    if plan is None:
        return "none: every cut is longer than --max-seconds"
    long = f"; {plan.too_long} cuts are longer and left out" if plan.too_long else ""
    return (
        f"{plan.micro_batches} batches of {plan.cuts_a_batch:.1f} cuts for {plan.max_seconds:g} s in up to "
        f"{plan.parts} parts: padding {100 * plan.padding:.1f}%, fill {100 * plan.fill:.1f}%{long}"
    )
