"""`harken align`: transcripts aligned in time by a CTC model."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

HELP = "Align the transcripts of a manifest in time by a CTC model: which token each of its outputs belongs to."
EXAMPLE = (
    "harken align exp/finetune dev.jsonl --out exp/alignment\n"
    "  harken units purity units/labels exp/alignment/cuts.jsonl\n"
    "  harken units check exp/alignment/labels"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("model", metavar="MODEL", help="experiment, checkpoint or averaged model, `ctc`")
    parser.add_argument("manifest", metavar="MANIFEST", help="indexed manifest with transcripts")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="alignment to write, or to replace: cuts.jsonl, labels"
    )
    parser.add_argument(
        "--max-seconds", type=float, default=120.0, metavar="S", help="padded audio of a batch (default: 120)"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="processes (default: one a core, and one where there is a GPU)"
    )
    parser.add_argument(
        "--piece",
        metavar="I/N",
        help="do the I-th of N pieces and keep it; the same command without this puts all pieces together",
    )


def run(args: argparse.Namespace) -> int:
    """Write it."""
    import torch

    from harken.core.errors import HarkenError
    from harken.core.pieces import Piece
    from harken.evaluate.align import Work, align

    jobs = args.jobs or (1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)))
    if jobs < 1 or args.max_seconds <= 0:
        raise HarkenError(f"`--jobs` and `--max-seconds` must be positive, got {args.jobs} and {args.max_seconds}")
    piece = Piece.parse(args.piece) if args.piece else None
    started = time.perf_counter()
    align(Work(args.model, args.manifest, args.max_seconds), args.out, jobs, print, piece)
    print(f"{time.perf_counter() - started:.0f} s")
    return 0
