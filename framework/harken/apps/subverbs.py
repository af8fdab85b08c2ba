"""Sub-verbs of the command line (`harken data scan`, `harken units fit`), each with a help page of its own."""

from __future__ import annotations

import argparse


def add_sub_verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], name: str, about: str, example: str
) -> argparse.ArgumentParser:
    """Add a sub-verb whose help says what it is about, in one line that begins in lower case, and shows an example."""
    return verbs.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
