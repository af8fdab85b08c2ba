"""Reader of `queen.1c`, the one data file of "Flight of the Amazon Queen": its table, its speech and its text.

The game keeps every spoken line as a bare MP3 entry (`*.SB`) and the text of the lines in three other kinds of entry:
conversations (`*.DOG`), cut scenes (`*.CUT`) and the object descriptions and stock answers (`QUEEN.JAS`, `QUEEN2.JAS`).
The name of a speech entry is built from its place in the text, which is what pairs the two. All numbers are big-endian.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from harken.core.errors import HarkenError

ENTRY = struct.Struct(">12sBII")  # name, bundle, offset, size
TABLE_START = 15  # "QTBL", 6 bytes of version, 2, 1 of compression, uint16 count
MP3 = 1
BANK_HEADER = 20  # bytes before the data of a DOG, CUT or QUEEN.JAS entry
NUM_RESPONSES = 40
NUM_VERBS = 12
LAST_FRAME = -2  # header that ends the frames of an animation in a cut scene
COMMAND = re.compile(r"\*(?:XY.{11}|.{2})", re.DOTALL)

# Several spellings of one character, as they appear in object and file names.
SPEAKER_ALIASES = {
    "TRADER BOB": "BOB", "PRINCESS AZURA": "AZURA", "PRIN": "AZURA", "AZURA OBJ": "AZURA", "AND": "ANDERSON",
    "SEC": "SECRETARY", "WITCH DOCTOR": "WITCH", "MARY-LOU": "LOU", "WEDGE": "WEDGEWOOD",
    "SHOWERAM": "SHOWERING AMAZON", "GORILLA": "APE", "GUARD DOG": "DOG", "ZOMBIE WOMAN": "ZOMBIE", "JIM": "JIMMY",
    "NOTE": "NARR", "PATH": "NARR",
    # The hero's full name; a bellboy who gives his name as Mike Laris; Faye, who steps out of the smoke in one scene.
    "JOE KING": "JOE", "BELLBOY": "LARIS", "SMOKE": "FAYE",
}  # fmt: skip
HERO = "JOE"
NARRATOR = "NARR"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One spoken line: `key` is the name of its speech entry without `.SB`."""

    key: str
    text: str
    speaker: str
    record: str  # dog, cut or jas


@dataclass(kw_only=True)
class QueenFile:
    """The table of `queen.1c` over the bytes of the whole file."""

    data: bytes
    entries: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> offset, size

    def blob(self, name: str) -> bytes:
        """Return the bytes of one entry."""
        offset, size = self.entries[name]
        return self.data[offset : offset + size]

    def names(self, suffix: str) -> list[str]:
        """Return the sorted names of the entries that end in `suffix`."""
        return sorted(name for name in self.entries if name.endswith(suffix))


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Speech entries with their text, and what stayed alone on either side."""

    lines: list[Line]  # sorted by key, one for each paired speech entry
    speech_without_text: list[str]
    text_without_speech: int
    inconsistent: list[str]  # cut scenes whose records do not end where the header says


def open_queen(path: Path) -> QueenFile:
    """Read the table of `path`. Raises HarkenError when it is not the compressed talkie version."""
    data = path.read_bytes()
    if len(data) < TABLE_START or data[:4] != b"QTBL":
        raise HarkenError(f"{path} must be a `queen.1c` that starts with `QTBL`, found {data[:4]!r}")
    if data[12] != MP3:
        raise HarkenError(f"{path}: compression must be {MP3} (MP3), found {data[12]}: take the Debian package's file")
    count = struct.unpack_from(">H", data, 13)[0]
    if TABLE_START + count * ENTRY.size > len(data):
        raise HarkenError(f"{path}: table of {count} entries must fit the file, which ends after {len(data)} bytes")
    queen = QueenFile(data=data)
    for i in range(count):
        raw, _bundle, offset, size = ENTRY.unpack_from(data, TABLE_START + i * ENTRY.size)
        name = raw.split(b"\0")[0].decode("cp437")
        if offset + size > len(data):
            raise HarkenError(f"{path} is cut short: `{name}` must end at byte {offset + size}, file has {len(data)}")
        queen.entries[name] = (offset, size)
    return queen


def int16(data: bytes, offset: int) -> int:
    """Read one signed big-endian 16-bit number."""
    return int(struct.unpack_from(">h", data, offset)[0])


def uint16(data: bytes, offset: int) -> int:
    """Read one unsigned big-endian 16-bit number."""
    return int(struct.unpack_from(">H", data, offset)[0])


def pascal(data: bytes, offset: int, align: int) -> tuple[str, int]:
    """Read a counted string and return it with the offset after it, rounded up to `align` unless it is empty."""
    if offset >= len(data):
        raise IndexError(offset)
    length = data[offset]
    end = offset + 1 + length
    if end > len(data):
        raise IndexError(end)
    text = data[offset + 1 : end].decode("cp437")
    return text, -(-end // align) * align if length else end


def segments(text: str) -> Iterator[tuple[int, str]]:
    """Split a text at its `*` commands and yield (number from 1, words) of the parts that hold any.

    Every command ends a part, an empty one too, so that numbers agree with the names of the speech entries.
    """
    parts = COMMAND.split(text)
    for number, part in enumerate(parts, start=1):
        if part.strip():
            yield number, part.strip()


def canonical_speaker(name: str) -> str:
    """Return the one name of a character."""
    name = " ".join(name.upper().split())
    return SPEAKER_ALIASES.get(name, name)


def lines_of(prefix: str, text: str, speaker: str, record: str) -> Iterator[Line]:
    """Yield one Line for each spoken part of a text whose speech entries start with `prefix`."""
    prefix = prefix.replace(" ", "0")
    for number, words in segments(text):
        yield Line(key=f"{prefix}{number:X}", text=words, speaker=canonical_speaker(speaker), record=record)


def read_dog(name: str, blob: bytes) -> Iterator[Line]:
    """Yield the lines of one conversation (`*.DOG`): the hero's choices, the answers, the opening and closing words."""
    data = blob[BANK_HEADER:]
    levels, talk, hero_rows, person_rows = abs(int16(data, 0)), int16(data, 4), int16(data, 6), int16(data, 8)
    hero_table, person_table, closing = 32 + 96 * levels, uint16(data, 22), uint16(data, 26)
    person = re.sub(r"\d", "", Path(name).stem)
    for table, rows, speaker, letter in (
        (hero_table, hero_rows, HERO, "J"),
        (person_table, person_rows, person, "P"),
    ):
        offset = table
        for _ in range(rows):
            number = int16(data, offset + 2)
            text, offset = pascal(data, offset + 4, 4)
            yield from lines_of(f"{talk:2d}{number:4x}{letter}".upper(), text, speaker, "dog")
    if uint16(data, hero_table + 2) == 0:
        text, _ = pascal(data, hero_table + 4, 2)
        yield from lines_of(f"{talk:2d}SSSSJ", text, HERO, "dog")
    text, offset = pascal(data, closing, 2)
    yield from lines_of(f"{talk:2d}XXXXP", text, person, "dog")
    text, _ = pascal(data, offset, 2)
    yield from lines_of(f"{talk:2d}XXXXJ", text, HERO, "dog")


@dataclass(frozen=True, kw_only=True)
class GameObjects:
    """What QUEEN.JAS says of the objects: the number of each one's name; lists start at 1."""

    name_of: list[int]
    num_rooms: int
    num_names: int
    num_descriptions: int


def read_objects(blob: bytes) -> GameObjects:
    """Read the counts and the object table of QUEEN.JAS."""
    data = blob[BANK_HEADER:]
    rooms, names, objects, descriptions = struct.unpack_from(">4H", data, 0)
    rows = [struct.unpack_from(">8h", data, 8 + 16 * i) for i in range(objects)]
    return GameObjects(
        name_of=[0] + [int(row[0]) for row in rows],
        num_rooms=rooms,
        num_names=names,
        num_descriptions=descriptions,
    )


def read_jas(objects: GameObjects, blob: bytes) -> tuple[list[Line], list[str]]:
    """Return the hero's descriptions and stock answers of QUEEN2.JAS, and the names of things (1-based)."""
    rows = [row.rstrip("\r") for row in blob.decode("cp437").split("\n")]
    names_start = objects.num_descriptions
    responses = names_start + objects.num_names + objects.num_rooms + NUM_VERBS
    if len(rows) < responses + NUM_RESPONSES:
        raise HarkenError(f"QUEEN2.JAS must have {responses + NUM_RESPONSES} lines of text, found {len(rows)}")
    spoken = rows[responses : responses + NUM_RESPONSES] + rows[: objects.num_descriptions]
    lines: list[Line] = []
    for number, text in enumerate(spoken, start=1):
        lines += lines_of(f"JOE{number:04d}", text, HERO, "jas")
    return lines, ["", *rows[names_start : names_start + objects.num_names]]


def read_cut(name: str, blob: bytes, objects: GameObjects, thing_names: list[str]) -> tuple[list[Line], bool]:
    """Return the lines of one cut scene (`*.CUT`) and whether its records agree with its header.

    A record that executes an animation is followed by that animation's frames. That rule ends every scene of the
    Debian package exactly where its header says; a scene that does not agree keeps what was read before its end.
    """
    data = blob[BANK_HEADER:]
    count, records_end, sentence = abs(int16(data, 2)), uint16(data, 6) - 2, uint16(data, 8)
    stem = Path(name).stem.ljust(5, "_")
    lines: list[Line] = []
    offset = 12
    try:
        _, sentence = pascal(data, sentence, 2)
        for index in range(1, count + 1):
            number, executes, people = (
                int16(data, offset),
                int16(data, offset + 10) != 0,
                int16(data, offset + 34),
            )
            offset += 36 + 2 * people
            if executes:
                while int16(data, offset) != LAST_FRAME:
                    offset += 20
                offset += 2
            text, sentence = pascal(data, sentence, 2)
            if text == "*":
                continue
            if number > 0:
                speaker = thing_names[abs(objects.name_of[number])]
            else:
                speaker = HERO if number in (0, -1) else NARRATOR
            lines += lines_of(f"{stem}{index:02d}", text, speaker, "cut")
    except (struct.error, IndexError):
        return lines, False
    return lines, offset == records_end


def pair(queen: QueenFile) -> Pairing:
    """Match every speech entry with its text and character."""
    missing = [name for name in ("QUEEN.JAS", "QUEEN2.JAS") if name not in queen.entries]
    if missing:
        raise HarkenError(f"queen.1c must hold the game's texts, entries missing: {', '.join(missing)}")
    objects = read_objects(queen.blob("QUEEN.JAS"))
    jas, thing_names = read_jas(objects, queen.blob("QUEEN2.JAS"))
    texts: list[Line] = []
    inconsistent: list[str] = []
    for name in queen.names(".DOG"):
        try:
            texts += read_dog(name, queen.blob(name))
        except (struct.error, IndexError) as error:
            raise HarkenError(f"queen.1c: conversation `{name}` ends inside a record; is the file whole?") from error
    for name in queen.names(".CUT"):
        lines, agrees = read_cut(name, queen.blob(name), objects, thing_names)
        texts += lines
        if not agrees:
            inconsistent.append(name)
    texts += jas
    by_key: dict[str, Line] = {}
    for line in texts:
        by_key.setdefault(line.key, line)
    speech = [name.removesuffix(".SB") for name in queen.names(".SB")]
    return Pairing(
        lines=[by_key[key] for key in speech if key in by_key],
        speech_without_text=[key for key in speech if key not in by_key],
        text_without_speech=len(by_key.keys() - set(speech)),
        inconsistent=inconsistent,
    )


def count_records(lines: list[Line]) -> dict[str, int]:
    """Return how many lines come from each kind of record."""
    return dict(sorted(Counter(line.record for line in lines).items()))
