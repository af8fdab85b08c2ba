"""`harken tune-batch`: which micro-batches fit in this device's memory."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = (
    "Measure by real steps how much padded audio fits in this device's memory, by durations (and lengths of texts),\n"
    "and print a table and the keys to give a run. `batch.max_seconds=auto` does the same at the start of a run."
)
EXAMPLE = "harken tune-batch conf/finetune.yaml data.train=data/train.jsonl batch.memory_share=0.85"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "config", nargs="+", help="YAML files or presets, merged left to right, then key=value overrides"
    )
    parser.add_argument("--exp", type=Path, help="folder of the run that will use it with `batch.max_seconds=auto`")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    from harken.apps.train import split_arguments
    from harken.config.load import load
    from harken.core import distributed
    from harken.objectives.saved import build_objective, preparers
    from harken.train.run import tune_batch

    files, overrides = split_arguments(args.config)
    config = load(files, overrides).config
    prepare, spec = preparers(config)
    text = tune_batch(config, args.exp, build_objective, prepare, spec)
    if distributed.is_main():
        print(text)
    return 0
