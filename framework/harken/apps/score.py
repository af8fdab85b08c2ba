"""`harken score`: error rates of a hypothesis file."""

from __future__ import annotations

import argparse
from pathlib import Path

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
    from harken.core.files import write_json_atomic, write_text_atomic
    from harken.evaluate.hypotheses import read_hypotheses
    from harken.evaluate.tables import errors_text, per_speaker_tsv, summary
    from harken.evaluate.wer import score, to_json

    source: Path = args.hypotheses
    out: Path = args.out or source.with_name(f"{source.stem}-score")
    result = score(read_hypotheses(source), resamples=args.resamples, seed=args.seed)
    bootstrap = {"method": "utterances, percentile", "resamples": args.resamples, "seed": args.seed}
    write_json_atomic(out / "wer.json", {"hypotheses": str(source), **to_json(result), "bootstrap": bootstrap})
    write_text_atomic(out / "errors.txt", errors_text(result))
    write_text_atomic(out / "per_speaker.tsv", per_speaker_tsv(result))
    print(f"{source}: {summary(result, worst=args.worst)}")
    print(f"Written: {out}/wer.json, errors.txt, per_speaker.tsv")
    return 0
