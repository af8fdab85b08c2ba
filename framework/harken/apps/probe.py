"""`harken probe`: how good representations are, by no labels but an alignment."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Judge a model's representations: their effective rank, and how well clusters of a layer follow an alignment."
EXAMPLE = (
    "harken probe exp/pretrain exp/alignment/cuts.jsonl --layer 4\n"
    "  harken probe models/hubert-base dev.jsonl --alignment phones.jsonl --tier phone --layer 9 --clusters 500 "
    "--out probe.json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("model", metavar="MODEL", help="experiment, checkpoint, averaged or imported model")
    parser.add_argument("manifest", metavar="MANIFEST", help="indexed manifest whose audio is encoded")
    parser.add_argument(
        "--alignment",
        metavar="MANIFEST",
        help="manifest with Lhotse alignments of the same cuts, as `harken align` writes (default: MANIFEST itself)",
    )
    parser.add_argument("--tier", default="token", metavar="NAME", help="alignment compared with (default: token)")
    parser.add_argument(
        "--layer",
        type=int,
        required=True,
        metavar="N",
        help="block whose output is clustered, from 1; 0 is their input",
    )
    parser.add_argument("--clusters", type=int, default=100, metavar="K", help="of the k-means (default: 100)")
    parser.add_argument(
        "--max-frames",
        type=int,
        default=30_000,
        metavar="N",
        help="frames kept for the k-means and for each rank (default: 30000)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of samples and k-means (default: 0)")
    parser.add_argument(
        "--max-seconds", type=float, default=120.0, metavar="S", help="padded audio of a batch (default: 120)"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="loader processes (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to write the figures to (default: none)")


def run(args: argparse.Namespace) -> int:
    """Compute and print them."""
    from harken.core.errors import HarkenError
    from harken.core.files import write_json_atomic
    from harken.evaluate.probe import ProbeConfig, probe

    if args.max_frames < 1 or args.max_seconds <= 0 or args.workers < 0:
        raise HarkenError(
            "`--max-frames` must be 1 or more, `--max-seconds` positive and `--workers` 0 or more, got "
            f"{args.max_frames}, {args.max_seconds:g} and {args.workers}"
        )
    config = ProbeConfig(
        layer=args.layer,
        clusters=args.clusters,
        max_frames=args.max_frames,
        seed=args.seed,
        tier=args.tier,
        max_seconds=args.max_seconds,
        workers=args.workers,
    )
    found = probe(args.model, args.manifest, args.alignment or args.manifest, config, print)
    print(found.describe())
    if args.out is not None:
        write_json_atomic(args.out, found.plain())
    return 0
