#!/usr/bin/env python3
"""Prepare LibriSpeech and the small labelled sets of Libri-light: fetch them, and write Lhotse manifests."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harken.core.errors import HarkenError
from harken.core.files import atomic_path, write_json_atomic

CORPUS, FINETUNING = "LibriSpeech", "librispeech_finetuning"
TRAIN = ("train-clean-100", "train-clean-360", "train-other-500")
TESTS = ("dev-clean", "dev-other", "test-clean", "test-other")
LISTS = {"train-960h": TRAIN, "train-100h": TRAIN[:1], **{name: (name,) for name in TESTS}}
# The folders of Libri-light's labelled sets, each of which holds `clean` and `other`: the first sixth of the hour is
# the 10 minutes, and the 9 hours are those that the 10 have besides it.
# Source: arXiv 1912.07875, and the folders of its download.
HOUR = tuple(f"1h/{part}" for part in range(6))
LABELLED = {"train-10min": HOUR[:1], "train-1h": HOUR, "train-10h": (*HOUR, "9h")}
FINETUNING_URL = "https://dl.fbaipublicfiles.com/librilight/data/librispeech_finetuning.tgz"
EXAMPLES = """\
examples:
  python local/prepare.py --out data                            # fetches 60 GB of LibriSpeech and 0.6 GB of Libri-light
  python local/prepare.py --out data --corpus /corpora          # /corpora/LibriSpeech, /corpora/librispeech_finetuning
  python local/prepare.py --out data --corpus /corpora/LibriSpeech --finetuning /corpora/librispeech_finetuning
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the manifests")
    parser.add_argument("--corpus", type=Path, help=f"{CORPUS}, or the folder it is in; nothing is fetched then")
    parser.add_argument("--finetuning", type=Path, help=f"{FINETUNING} of Libri-light (default: beside {CORPUS})")
    parser.add_argument("--download-dir", type=Path, help="where what is fetched goes (OUT/download)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="threads that read headers (%(default)s)")
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
    """Write a manifest for each list, and say what each holds.

    Raises HarkenError for what is missing, and when training speech is in a development or test set.
    """
    downloads = args.download_dir or args.out / "download"
    corpus = find_corpus(args.corpus, downloads)
    finetuning = find_finetuning(args.finetuning, corpus, None if args.corpus else downloads)
    splits = {split: read_split(corpus, split, args.jobs) for split in (*TRAIN, *TESTS)}
    lists = {name: [cut for split in parts for cut in splits[split]] for name, parts in LISTS.items()}
    if finetuning is not None:
        parts = {
            part: [cut for kind in ("clean", "other") for cut in read_split(finetuning / part, kind, args.jobs)]
            for part in LABELLED["train-10h"]
        }
        lists |= {name: [cut for part in names for cut in parts[part]] for name, names in LABELLED.items()}
    check_disjoint(lists)
    args.out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, dict[str, Any]] = {}
    for name, cuts in lists.items():
        write_manifest(args.out / f"{name}.jsonl", cuts)
        summary[name] = describe(cuts)
        print("  {:12} {utterances:7} utterances {hours:9.3f} h {speakers:5} speakers".format(name, **summary[name]))
    write_json_atomic(args.out / "summary.json", {"corpus": str(corpus), "finetuning": str(finetuning), **summary})


def find_corpus(given: Path | None, downloads: Path) -> Path:
    """Return the folder that holds the seven splits: in what is given, or fetched by Lhotse's recipe.

    Raises HarkenError when splits are missing.
    """
    if given is None:
        from lhotse.recipes import download_librispeech

        print(f"fetching {CORPUS} to {downloads}: 60 GB; an interrupted fetch goes on where it was", flush=True)
        return Path(download_librispeech(downloads, dataset_parts="librispeech")).resolve()
    folder = given / CORPUS if (given / CORPUS).is_dir() else given
    missing = [split for split in (*TRAIN, *TESTS) if not (folder / split).is_dir()]
    if missing:
        raise HarkenError(
            f"{folder} must hold the seven splits of {CORPUS}, and lacks {', '.join(missing)}: unpack them there, or "
            "leave --corpus out to have them fetched"
        )
    return folder.resolve()


def find_finetuning(given: Path | None, corpus: Path, downloads: Path | None) -> Path | None:
    """Return the folder of Libri-light's labelled sets: given, beside the corpus, or fetched.

    downloads: None where nothing is to be fetched; what is not there is then said, and None returned.
    Raises HarkenError when the folder lacks one of its parts.
    """
    folder = given or next((path for path in (corpus.parent / FINETUNING, corpus / FINETUNING) if path.is_dir()), None)
    if folder is None and downloads is not None:
        folder = fetch_finetuning(downloads)
    if folder is None:
        print(
            f"no {FINETUNING} beside {corpus}: the sets of 10 min, 1 h and 10 h are left out. --finetuning names the "
            f"folder; it is unpacked from {FINETUNING_URL}"
        )
        return None
    missing = [
        f"{part}/{kind}"
        for part in LABELLED["train-10h"]
        for kind in ("clean", "other")
        if not (folder / part / kind).is_dir()
    ]
    if missing:
        raise HarkenError(
            f"{folder} must hold 1h/0 to 1h/5 and 9h, each with clean and other, and lacks {', '.join(missing)}: "
            f"unpack {FINETUNING_URL} again"
        )
    return folder.resolve()


def fetch_finetuning(downloads: Path) -> Path:
    """Fetch and unpack Libri-light's labelled sets, unless they are there; returns their folder."""
    from lhotse.utils import resumable_download, safe_extract

    done = downloads / FINETUNING / ".completed"
    if not done.is_file():
        archive = downloads / f"{FINETUNING}.tgz"
        print(f"fetching {FINETUNING_URL}", flush=True)
        resumable_download(FINETUNING_URL, filename=archive)
        with tarfile.open(archive) as packed:
            safe_extract(packed, path=downloads)
        done.touch()
    return done.parent


def read_split(folder: Path, split: str, jobs: int) -> list[dict[str, Any]]:
    """Return the cuts of `folder/split` as plain data, sorted by id: one for each line of its transcripts.

    Raises HarkenError when there are none, or lines whose audio is not there.
    """
    from lhotse import MonoCut
    from lhotse.recipes import prepare_librispeech

    listed = sorted(
        line.split(maxsplit=1)[0]
        for path in (folder / split).rglob("*.trans.txt")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip()
    )
    if not listed:
        raise HarkenError(f"{folder / split} must hold transcripts, SPEAKER/CHAPTER/*.trans.txt, and has none")
    absent = [identifier for identifier in listed if not audio_path(folder / split, identifier).is_file()]
    if absent:
        raise HarkenError(
            f"{len(absent)} of {len(listed)} transcripts in {folder / split} have no audio, the first "
            f"{audio_path(folder / split, absent[0])}: unpack the archive again"
        )
    found = prepare_librispeech(folder, dataset_parts=[split], num_jobs=jobs)[split]
    recordings = {recording.id: recording for recording in found["recordings"]}
    cuts = []
    for segment in sorted(found["supervisions"], key=lambda segment: str(segment.id)):
        recording = recordings[segment.recording_id]
        cut = MonoCut(id=segment.id, start=0.0, duration=recording.duration, channel=0)
        cut.recording, cut.supervisions = recording, [segment]
        cuts.append(cut.to_dict())
    return cuts


def audio_path(split: Path, identifier: str) -> Path:
    """Return where the corpus has an utterance: SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac."""
    speaker, chapter, _ = identifier.split("-")
    return split / speaker / chapter / f"{identifier}.flac"


def check_disjoint(lists: dict[str, list[dict[str, Any]]]) -> None:
    """Raise HarkenError when a training list shares an utterance with a development or test set."""
    held_out = {cut["id"]: name for name in TESTS for cut in lists[name]}
    for name, cuts in lists.items():
        shared = [cut["id"] for cut in cuts if cut["id"] in held_out] if name not in TESTS else []
        if shared:
            raise HarkenError(
                f"{name} must share no utterance with {', '.join(TESTS)}, and {len(shared)} are in both, the first "
                f"{shared[0]} of {held_out[shared[0]]}: the folders are not those of the corpus"
            )


def write_manifest(path: Path, cuts: Iterable[dict[str, Any]]) -> None:
    """Write one cut a line, uncompressed so that it can be indexed."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{json.dumps(cut, ensure_ascii=False)}\n" for cut in cuts), encoding="utf-8")


def describe(cuts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return counts of utterances, hours and speakers."""
    return {
        "utterances": len(cuts),
        "hours": round(sum(cut["duration"] for cut in cuts) / 3600, 4),
        "speakers": len({cut["supervisions"][0]["speaker"] for cut in cuts}),
    }


if __name__ == "__main__":
    sys.exit(main())
