"""`harken bench data`: what limits a run, the loader or the model."""

from __future__ import annotations

import argparse
from pathlib import Path

from harken.apps.subverbs import add_sub_verb

HELP = "Measure what limits a run before it is started: reading, or computing."
EXAMPLE = (
    "harken bench data conf/pretrain.yaml data.workers=2\n"
    "  torchrun --nproc_per_node 4 -m harken.apps.main bench data conf/pretrain.yaml --steps 50 --json bench.json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    verbs = parser.add_subparsers(dest="bench_verb", required=True, metavar="data")
    data = add_sub_verb(verbs, "data", "the loader alone, the model alone, and which of the two is slower", EXAMPLE)
    data.add_argument("config", nargs="+", help="configuration of a run, as for `harken train`")
    data.add_argument("--steps", type=int, default=20, metavar="N", help="steps of each (default: 20)")
    data.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    from dataclasses import asdict

    from harken.apps.train import split_arguments
    from harken.config.load import load
    from harken.core import distributed
    from harken.core.errors import HarkenError
    from harken.core.files import write_json_atomic
    from harken.objectives.saved import build_objective, preparers
    from harken.train.bench import bench_data

    if args.steps < 1:
        raise HarkenError(f"--steps must be positive, got {args.steps}")
    config = load(*split_arguments(args.config)).config
    prepare, spec = preparers(config)
    found = bench_data(config, build_objective, prepare, spec, steps=args.steps)
    if distributed.is_main():
        print(f"loader alone: {found.loader:.0f} audio seconds a second with {found.workers} worker(s) a process")
        print(f"model alone:  {found.model:.0f} audio seconds a second")
        print(found.verdict())
        if args.json is not None:
            write_json_atomic(args.json, {**asdict(found), "verdict": found.verdict()})
    return 0
