"""Entries: utterances as a source states them, the lines they are read from, and the texts that are added to them."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from harken.core.errors import HarkenError

if TYPE_CHECKING:
    from lhotse import MonoCut


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One utterance as its source states it.

    named: the source gave the id itself; otherwise it was made from the path. offset, duration: seconds within the
    file; without a duration the utterance ends with the file. samples: length of the whole file as the source has it.
    cut: the Lhotse cut, where the source is a Lhotse manifest.
    """

    id: str
    path: Path
    named: bool = False
    recording: str | None = None
    text: str | None = None
    speaker: str | None = None
    offset: float = 0.0
    duration: float | None = None
    channel: int | None = None
    samples: int | None = None
    cut: MonoCut | None = None


@dataclass(kw_only=True)
class Listing:
    """The entries of a source.

    kind: its layout, in words. refused: (id, path, reason). notes: what the user is told.
    """

    kind: str
    entries: list[Entry] = field(default_factory=list)
    refused: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong while text is read (no permission, no UTF-8, half a gzip file) into a HarkenError."""
    try:
        yield
    except (UnicodeDecodeError, EOFError, zlib.error, OSError) as error:
        raise HarkenError(f"cannot read {path}: {error}") from error


def open_text(path: Path) -> TextIO:
    """Open UTF-8 text, through gzip where the name says so."""
    stream = io.BufferedReader(gzip.GzipFile(path)) if path.suffix == ".gz" else path.open("rb")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n")


def read_table(path: Path, needed: int = 2) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, fields) of a Kaldi-style file: a key, white space, the rest of the line.

    Raises HarkenError for a line of fewer fields than `needed`.
    """
    with open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            fields = line.rstrip("\r\n").split(maxsplit=1)
            if len(fields) < needed:
                raise HarkenError(f"{path} line {number} must be `ID VALUE`, got `{line.strip()}`")
            yield number, [*fields, ""][:2]


def objects(path: Path) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """Yield (line number, object) of a file of JSON lines; empty lines are passed over.

    Raises HarkenError naming a line that is no object.
    """
    with open_text(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise HarkenError(f"{path} line {number} must be one JSON object: {error}") from error
            if not isinstance(row, dict):
                raise HarkenError(f"{path} line {number} must be one JSON object, got {type(row).__name__}")
            yield number, row


def seconds_of(row: Mapping[str, Any], key: str, where: str) -> float | None:
    """Return the seconds that `row[key]` states, if any. Raises HarkenError, beginning with `where`, for no number."""
    value = row.get(key)
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise HarkenError(f"{where}: `{key}` must be a number of seconds, got {value!r}") from error


def add_texts(listing: Listing, text: str) -> None:
    """Give the entries of a listing their texts.

    text: a suffix such as `.txt` of files beside the audio; fairseq's `.wrd` or `.ltr` with a line for each entry; or
    a file of `ID TEXT` lines, an id being the entry's or, where it is the only one so named, its file's name without
    suffix.
    Raises HarkenError when not one text is found.
    """
    entries = listing.entries
    if any(entry.cut is not None for entry in entries):
        raise HarkenError("a Lhotse manifest brings its own texts: give them in supervisions, not with --text")
    path = Path(text)
    with readable(path):
        if text.startswith(".") and not path.exists():
            files = [entry.path.with_suffix(text) for entry in entries]
            texts = [_one_line(file.read_text(encoding="utf-8")) if file.is_file() else None for file in files]
        elif path.suffix in {".wrd", ".ltr"}:
            texts = _fairseq_lines(path, len(entries))
        else:
            texts = _by_id(path, listing)
    missing = [entry.id for entry, words in zip(entries, texts, strict=True) if words is None]
    if len(missing) == len(entries):
        raise HarkenError(
            f"--text {text} has no text for any of {len(entries)} utterances; the first id is `{missing[0]}`"
        )
    if missing:
        listing.notes.append(f"{len(missing)} utterances have no text in {text}, first `{missing[0]}`")
    pairs = zip(entries, texts, strict=True)
    listing.entries = [entry if words is None else replace(entry, text=words) for entry, words in pairs]


def _by_id(path: Path, listing: Listing) -> list[str | None]:
    table = {key: _one_line(value) for _, (key, value) in read_table(path, 1)}
    # a corpus's own lists name files without their folders; a segment of a file is not meant by the file's name
    times = Counter(entry.path.stem for entry in listing.entries)
    keys = [
        entry.path.stem if entry.id not in table and times[entry.path.stem] == 1 else entry.id
        for entry in listing.entries
    ]
    if unused := sorted(set(table) - set(keys)):
        listing.notes.append(f"{len(unused)} lines of {path} match no audio, first `{unused[0]}`")
    return [table.get(key) for key in keys]


def _fairseq_lines(path: Path, count: int) -> list[str | None]:
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    if len(lines) != count:
        raise HarkenError(f"{path} must have one line for each of {count} utterances, got {len(lines)}")
    if path.suffix == ".ltr":  # letters with spaces between, words ended by a bar
        lines = [line.replace(" ", "").replace("|", " ") for line in lines]
    return [_one_line(line) for line in lines]


def _one_line(text: str) -> str:
    return " ".join(text.split())
