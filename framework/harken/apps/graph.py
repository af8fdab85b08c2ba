"""`harken graph`: a lexicon and an n-gram over words as one graph, for `harken decode --method graph`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harken.decode.graph import Graph

HELP = "Compose a lexicon and a word n-gram into a graph that CTC models are decoded by."
EXAMPLE = "harken graph --tokens tokens.txt --lexicon lexicon.txt --arpa words.arpa --out exp/graph"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--tokens", required=True, metavar="FILE", help="the model's tokenizer")
    add_source_arguments(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")


def add_source_arguments(parser: argparse._ActionsContainer) -> None:
    """Declare what a graph is made of, for this verb and for `harken decode`."""
    parser.add_argument(
        "--lexicon",
        metavar="FILE",
        help="lines `WORD TOKEN TOKEN ...`, or a word a line, spelled by the tokenizer (default: words of --arpa)",
    )
    parser.add_argument("--arpa", type=Path, metavar="ARPA", help="n-gram over words, plain or .gz")


def run(args: argparse.Namespace) -> int:
    """Compose and write."""
    graph = make_graph(args.tokens, args.lexicon, args.arpa)
    graph.save(args.out)
    print(f"{args.out}: {graph.fst.num_states} states, {graph.card['words_in_ngram']} words of the n-gram")
    return 0


def make_graph(tokens: str, lexicon: str | None, arpa: Path | None) -> Graph:
    """Return the graph of a tokenizer, a lexicon and an n-gram, and print what it lacks.

    Raises HarkenError when there is no n-gram, or when they do not fit each other.
    """
    from harken.core.errors import HarkenError
    from harken.core.files import sha256_file
    from harken.data.tokens import load_tokenizer
    from harken.decode.arpa import arpa_words
    from harken.decode.graph import build_graph
    from harken.decode.lexicon import read_lexicon, spell_words

    if arpa is None:
        raise HarkenError("a graph needs an n-gram over words: name an ARPA file by --arpa")
    tokenizer = load_tokenizer(tokens)
    words = spell_words(arpa_words(arpa), tokenizer, str(arpa)) if lexicon is None else read_lexicon(lexicon, tokenizer)
    if words.left_out:
        few = " ".join(words.left_out[:5])
        print(f"NOTE {len(words.left_out)} words are left out, which the tokenizer cannot spell: {few}")
    return build_graph(words, arpa, {"tokenizer": sha256_file(tokens)})
