"""`harken data scan`: a source of audio becomes an indexed manifest; what cannot be read is listed with its reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from harken.core.errors import HarkenError
from harken.core.files import atomic_path, remove, write_text_atomic
from harken.core.pieces import Piece
from harken.data.entries import Entry, Listing, add_texts
from harken.data.index import build_index
from harken.data.parallel import Division, in_pieces
from harken.data.read import reason
from harken.data.sources import read_source

if TYPE_CHECKING:
    from lhotse import MonoCut

TOLERANCE_SECONDS = 0.04
"""By how much a stated and a real duration may differ: two frames of 20 ms. Lhotse's reader is content with 0.5 s
and fills what is missing with a mirror image of the end, which would be trained on unnoticed."""


class Header(NamedTuple):
    """What the header of an audio file says."""

    rate: int
    samples: int
    channels: int


class RefusedError(Exception):
    """An utterance that goes to the quarantine list; the message is the reason."""


@dataclass(kw_only=True)
class Scanned:
    """What a scan wrote. refused: (id, path, reason), all of them in `quarantine`. notes: what the user is told."""

    kind: str
    quarantine: Path
    refused: list[tuple[str, str, str]]
    notes: list[str]
    cuts: int = 0
    seconds: float = 0.0


def scan(
    source: Path,
    out: Path,
    *,
    jobs: int | None = None,
    text: str | None = None,
    supervisions: Path | None = None,
    root: Path | None = None,
    each_channel: bool = False,
    piece: Piece | None = None,
) -> Scanned | None:
    """Write the manifest `out` of what `source` lists, its index, and `OUT.quarantine.tsv`.

    jobs: see `in_parallel`. text: see `add_texts`. supervisions, root: see `read_source`.
    each_channel: one cut for each channel of a file, instead of its first channel alone.
    piece: of the headers, to be read and kept in `OUT.pieces`, and nothing else (then None is returned). A call without
    takes up what pieces have read.
    Raises HarkenError when the source cannot be understood or none of its audio can be read; `out` is left as it was.
    """
    if out.suffix != ".jsonl" or out.resolve() == source.resolve():
        raise HarkenError(f"--out must be another file than the source and end in .jsonl, got {out}")
    listing = read_source(source, root=root, supervisions=supervisions)
    if text is not None:
        add_texts(listing, text)
    paths = list(dict.fromkeys(entry.path for entry in listing.entries))
    pieces = out.with_name(out.name + ".pieces")
    listed = hashlib.sha256("\0".join(map(str, paths)).encode(errors="surrogateescape")).hexdigest()
    read = in_pieces(
        read_header,
        paths,
        jobs=jobs,
        what="headers",
        division=Division(pieces, {"files": listed}, piece),
        pack=lambda header: header,
        unpack=lambda data: data if isinstance(data, str) else Header(*data),
    )
    found = list(read)
    if piece is not None:
        return None
    headers = dict(zip(paths, found, strict=True))
    quarantine = out.with_name(out.name + ".quarantine.tsv")
    result = Scanned(kind=listing.kind, quarantine=quarantine, refused=listing.refused, notes=listing.notes)
    with atomic_path(out) as temporary:
        with temporary.open("w", encoding="utf-8") as stream:
            for entry in listing.entries:
                try:
                    cuts = to_cuts(entry, headers[entry.path], each_channel=each_channel)
                except RefusedError as error:
                    result.refused.append((entry.id, str(entry.path), str(error)))
                    continue
                stream.writelines(json.dumps(cut.to_dict(), ensure_ascii=False) + "\n" for cut in cuts)
                result.cuts += len(cuts)
                result.seconds += sum(cut.duration for cut in cuts)
        write_quarantine(quarantine, ("id", "path", "reason"), result.refused)
        if not result.cuts:
            first = ": ".join(result.refused[0][1:]) if result.refused else "it lists none"
            raise HarkenError(f"none of the utterances of {source} can be read; the first: {first} (all: {quarantine})")
    build_index(out)
    remove(pieces)
    result.notes += _header_notes(listing, headers, each_channel=each_channel)
    return result


def _header_notes(listing: Listing, headers: Mapping[Path, Header | str], *, each_channel: bool) -> Iterator[str]:
    """Yield what the headers say and the source does not."""
    other_length, several = [], {}
    for entry in listing.entries:
        header = headers[entry.path]
        if isinstance(header, str) or entry.cut is not None:
            continue
        if entry.samples not in {None, header.samples}:
            other_length.append(f"`{entry.id}` ({entry.samples} samples stated, {header.samples} found)")
        if header.channels > 1 and entry.channel is None:
            several[entry.path] = header.channels
    if other_length:
        yield (
            f"{len(other_length)} files have another length than the source states; their own was taken: "
            + ", ".join(other_length[:3])
        )
    if several:
        how = "each gave a cut" if each_channel else "the first was taken (`--channels each` takes all)"
        first, channels = next(iter(several.items()))
        yield f"{len(several)} files have several channels and {how}; the first: {first} ({channels})"


def read_header(path: Path) -> Header | str:
    """Return the header of an audio file, or in a few words why it cannot be read."""
    from lhotse import Recording

    try:
        recording = Recording.from_file(path)
    except Exception as error:  # noqa: BLE001  each backend of Lhotse raises its own kinds
        return reason(error, path)
    return Header(recording.sampling_rate, recording.num_samples, recording.num_channels)


def to_cuts(entry: Entry, header: Header | str, *, each_channel: bool = False) -> list[MonoCut]:
    """Return the cuts of an entry, checked against the header of its file.

    Raises RefusedError when they do not fit, or when the header could not be read (then `header` is the reason).
    """
    from lhotse import MonoCut, Recording, SupervisionSegment
    from lhotse.audio import AudioSource

    if isinstance(header, str):
        raise RefusedError(header)
    if not header.samples:
        raise RefusedError("holds no samples")
    if entry.cut is not None:
        return [_checked(entry.cut, header)]
    start, seconds = _span(entry.offset, entry.duration, header)
    channels = range(header.channels) if each_channel else [0]
    if entry.channel is not None:
        channels = [entry.channel]
    if max(channels) >= header.channels:
        raise RefusedError(
            f"the source asks for channel {max(channels)}, the file has {header.channels} (counted from 0)"
        )
    audio = AudioSource(type="file", channels=list(range(header.channels)), source=str(entry.path))
    recording = Recording(
        id=entry.recording or entry.id,
        sources=[audio],
        sampling_rate=header.rate,
        num_samples=header.samples,
        duration=header.samples / header.rate,
    )
    cuts = []
    for channel in channels:
        name = f"{entry.id}-c{channel}" if len(channels) > 1 else entry.id
        cut = MonoCut(id=name, start=start, duration=seconds, channel=channel, recording=recording)
        if entry.text is not None or entry.speaker is not None:
            words = {"text": entry.text, "speaker": entry.speaker}
            cut.supervisions = [SupervisionSegment(name, recording.id, 0.0, seconds, channel, **words)]
        cuts.append(cut)
    return cuts


def _span(offset: float, duration: float | None, header: Header) -> tuple[float, float]:
    """Return start and duration in seconds of what a source states, or of the whole file."""
    total = header.samples / header.rate
    if not 0 <= offset < total or (duration is not None and not duration > 0):
        raise RefusedError(f"the source states {offset:g} s and a duration of {duration} s, the file has {total:.3f} s")
    if duration is None or (offset == 0 and abs(duration - total) <= TOLERANCE_SECONDS):
        return offset, total - offset
    if offset + duration > total + TOLERANCE_SECONDS:
        raise RefusedError(f"the source states {offset:g} s + {duration:g} s, the file has {total:.3f} s")
    return offset, min(duration, total - offset)


def _checked(cut: MonoCut, header: Header) -> MonoCut:
    recording = cut.recording
    if recording.transforms:  # its rate and length are those after the transforms
        return cut
    real = header.samples / header.rate
    if recording.sampling_rate != header.rate or abs(recording.duration - real) > TOLERANCE_SECONDS:
        stated = f"{recording.sampling_rate} Hz and {recording.duration:.3f} s"
        raise RefusedError(f"the manifest states {stated}, the file has {header.rate} Hz and {real:.3f} s")
    return cut


def write_quarantine(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a TSV with a header line; it is written when there is nothing to list, too, so that none is stale."""
    lines = [header, *rows]
    write_text_atomic(path, "".join("\t".join(" ".join(item.split()) for item in line) + "\n" for line in lines))
