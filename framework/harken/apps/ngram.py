"""`harken ngram`: a language model over a CTC model's tokens."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Estimate an n-gram language model over tokens from the transcripts of manifests, as an ARPA file."
EXAMPLE = "harken ngram train.jsonl --tokens tokens.txt --order 6 --out chars.arpa"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("manifest", nargs="+", help="indexed manifests with transcripts; never the test set's")
    parser.add_argument(
        "--tokens", required=True, help="the model's tokenizer: list of characters or sentencepiece .model"
    )
    parser.add_argument("--order", type=int, default=6, metavar="N", help="longest n-gram (default: 6)")
    parser.add_argument("--out", required=True, type=Path, metavar="ARPA", help="file to write; .gz is compressed")


def run(args: argparse.Namespace) -> int:
    """Estimate and write."""
    from harken.data.manifest import Manifest
    from harken.data.tokens import load_tokenizer
    from harken.decode.arpa import save_arpa
    from harken.decode.kneser_ney import train_ngram

    tokenizer = load_tokenizer(args.tokens)
    names = tokenizer.symbols()
    texts = [
        " ".join(part.text for part in cut.supervisions if part.text)
        for path in args.manifest
        for cut in Manifest(path)
    ]
    sequences = [[names[token] for token in tokenizer.encode(text)] for text in texts if text]
    save_arpa(train_ngram(sequences, order=args.order, vocabulary=names[1:]), args.out)
    print(f"{args.out}: order {args.order} over {tokenizer.size - 1} tokens from {len(sequences)} transcripts")
    return 0
