#!/usr/bin/env python3
"""Prepare "Flight of the Amazon Queen": fetch, read, decode, split, and write Lhotse manifests."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

from audio import RATE, Job, Sound, extract_all, flac_path, sound_id
from fetch import Corpus, find_corpus
from manifests import (
    Item,
    check_manifests,
    split_summary,
    write_characters,
    write_dropped,
    write_manifests,
    write_notice,
)
from queen import Line, Pairing, QueenFile, count_records, open_queen, pair
from splits import SPLITS, Utterance, assign, make_subsets, overlaps, read_subsets, subset_name, write_subsets
from text import normalise

from harken.core.errors import HarkenError
from harken.core.files import sha256_file, write_json_atomic

MP3_BYTES_A_SECOND = 2000  # every speech entry of the package has constant 16 kbit/s
SUBSETS = Path(__file__).resolve().parent.parent / "subsets"
EXAMPLES = """\
examples:
  python local/prepare.py --out data                        # fetch the package with apt-get, no root needed
  python local/prepare.py --out data --corpus ~/Downloads   # a folder with the .deb, or with queen.1c
  python local/prepare.py --out data --corpus /usr/share/scummvm/flight-of-the-amazon-queen/queen.1c --jobs 8
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for flac/ and the manifests (about 320 MB)")
    parser.add_argument("--corpus", type=Path, help="a folder, a .deb or queen.1c to use instead of fetching")
    parser.add_argument("--download-dir", type=Path, help="where the package is kept and unpacked (OUT/download)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="decoding processes (%(default)s)")
    parser.add_argument("--force", action="store_true", help="write audio again that an earlier run has written")
    parser.add_argument("--subsets", type=Path, default=SUBSETS, help="folder of the fixed subset lists (%(default)s)")
    parser.add_argument("--write-subsets", action="store_true", help="make the subset lists again, for maintainers")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"`--jobs` must be at least 1, got {args.jobs}")
    try:
        prepare(args)
    except HarkenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(args: argparse.Namespace) -> None:
    """Run every step and print what each found and took."""
    clock = Clock()
    out: Path = args.out.resolve()
    corpus = find_corpus(args.corpus, args.download_dir or out / "download")
    clock.say("fetch", f"reads {corpus.data}")
    queen = open_queen(corpus.data)
    pairing = pair(queen)
    paired = len(pairing.lines)
    clock.say(
        "read",
        f"{len(queen.entries)} entries, {paired} of {len(queen.names('.SB'))} speech entries have a text",
    )
    sounds = decode(queen, corpus, out / "flac", args)
    clock.say("audio", f"{sum(s.kept for s in sounds.values())} of {len(sounds)} files were there already")
    items, dropped = select(queen, pairing, sounds, out / "flac")
    assignment = assign([item.utterance for item in items.values()])
    dropped |= assignment.left_out
    splits = assignment.splits
    if any(pair["texts"] or pair["utterances"] for pair in overlaps(splits).values()):
        raise HarkenError(f"splits must share no text and no utterance, found {overlaps(splits)}")
    if args.write_subsets:
        write_subsets(args.subsets, make_subsets(splits["train"]))
    subsets = read_subsets(args.subsets, splits["train"])
    clock.say("split", ", ".join(f"{name} {len(splits[name])}" for name in SPLITS) + f", dropped {len(dropped)}")
    lists: dict[str, list[str]] = {name: [u.id for u in splits[name]] for name in SPLITS}
    lists |= {subset_name(minutes): ids for minutes, ids in subsets.items()}
    write_manifests(out, items, lists)
    check_manifests(out, lists)
    write_dropped(out / "dropped.tsv", dropped)
    write_characters(out / "characters.tsv", splits, items)
    write_notice(out / "COPYRIGHT", corpus)
    clock.say("manifests", f"{len(lists)} in {out}")
    summary = {
        "source": {"origin": corpus.origin, "queen.1c sha256": sha256_file(corpus.data)},
        "entries": len(queen.entries),
        "speech_entries": len(queen.names(".SB")),
        "paired": paired,
        "paired_by_record": count_records(pairing.lines),
        "inconsistent_cut_scenes": pairing.inconsistent,
        "decoded_above_full_scale": sum(s.overshoots for s in sounds.values()),
        **split_summary(splits, subsets, items),
        "dropped": dict(Counter(reason_kind(reason) for reason in dropped.values()).most_common()),
        "seconds": clock.seconds,
    }
    write_json_atomic(out / "summary.json", summary)
    report(splits, items, dropped, clock)


def decode(queen: QueenFile, corpus: Corpus, folder: Path, args: argparse.Namespace) -> dict[str, Sound]:
    """Extract every speech entry, with or without a text, and return them by identifier."""
    jobs = []
    for name in queen.names(".SB"):
        offset, size = queen.entries[name]
        jobs.append(Job(id=sound_id(name.removesuffix(".SB")), offset=offset, size=size))
    if len({job.id for job in jobs}) != len(jobs):
        raise HarkenError(f"{corpus.data}: names of speech entries must differ in more than case")
    sounds = extract_all(jobs, data_file=corpus.data, folder=folder, force=args.force, processes=args.jobs)
    return {sound.id: sound for sound in sounds}


def select(
    queen: QueenFile, pairing: Pairing, sounds: dict[str, Sound], flac: Path
) -> tuple[dict[str, Item], dict[str, str]]:
    """Return the usable lines by identifier, and for every other speech entry the reason why it is not used."""
    dropped = {sound_id(key): sounds[sound_id(key)].reason or "no text" for key in pairing.speech_without_text}
    items: dict[str, Item] = {}
    first_with: dict[bytes, str] = {}
    for line in pairing.lines:
        identifier = sound_id(line.key)
        sound, normalised = sounds[identifier], normalise(line.text)
        blob = queen.blob(f"{line.key}.SB")
        reason = sound.reason or normalised.reason
        if not reason and blob in first_with:
            reason = f"same recording: as {first_with[blob]}"
        if reason:
            dropped[identifier] = reason
            continue
        first_with[blob] = identifier
        items[identifier] = make_item(line, identifier, normalised.text, len(blob) / MP3_BYTES_A_SECOND, sound, flac)
    return items, dropped


def make_item(line: Line, identifier: str, text: str, nominal_seconds: float, sound: Sound, flac: Path) -> Item:
    """Put one line and its sound together."""
    utterance = Utterance(
        id=identifier, text=text, speaker=line.speaker, scene=line.key[:5].lower(), seconds=nominal_seconds
    )
    return Item(
        utterance=utterance,
        raw_text=line.text,
        record=line.record,
        path=flac_path(flac, identifier),
        samples=sound.samples,
        rate=RATE,
    )


def reason_kind(reason: str) -> str:
    """Return a reason without its detail."""
    return reason.partition(":")[0]


class Clock:
    """Prints a line a step with the seconds it took, and keeps them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = self._last = time.perf_counter()

    def say(self, step: str, words: str) -> None:
        """Close `step` and print what it found."""
        now = time.perf_counter()
        self.seconds[step] = round(now - self._last, 2)
        self.seconds["total"] = round(now - self._started, 2)
        self._last = now
        print(f"{step}: {words} ({self.seconds[step]:.1f} s)", flush=True)


def report(splits: dict[str, list[Utterance]], items: dict[str, Item], dropped: dict[str, str], clock: Clock) -> None:
    """Print the counts, hours and cost at the end."""
    for name in SPLITS:
        part = splits[name]
        hours = sum(items[u.id].seconds for u in part) / 3600
        print(f"  {name:12} {len(part):5} utterances {hours:7.3f} h {len({u.speaker for u in part}):4} characters")
    for reason, count in Counter(reason_kind(reason) for reason in dropped.values()).most_common():
        print(f"  dropped {count:4}: {reason}")
    print(f"done in {clock.seconds['total']:.1f} s; dropped lines are named in dropped.tsv")


if __name__ == "__main__":
    sys.exit(main())
