#!/usr/bin/env python3
"""Prepare Libri-light: a Lhotse manifest of stretches of speech, from its FLAC files and the JSON beside each."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from harken.core.errors import HarkenError
from harken.core.files import atomic_path, write_json_atomic, write_text_atomic

PARTS = ("small", "medium", "large")
EXAMPLES = """\
examples:
  python local/prepare.py --out data --corpus /corpora/librilight   # small, medium and large: 60,000 h
  python local/prepare.py --out data --corpus /corpora/librilight --parts small --seconds 30
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl")
    parser.add_argument("--corpus", type=Path, required=True, help="folder that holds small/, medium/, large/")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all three)")
    parser.add_argument(
        "--seconds", type=float, default=15.6, help="longest stretch; 15.6 is what a crop of HuBERT holds (%(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    args = parser.parse_args(argv)
    if args.jobs < 1 or not args.seconds > 0:
        parser.error(f"`--jobs` must be at least 1 and `--seconds` positive, got {args.jobs} and {args.seconds}")
    try:
        prepare(args)
    except HarkenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(args: argparse.Namespace) -> None:
    """Write `train.jsonl`, `dropped.tsv` and `summary.json`.

    Raises HarkenError for a part that is not there, and when nothing of it can be used.
    """
    corpus: Path = args.corpus.resolve()
    files = [path for part in args.parts for path in audio_files(corpus, part)]
    args.out.mkdir(parents=True, exist_ok=True)
    dropped, cuts, seconds = [], 0, 0.0
    read = partial(read_file, corpus, args.seconds)
    with atomic_path(args.out / "train.jsonl") as temporary, temporary.open("w", encoding="utf-8") as stream:
        with ProcessPoolExecutor(args.jobs) as pool:
            for path, (rows, reason) in zip(files, pool.map(read, files, chunksize=16), strict=True):
                if reason:
                    dropped.append(f"{path}\t{reason}\n")
                stream.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
                cuts, seconds = cuts + len(rows), seconds + sum(row["duration"] for row in rows)
        if not cuts:
            raise HarkenError(f"none of {len(files)} files in {corpus} can be used, the first: {dropped[0].strip()}")
    write_text_atomic(args.out / "dropped.tsv", "path\treason\n" + "".join(dropped))
    summary = {"parts": args.parts, "files": len(files), "dropped": len(dropped), "cuts": cuts, "hours": seconds / 3600}
    write_json_atomic(args.out / "summary.json", summary)
    print("{files} files, {dropped} of them dropped: {cuts} cuts, {hours:.3f} h".format(**summary))


def audio_files(corpus: Path, part: str) -> list[Path]:
    """Return the FLAC files of a part, sorted. Raises HarkenError when there are none."""
    files = sorted((corpus / part).rglob("*.flac"))
    if not files:
        raise HarkenError(
            f"{corpus / part} must hold SPEAKER/BOOK/*.flac, and holds none: unpack {part}.tar of Libri-light there, "
            "or name other --parts"
        )
    return files


def read_file(corpus: Path, longest: float, path: Path) -> tuple[list[dict[str, Any]], str]:
    """Return the cuts of a file as plain data, or none and why it cannot be used."""
    from lhotse import MonoCut, Recording

    try:
        told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        speech = [(float(start), float(end)) for start, end in told["voice_activity"]]
        speaker = str(told["speaker"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [], f"its .json gives no speaker and voice_activity: {error!r}"
    name = "-".join(path.relative_to(corpus).with_suffix("").parts)
    try:
        recording = Recording.from_file(path, recording_id=name)
    except Exception as error:  # noqa: BLE001  each backend of Lhotse raises its own kinds
        return [], f"cannot be read: {' '.join(str(error).split())}"
    rows = []
    for number, (start, end) in enumerate(stretches(speech, longest, recording.duration)):
        cut = MonoCut(id=f"{name}-{number:05d}", start=start, duration=round(end - start, 6), channel=0)
        cut.recording, cut.custom = recording, {"speaker": speaker}
        rows.append(cut.to_dict())
    return rows, "" if rows else "its voice_activity is empty"


def stretches(speech: Sequence[tuple[float, float]], longest: float, duration: float) -> Iterator[tuple[float, float]]:
    """Yield (start, end) in seconds that cover the speech and are at most `longest` long.

    Neighbouring pieces of speech are joined, with the pauses between them, as far as they fit; a piece that is longer
    is divided evenly. Libri-light's own `cut_by_vad.py` leaves the pauses out, which would need new audio files.
    """
    start = end = 0.0
    for first, last in speech:
        first, last = max(first, end), min(last, duration)
        if last <= first:
            continue
        if end > start and last - start <= longest:
            end = last
            continue
        if end > start:
            yield start, end
        count = max(1, -(-(last - first) // longest))
        size = (last - first) / count
        for piece in range(int(count) - 1):
            yield first + piece * size, first + (piece + 1) * size
        start, end = last - size, last
    if end > start:
        yield start, end


if __name__ == "__main__":
    sys.exit(main())
