"""Miniatures of LibriSpeech and Libri-light, laid out as the originals are, from real speech or from tones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

RATE = 16000
SPLITS = {
    "train-clean-100": 24,
    "train-clean-360": 12,
    "train-other-500": 16,
    "dev-clean": 4,
    "dev-other": 6,
    "test-clean": 4,
    "test-other": 4,
}
HOUR = tuple(f"1h/{part}" for part in range(6))
TONES = {"A": 300.0, "B": 700.0, "C": 1500.0, "D": 3100.0, " ": 0.0}
QUEEN = Path(__file__).parents[2] / "egs/amazon_queen/data/train.jsonl"


@dataclass(frozen=True)
class Spoken:
    """Samples at 16 kHz and their text in capitals."""

    samples: np.ndarray
    text: str


def spoken() -> Iterator[Spoken]:
    """Yield utterances: lines of the default corpus where it is prepared, else tones that spell their text."""
    if QUEEN.is_file():
        from harken.data.manifest import Manifest
        from harken.data.read import read_cut

        for cut in Manifest(QUEEN):
            if 1.5 < cut.duration < 4.0:
                yield Spoken(np.asarray(read_cut(cut, RATE)), cut.supervisions[0].text.upper())
    rng = np.random.default_rng(0)
    while True:
        words = ["".join(rng.choice(list("ABCD"), size=int(rng.integers(2, 5)))) for _ in range(3)]
        text = " ".join(words)
        samples = int(0.2 * len(text) * rng.uniform(0.9, 1.1) * RATE)
        pitch = np.repeat([TONES[character] for character in text], -(-samples // len(text)))[:samples]
        wave = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE) + 0.02 * rng.standard_normal(samples)
        yield Spoken(wave, text)


def write_chapter(folder: Path, speaker: int, chapter: int, lines: list[Spoken]) -> None:
    """Write `SPEAKER/CHAPTER/` with FLAC files and `SPEAKER-CHAPTER.trans.txt`."""
    place = folder / str(speaker) / str(chapter)
    place.mkdir(parents=True)
    ids = [f"{speaker}-{chapter}-{number:04d}" for number in range(len(lines))]
    for identifier, line in zip(ids, lines, strict=True):
        soundfile.write(place / f"{identifier}.flac", line.samples, RATE)
    rows = [f"{identifier} {line.text}\n" for identifier, line in zip(ids, lines, strict=True)]
    (place / f"{speaker}-{chapter}.trans.txt").write_text("".join(rows), encoding="utf-8")


def make_librispeech(root: Path) -> Path:
    """Write `root/LibriSpeech` and `root/librispeech_finetuning`, about two minutes; returns `root`.

    Two speakers a split and two chapters a speaker; the labelled sets repeat utterances of the training splits, as
    Libri-light's do.
    """
    source = spoken()
    corpus = root / "LibriSpeech"
    speakers = ["; the columns of the original\n;ID  |SEX| SUBSET           |MINUTES| NAME\n"]
    chapters = [";ID    |READER|MINUTES| SUBSET           | PROJ.|BOOK ID| CH. TITLE | PROJECT TITLE\n"]
    for place, (split, count) in enumerate(SPLITS.items()):
        for number in range(4):
            speaker, chapter = 100 + 10 * place + number // 2, 1000 + 10 * place + number
            lines = [next(source) for _ in range(count // 4 + (number < count % 4))]
            write_chapter(corpus / split, speaker, chapter, lines)
            minutes = sum(len(line.samples) for line in lines) / RATE / 60
            chapters.append(f"{chapter:<6} | {speaker:<4} | {minutes:<5.2f} | {split:<16} | 1 | 1 | One | One\n")
            if number % 2 == 0:
                speakers.append(f"{speaker:<4} | F | {split:<16} | {minutes:<5.2f} | Reader {speaker}\n")
    (corpus / "SPEAKERS.TXT").write_text("".join(speakers), encoding="utf-8")
    (corpus / "CHAPTERS.TXT").write_text("".join(chapters), encoding="utf-8")
    labelled = root / "librispeech_finetuning"
    for kind, split in (("clean", "train-clean-100"), ("other", "train-other-500")):
        audio = iter(sorted((corpus / split).glob("*/*/*.flac")))
        for part in (*HOUR, *HOUR, "9h", "9h", "9h"):
            path = next(audio)
            place = labelled / part / kind / path.parent.relative_to(corpus / split)
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
            with (place / f"{place.parent.name}-{place.name}.trans.txt").open("a", encoding="utf-8") as stream:
                stream.write(f"{path.stem} {text_of(path)}\n")
    return root


def text_of(path: Path) -> str:
    """Return the transcript of a FLAC file of the corpus."""
    for row in next(path.parent.glob("*.trans.txt")).read_text(encoding="utf-8").splitlines():
        identifier, text = row.split(maxsplit=1)
        if identifier == path.stem:
            return text
    raise AssertionError(f"{path} has no transcript")


def make_librilight(root: Path, files: int = 6) -> Path:
    """Write `root/small/SPEAKER/BOOK/*.flac` with the JSON of Libri-light beside each; returns `root`.

    A file is four utterances and the pauses between them, which `voice_activity` leaves out.
    """
    source = spoken()
    for number in range(files):
        place = root / "small" / str(50 + number // 2) / f"book_{number % 2}"
        place.mkdir(parents=True)
        pieces, speech, at = [], [], 0
        for line in (next(source) for _ in range(4)):
            speech.append([at / RATE, (at + len(line.samples)) / RATE])
            pieces += [line.samples, np.zeros(RATE // 2)]
            at += len(line.samples) + RATE // 2
        soundfile.write(place / f"chapter_{number}.flac", np.concatenate(pieces), RATE)
        told = {"speaker": str(50 + number // 2), "snr": 20.0, "voice_activity": speech, "book_meta": {}}
        (place / f"chapter_{number}.json").write_text(json.dumps(told), encoding="utf-8")
    return root
