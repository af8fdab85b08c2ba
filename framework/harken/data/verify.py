"""`harken data verify`: every cut is decoded, and what training would stumble over is counted and named."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from harken.core.errors import HarkenError
from harken.core.files import atomic_path, remove
from harken.core.pieces import Piece
from harken.data.index import build_index
from harken.data.manifest import Manifest
from harken.data.parallel import Division, in_pieces
from harken.data.read import reason
from harken.data.scan import TOLERANCE_SECONDS, write_quarantine
from harken.data.stats import length

if TYPE_CHECKING:
    from lhotse.cut import Cut

SILENT_DBFS = -60.0
"""RMS about the mean below which a cut is silent. A peak below 0.001 is below it, too, and so is a constant."""
FULL_SCALE = 0.999
"""Samples at or above this magnitude count as clipped: 16-bit audio ends at 0.99997, and resampling rounds it off."""

NAMED = 3
"""How many cuts of each kind are printed."""

PROBLEMS = {
    "unreadable": "cannot be decoded",
    "empty": "no samples",
    "header": "another sampling rate or fewer channels than the manifest states",
    "duration": f"real and stated duration differ by more than {1000 * TOLERANCE_SECONDS:.0f} ms",
    "not_finite": "NaN or infinite samples",
    "silent": f"RMS below {SILENT_DBFS:g} dBFS",
    "clipped": "more samples at full scale than --max-clipped allows",
}
NOTES = {
    "sample_rate": "another rate than --sample-rate: resampled whenever it is read",
    "channels": "the file has channels that the cut does not use",
}


class Finding(NamedTuple):
    """One thing found out about a cut: a key of PROBLEMS or NOTES, and the numbers."""

    kind: str
    detail: str


class Examined(NamedTuple):
    """A cut after decoding. seconds: its duration as stated."""

    id: str
    path: str
    seconds: float
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing but notes was found."""
        return not any(finding.kind in PROBLEMS for finding in self.findings)


@dataclass(kw_only=True)
class Verified:
    """What was found in a manifest.

    bad: the cuts with problems. sound: places in the manifest of the others. counts, first: how often each kind of
    finding occurs, and its first cuts (a corpus may have a note for every cut: they are not all kept).
    """

    path: Path
    cuts: int = 0
    seconds: float = 0.0
    bad: list[Examined] = field(default_factory=list)
    sound: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, item: Examined) -> None:
        """Count the next cut of the manifest."""
        if item.sound:
            self.sound.append(self.cuts)
        else:
            self.bad.append(item)
        self.cuts += 1
        self.seconds += item.seconds
        for kind, detail in item.findings:
            self.counts[kind] += 1
            if len(self.first[kind]) < NAMED:
                self.first[kind].append(f"{item.id}: {detail}  [{item.path}]")

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield (id, path, problem, detail) for each problem; notes are left out."""
        for item in self.bad:
            for kind, detail in item.findings:
                if kind in PROBLEMS:
                    yield item.id, item.path, kind, detail

    def table(self) -> str:
        """Return the counts, and the first cuts of each kind, for a terminal."""
        lost = sum(item.seconds for item in self.bad)
        verdict = f"{len(self.bad)} cuts, {length(lost)}, have problems" if self.bad else "no problem"
        lines = [f"{self.path}: {self.cuts} cuts, {length(self.seconds)}: {verdict}"]
        for title, kinds in (("problem", PROBLEMS), ("note", NOTES)):
            for kind in filter(self.counts.__getitem__, kinds):
                lines.append(f"  {title} {kind}: {self.counts[kind]} ({kinds[kind]})")
                lines += [f"    {name}" for name in self.first[kind]]
                if self.counts[kind] > NAMED:
                    lines.append(f"    ... and {self.counts[kind] - NAMED} more")
        return "\n".join(lines)


def pieces_of(path: Path) -> Path:
    """Return where pieces of the verification of a manifest are kept."""
    return path.with_name(path.name + ".verify.pieces")


def verify(
    path: Path,
    *,
    jobs: int | None = None,
    sample_rate: int = 16000,
    max_clipped: float = 0.01,
    piece: Piece | None = None,
) -> Verified:
    """Decode every cut of a manifest and return what was found.

    piece: to be done and kept beside the manifest; the result is then empty. A call without takes up what pieces found.
    jobs: see `in_parallel`. sample_rate: of training, in Hz; another is noted. max_clipped: share of samples at full
    scale that is allowed.
    Raises HarkenError when the manifest cannot be opened.
    """
    manifest, result = Manifest(path), Verified(path=path)
    work = partial(examine_place, path, sample_rate=sample_rate, max_clipped=max_clipped)
    plan = {"manifest": manifest.card["sha256"], "sample_rate": sample_rate, "max_clipped": max_clipped}
    examined = in_pieces(
        work,
        range(len(manifest)),
        jobs=jobs,
        what="decoding",
        division=Division(pieces_of(path), plan, piece),
        pack=list,
        unpack=_unpacked,
    )
    for item in examined:
        result.add(item)
    if piece is None:
        remove(pieces_of(path))
    return result


def _unpacked(data: list[Any]) -> Examined:
    name, path, seconds, findings = data
    return Examined(name, path, seconds, tuple(Finding(*finding) for finding in findings))


def write_list(result: Verified, out: Path) -> None:
    """Write the quarantine list: id, path, problem, detail."""
    write_quarantine(out, ("id", "path", "problem", "detail"), result.rows())


def check_clean(manifest: Path, out: Path) -> None:
    """Raise HarkenError when `out` cannot be the cleaned `manifest`, before hours are spent on decoding."""
    if out.suffix != ".jsonl" or out.resolve() == manifest.resolve():
        raise HarkenError(f"--clean must be another file than the manifest and end in .jsonl, got {out}")


def write_clean(result: Verified, out: Path) -> None:
    """Write the manifest without the cuts that have problems, line for line as they are, and its index.

    Raises HarkenError when nothing is left, or `out` is the manifest itself.
    """
    check_clean(result.path, out)
    if not result.sound:
        raise HarkenError(f"--clean: none of {result.cuts} cuts of {result.path} is sound, so nothing is written")
    offsets = Manifest(result.path).offsets
    with atomic_path(out) as temporary, result.path.open("rb") as source, temporary.open("wb") as stream:
        for place in result.sound:
            source.seek(int(offsets[place]))
            stream.write(source.read(int(offsets[place + 1] - offsets[place])).rstrip(b"\r\n") + b"\n")
    build_index(out)


@lru_cache(maxsize=1)
def _opened(path: Path) -> Manifest:
    return Manifest(path)


def examine_place(path: Path, place: int, *, sample_rate: int, max_clipped: float) -> Examined:
    """Examine the cut at a place of a manifest; the manifest stays open between calls of a process."""
    try:
        cut = _opened(path)[place]
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        line = _opened(path).line(place)
        finding = Finding("unreadable", f"line {place + 1} is no Lhotse cut: {error!r}")
        return Examined(str(line["id"]), "", float(line["duration"]), (finding,))
    findings = tuple(examine(cut, sample_rate=sample_rate, max_clipped=max_clipped))
    return Examined(cut.id, _source(cut), float(cut.duration), findings)


def examine(cut: Cut, *, sample_rate: int = 16000, max_clipped: float = 0.01) -> Iterator[Finding]:
    """Yield what is found in one cut."""
    source = _plain_source(cut)
    try:
        audio, rate = _decode(cut, source)
    except Exception as error:  # noqa: BLE001  every backend of Lhotse raises its own kinds; all mean the same here
        yield Finding("unreadable", reason(error, Path(source.source)) if source else str(error))
        return
    if not audio.size:
        yield Finding("empty", f"no samples from {cut.start:g} s on" if cut.start else "no samples")
        return
    if rate != cut.sampling_rate:
        yield Finding("header", f"the manifest states {cut.sampling_rate} Hz, the file has {rate} Hz")
    channels = len(audio)
    if source:
        wanted = [cut.channel] if isinstance(cut.channel, int) else list(cut.channel)
        rows = [source.channels.index(channel) for channel in wanted if channel in source.channels[:channels]]
        if len(rows) < len(wanted):
            yield Finding("header", f"the cut is channel {wanted} of its file, which has {channels}")
            return
        audio = audio[rows]
    seconds = audio.shape[1] / rate
    if abs(seconds - cut.duration) > TOLERANCE_SECONDS:
        yield Finding("duration", f"{cut.duration:.3f} s stated, {seconds:.3f} s decoded")
    yield from examine_samples(audio, max_clipped=max_clipped)
    if rate != sample_rate:
        yield Finding("sample_rate", f"{rate} Hz")
    if len(audio) < channels:
        yield Finding("channels", f"{len(audio)} of {channels} channels used")


def examine_samples(audio: NDArray[np.float32], *, max_clipped: float = 0.01) -> Iterator[Finding]:
    """Yield what is wrong with samples `(C, S)` in [-1, 1]."""
    bad = int(audio.size - np.isfinite(audio).sum())
    if bad:
        yield Finding("not_finite", f"{bad} of {audio.size} samples")
        return
    rms = float(audio.std(axis=1, dtype=np.float64).max())
    level = 20 * np.log10(max(rms, 1e-10))
    if level < SILENT_DBFS:
        yield Finding("silent", f"RMS {level:.1f} dBFS, peak {float(np.abs(audio).max()):.1e}")
    share = float((np.abs(audio) >= FULL_SCALE).mean())
    if share > max_clipped:
        yield Finding("clipped", f"{100 * share:.1f}% of samples at full scale")


def _decode(cut: Any, source: Any) -> tuple[NDArray[np.float32], int]:
    """Return samples `(C, S)` and their rate.

    A plain file is read with all its channels and without Lhotse's check of the length, which mends up to half a
    second in silence. A cut that spans its recording is read to the end of the file: too long a file is found as well.
    """
    from lhotse.audio.backend import read_audio

    if source is None:
        audio = cut.load_audio()
        if audio is None:
            raise ValueError("the cut has no recording")
        return audio, int(cut.sampling_rate)
    whole = cut.start == 0 and abs(cut.duration - cut.recording.duration) <= TOLERANCE_SECONDS
    audio, rate = read_audio(source.source, offset=cut.start, duration=None if whole else cut.duration)
    return np.atleast_2d(audio), int(rate)


def _plain_source(cut: Any) -> Any:
    """Return the Lhotse source of a cut of one plain file; None for mixed cuts, streams, transforms, padding."""
    recording = getattr(cut, "recording", None)
    if recording is None or recording.transforms or len(recording.sources) != 1:
        return None
    return recording.sources[0] if recording.sources[0].type == "file" else None


def _source(cut: Any) -> str:
    recording = getattr(cut, "recording", None)
    sources = recording.sources if recording is not None else []
    return ", ".join(str(item.source) if isinstance(item.source, str) else item.type for item in sources)
