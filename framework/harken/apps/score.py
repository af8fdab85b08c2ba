"""`harken score`: error rates of a hypothesis file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harken.evaluate.hypotheses import Utterance

HELP = "word and character error rates of a hypothesis file"
EXAMPLE = "harken score exp/ctc/decode/test.jsonl --out exp/ctc/decode/test-score"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `harken score`."""
    parser.add_argument(
        "hypotheses",
        type=Path,
        metavar="HYP.jsonl",
        help='one object a line: {"id", "speaker", "ref", "hyp", "seconds"}, as `harken decode` writes',
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where wer.json, errors.txt and per_speaker.tsv go (default: HYP-score beside the file)",
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        action="append",
        metavar="CUTS.jsonl",
        help="refuse the file unless its utterances are those of this manifest; may be given again (default: no check)",
    )
    parser.add_argument("--resamples", type=int, default=1000, metavar="N", help="bootstrap resamples (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the bootstrap (default: 0)")
    parser.add_argument(
        "--worst",
        type=int,
        default=5,
        metavar="N",
        help="how many of the worst speakers to print (default: 5)",
    )


def run(args: argparse.Namespace) -> int:
    """Score the file, write the three files and print the short table."""
    from harken.core.errors import HarkenError
    from harken.core.files import write_json_atomic, write_text_atomic
    from harken.evaluate.hypotheses import read_hypotheses
    from harken.evaluate.tables import errors_text, per_speaker_tsv, summary
    from harken.evaluate.wer import score, to_json

    source: Path = args.hypotheses
    out: Path = args.out or source.with_name(f"{source.stem}-score")
    if args.seed < 0 or args.worst < 0:
        raise HarkenError(f"`--seed` and `--worst` must be 0 or more, got {args.seed} and {args.worst}")
    utterances = read_hypotheses(source)
    if args.manifest:
        check_complete(source, utterances, args.manifest)
    if not any(utterance.ref.strip() for utterance in utterances):
        raise HarkenError(
            f"none of the {len(utterances)} utterances of {source} has a text in `ref`, and error rates are measured "
            "against it: decode a manifest with transcripts"
        )
    result = score(utterances, resamples=args.resamples, seed=args.seed)
    bootstrap = {"method": "utterances, percentile", "resamples": args.resamples, "seed": args.seed}
    write_json_atomic(out / "wer.json", {"hypotheses": str(source), **to_json(result), "bootstrap": bootstrap})
    write_text_atomic(out / "errors.txt", errors_text(result))
    write_text_atomic(out / "per_speaker.tsv", per_speaker_tsv(result))
    print(f"{source}: {summary(result, worst=args.worst)}")
    print(f"Written: {out}/wer.json, errors.txt, per_speaker.tsv")
    return 0


def check_complete(source: Path, utterances: Sequence[Utterance], manifests: Sequence[Path]) -> None:
    """Raise HarkenError unless a hypothesis file holds every utterance of the manifests and no other."""
    from harken.core.errors import HarkenError
    from harken.data.manifest import Manifest

    opened = [Manifest(path) for path in manifests]
    expected = {str(manifest.line(place)["id"]) for manifest in opened for place in range(len(manifest))}
    found = {utterance.id for utterance in utterances}
    for names, what in ((expected - found, "lacks"), (found - expected, "has, beyond those,")):
        if names:
            few = ", ".join(f"`{name}`" for name in sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise HarkenError(
                f"{source} must hold the {len(expected)} utterances of {', '.join(map(str, manifests))}; it {what} "
                f"{len(names)}: {few}; decode the manifest again"
            )
