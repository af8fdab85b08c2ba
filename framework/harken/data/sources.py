"""What a corpus says of its utterances, before any audio is looked at: every layout becomes a list of entries.

Known layouts: a folder of audio, TSV (fairseq's, or with a header), JSONL (NeMo's keys), a Kaldi directory, a Lhotse
manifest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from harken.core.errors import HarkenError
from harken.data.entries import Entry, Listing, objects, open_text, readable, seconds_of
from harken.data.toolkits import read_kaldi, read_lhotse

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")
PATH_KEYS = ("audio", "path", "audio_filepath")  # NeMo's key is `audio_filepath`
KNOWN_KEYS = {*PATH_KEYS, "id", "text", "speaker", "offset", "duration", "channel"}
# what NeMo and Hugging Face write beside them and the file's header says better
HEADER_KEYS = {"sampling_rate", "sample_rate", "num_samples"}


def read_source(source: Path, *, root: Path | None = None, supervisions: Path | None = None) -> Listing:
    """Return what `source` lists.

    root: folder that relative audio paths start from; by default the source's own folder (for fairseq TSV its first
    line, for Kaldi and Lhotse the current folder, as these tools have it). supervisions: Lhotse supervisions to join
    with a Lhotse recordings manifest.
    Raises HarkenError for a layout that is not known, naming file and line.
    """
    with readable(source):
        listing = _read(source, root, supervisions)
    if supervisions is not None and listing.kind != "Lhotse recordings":
        raise HarkenError(f"--supervisions goes with a Lhotse recordings manifest, and {source} is: {listing.kind}")
    return replace(listing, entries=_unique(listing, source))


def _read(source: Path, root: Path | None, supervisions: Path | None) -> Listing:
    if source.is_dir():
        return read_kaldi(source, root) if (source / "wav.scp").is_file() else _folder(source)
    if not source.is_file():
        raise HarkenError(f"no file or folder at {source}")
    if source.name.endswith((".jsonl", ".jsonl.gz", ".json")):
        return _json_lines(source, root, supervisions)
    if source.suffix == ".tsv":
        return _tsv(source, root)
    raise HarkenError(
        f"{source} is none of what can be scanned: a folder of audio, a Kaldi directory (with wav.scp), "
        "a .tsv, .jsonl or .jsonl.gz file"
    )


def _folder(folder: Path) -> Listing:
    listing, visited, hidden = Listing(kind="folder of audio files"), set(), 0
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if path.suffix.lower() not in AUDIO_SUFFIXES:
                continue
            if name.startswith("."):
                hidden += 1
                continue
            listing.entries.append(Entry(id=_identifier(path.relative_to(folder)), path=path.absolute()))
    if not listing.entries:
        raise HarkenError(f"no audio below {folder}: looked for files ending in {', '.join(AUDIO_SUFFIXES)}")
    if hidden:
        listing.notes.append(f"{hidden} hidden audio files (names beginning with a dot) were passed over")
    return listing


def _tsv(path: Path, root: Path | None) -> Listing:
    with open_text(path) as stream:
        lines = (line.rstrip("\r\n") for line in stream)
        first = next(lines, "")
        columns = first.split("\t")
        if set(columns) & set(PATH_KEYS):
            listing = Listing(kind="TSV with a header", notes=_ignored(columns))
            for number, line in enumerate(lines, start=2):
                where, values = f"{path} line {number}", line.split("\t")
                if len(values) != len(columns):
                    raise HarkenError(f"{where} must have the header's {len(columns)} columns, got {len(values)}")
                filled = {name: value for name, value in zip(columns, values, strict=True) if value}
                listing.entries.append(_row(filled, where, path.parent, root))
            return listing
        if len(columns) != 1:
            raise HarkenError(
                f"{path} must begin with fairseq's root folder or with a header that names a column "
                f"{' or '.join(PATH_KEYS)}, got `{first}`"
            )
        listing, base = Listing(kind="fairseq TSV"), root or Path(first)
        for number, line in enumerate(lines, start=2):
            relative, _, samples = line.partition("\t")
            if not samples.isdecimal():
                raise HarkenError(f"{path} line {number} must be `RELATIVE_PATH<TAB>SAMPLES`, got `{line}`")
            listing.entries.append(
                Entry(id=_identifier(relative), path=(base / relative).absolute(), samples=int(samples))
            )
    return listing


def _json_lines(path: Path, root: Path | None, supervisions: Path | None) -> Listing:
    rows = objects(path)
    _, first = next(rows, (0, None))
    rows.close()
    if first is None:
        raise HarkenError(f"{path} is empty")
    if "type" in first or "sources" in first or {"recording_id", "start"} <= set(first):
        return read_lhotse(path, first, root, supervisions)
    listing, unknown = Listing(kind="JSONL"), set()
    for number, row in objects(path):
        unknown |= set(row)
        listing.entries.append(_row(row, f"{path} line {number}", path.parent, root))
    listing.notes += _ignored(unknown)
    return listing


def _identifier(path: str | Path) -> str:
    """Make an id from a path: no suffix, folders joined with dashes."""
    parts = (*Path(path).parent.parts, Path(path).stem)
    return "-".join(part for part in parts if part not in {"/", ".", ".."})


def _row(row: Mapping[str, Any], where: str, folder: Path, root: Path | None) -> Entry:
    """Make an entry from named values: a line of a JSONL or of a TSV with a header."""
    audio = next((row[key] for key in PATH_KEYS if row.get(key)), None)
    if not isinstance(audio, str):
        raise HarkenError(f"{where} must name its audio file in one of {', '.join(PATH_KEYS)}, got {dict(row)}")
    words: dict[str, str | None] = {}
    for key in ("id", "text", "speaker"):
        value = row.get(key)
        if value is not None and not isinstance(value, str | int):
            raise HarkenError(f"{where}: `{key}` must be text, got {value!r}")
        words[key] = None if value is None else str(value)
    offset, duration = (seconds_of(row, key, where) for key in ("offset", "duration"))
    channel = row.get("channel")
    if channel is not None and not str(channel).isdecimal():
        raise HarkenError(f"{where}: `channel` must be a number from 0, got {channel!r}")
    relative = Path(audio)
    made = _identifier(relative.relative_to(folder) if relative.is_relative_to(folder) else relative)
    if row.get("offset") is not None:  # several utterances of one file
        made += f"-{round(1000 * (offset or 0.0)):08d}"
    return Entry(
        id=words["id"] or made,
        path=((root or folder) / audio).absolute(),
        named=words["id"] is not None,
        text=words["text"],
        speaker=words["speaker"],
        offset=offset or 0.0,
        duration=duration,
        channel=None if channel is None else int(channel),
    )


def _ignored(keys: Iterable[str]) -> list[str]:
    unknown = sorted(set(keys) - KNOWN_KEYS - HEADER_KEYS)
    return [f"not read: {', '.join(unknown)} (known: {', '.join(sorted(KNOWN_KEYS))})"] if unknown else []


def _unique(listing: Listing, source: Path) -> list[Entry]:
    """Number the ids made from paths where they meet (`a/b.wav`, `a-b.flac`); ids of the source itself must differ."""
    times: dict[str, int] = {}
    entries, renamed = [], []
    for entry in listing.entries:
        if entry.id in times:
            if entry.named:
                raise HarkenError(
                    f"{source}: id `{entry.id}` occurs twice, the second time for {entry.path}; labels and random "
                    "draws are keyed by id, so make the ids differ"
                )
            while (made := f"{entry.id}-{times[entry.id] + 1}") in times:
                times[entry.id] += 1
            times[entry.id] += 1
            renamed.append(made)
            times[made] = 1
            entries.append(replace(entry, id=made))
            continue
        times[entry.id] = 1
        entries.append(entry)
    if renamed:
        listing.notes.append(
            f"{len(renamed)} ids were numbered because paths give the same id: {', '.join(renamed[:3])}"
        )
    return entries
