"""`harken features`: hidden states of a model's layers, written for every cut of a manifest."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

HELP = "Write the hidden states of a saved model's layers as arrays that numpy and Lhotse read."
EXAMPLE = (
    "harken features exp/pretrain test.jsonl --layers 4,6 --out exp/features\n"
    "  harken features models/hubert-base test.jsonl --layers 9 --dtype float16 --out exp/features9 --piece 3/8"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("model", metavar="MODEL", help="experiment, checkpoint, averaged or imported model")
    parser.add_argument("manifest", metavar="MANIFEST", help="indexed manifest")
    parser.add_argument(
        "--layers", required=True, metavar="N,N,...", help="blocks whose output is written, from 1; 0 is their input"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="new folder, or an unfinished one to continue"
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="(default: float32)")
    parser.add_argument(
        "--max-seconds", type=float, default=60.0, metavar="S", help="padded audio of a batch (default: 60)"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="processes (default: one a core, and one where there is a GPU)"
    )
    parser.add_argument(
        "--piece",
        metavar="I/N",
        help="do the I-th of N pieces; the same command without this does what is left and completes the folder",
    )


def run(args: argparse.Namespace) -> int:
    """Write them."""
    import torch

    from harken.core.errors import HarkenError
    from harken.core.pieces import Piece
    from harken.units.hidden_states import Extraction, extract

    try:
        layers = tuple(int(word) for word in args.layers.split(","))
    except ValueError as error:
        raise HarkenError(
            f"`--layers` must be numbers with commas between, such as 4,6, got {args.layers!r}"
        ) from error
    jobs = args.jobs or (1 if torch.cuda.is_available() else len(os.sched_getaffinity(0)))
    if jobs < 1 or args.max_seconds <= 0:
        raise HarkenError(f"`--jobs` and `--max-seconds` must be positive, got {args.jobs} and {args.max_seconds}")
    piece = Piece.parse(args.piece) if args.piece else None
    started = time.perf_counter()
    extract(Extraction(args.model, args.manifest, args.out, layers, args.dtype, args.max_seconds), jobs, print, piece)
    print(f"{time.perf_counter() - started:.0f} s")
    return 0
