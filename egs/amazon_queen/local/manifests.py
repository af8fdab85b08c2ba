"""What preparation writes: Lhotse manifests, the list of dropped lines, characters, summary and the notice."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fetch import DATA_FILE, PACKAGE, Corpus
from splits import SPLITS, Utterance, overlaps, subset_name

from harken.core.errors import HarkenError
from harken.core.files import atomic_path, write_text_atomic

NOTICE = """\
The audio and texts in this folder are derived from "Flight of the Amazon Queen", (C) John Passfield and Steven
Stamatiadis, as packaged for Debian ({package}). They are a MODIFIED version: speech was extracted,
resampled to 16 kHz FLAC and paired with its text by harken's recipe. The game must not be sold. Keep this notice
with anything derived. Source of this copy: {origin}

"""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One usable line with its file."""

    utterance: Utterance
    raw_text: str
    record: str
    path: Path  # absolute
    samples: int
    rate: int

    @property
    def seconds(self) -> float:
        """Length of the file."""
        return self.samples / self.rate


def make_cut(item: Item) -> dict[str, Any]:
    """Return the Lhotse cut of one line as plain data: its recording and one supervision over all of it."""
    from lhotse import MonoCut, Recording, SupervisionSegment
    from lhotse.audio import AudioSource

    u = item.utterance
    recording = Recording(
        id=u.id,
        sources=[AudioSource(type="file", channels=[0], source=str(item.path))],
        sampling_rate=item.rate,
        num_samples=item.samples,
        duration=item.seconds,
    )
    supervision = SupervisionSegment(
        id=u.id,
        recording_id=u.id,
        start=0.0,
        duration=recording.duration,
        channel=0,
        text=u.text,
        language="English",
        speaker=u.speaker,
        custom={"raw_text": item.raw_text, "record": item.record},
    )
    cut = MonoCut(id=u.id, start=0.0, duration=recording.duration, channel=0)
    cut.recording = recording
    cut.supervisions = [supervision]
    plain: dict[str, Any] = cut.to_dict()
    return plain


def write_manifests(out: Path, items: Mapping[str, Item], lists: Mapping[str, list[str]]) -> None:
    """Write `out/NAME.jsonl` for every list of identifiers, sorted, uncompressed so that it can be indexed."""
    for name, ids in lists.items():
        with atomic_path(out / f"{name}.jsonl") as temporary:
            rows = [json.dumps(make_cut(items[i]), ensure_ascii=False) for i in sorted(ids)]
            temporary.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def check_manifests(out: Path, lists: Mapping[str, list[str]]) -> None:
    """Read the manifests back through Lhotse. Raises HarkenError when one does not hold the lines it should."""
    from lhotse import CutSet

    for name, ids in lists.items():
        if not ids:
            continue  # an empty file has no type for Lhotse to see
        found = [cut.id for cut in CutSet.from_file(out / f"{name}.jsonl")]
        if found != sorted(ids):
            raise HarkenError(f"{out / name}.jsonl must hold {len(ids)} cuts in order, found {len(found)}")


def write_dropped(path: Path, dropped: Mapping[str, str]) -> None:
    """Write every speech entry that is in no manifest with the reason."""
    rows = [f"{identifier}\t{reason}\n" for identifier, reason in sorted(dropped.items())]
    write_text_atomic(path, "id\treason\n" + "".join(rows))


def write_characters(path: Path, splits: Mapping[str, list[Utterance]], items: Mapping[str, Item]) -> None:
    """Write lines and minutes of each character in each split, the most talkative first."""
    seconds: dict[str, float] = defaultdict(float)
    lines: Counter[tuple[str, str]] = Counter()
    for name, part in splits.items():
        for u in part:
            seconds[u.speaker] += items[u.id].seconds
            lines[u.speaker, name] += 1
    rows = ["\t".join(("character", "minutes", "lines", *SPLITS)) + "\n"]
    for speaker in sorted(seconds, key=lambda s: (-seconds[s], s)):
        counts = [lines[speaker, name] for name in SPLITS]
        cells = (speaker, f"{seconds[speaker] / 60:.2f}", *map(str, (sum(counts), *counts)))
        rows.append("\t".join(cells) + "\n")
    write_text_atomic(path, "".join(rows))


def write_notice(path: Path, corpus: Corpus) -> None:
    """Write the package's copyright text below a note that says what was changed."""
    if corpus.copyright is not None:
        text = corpus.copyright.read_text(encoding="utf-8", errors="replace")
    else:
        text = f"No copyright file lay beside {DATA_FILE}: the licence is in the Debian package {PACKAGE}.\n"
    write_text_atomic(path, NOTICE.format(package=PACKAGE, origin=corpus.origin) + text)


def split_summary(
    splits: Mapping[str, list[Utterance]], subsets: Mapping[int, list[str]], items: Mapping[str, Item]
) -> dict[str, Any]:
    """Return lines, minutes and characters of each split and subset, and the proof that texts are disjoint."""
    parts = {name: splits[name] for name in SPLITS}
    parts |= {subset_name(minutes): [items[i].utterance for i in ids] for minutes, ids in subsets.items()}
    described = {
        name: {
            "utterances": len(part),
            "minutes": round(sum(items[u.id].seconds for u in part) / 60, 2),
            "texts": len({u.text for u in part}),
            "words": sum(len(u.text.split()) for u in part),
            "characters": sorted({u.speaker for u in part}),
        }
        for name, part in parts.items()
    }
    return {"splits": described, "overlap": overlaps(dict(splits))}
