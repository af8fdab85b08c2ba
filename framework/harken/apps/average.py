"""`harken average`: the mean of several checkpoints' weights."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

HELP = "Average the weights of checkpoints of one run into a model folder."
EXAMPLE = "harken average exp/finetune --last 5 --out exp/finetune/average"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("models", nargs="+", type=Path, help="an experiment, or the checkpoints themselves")
    parser.add_argument(
        "--last", type=int, default=0, help="take the newest N checkpoints of the experiment (all that are kept)"
    )
    parser.add_argument("--out", required=True, type=Path, help="model folder to write")


def run(args: argparse.Namespace) -> int:
    """Average and write."""
    from harken.config.saved import CHECKPOINTS, average_weights, find_model, intact, load_config, save_model
    from harken.core.files import atomic_path

    if len(args.models) == 1 and (args.models[0] / CHECKPOINTS).is_dir():
        newest = sorted((args.models[0] / CHECKPOINTS).glob("step-*"), reverse=True)
        folders = list(islice(filter(intact, newest), args.last or None))[::-1]
    else:
        folders = [find_model(path) for path in args.models]
    weights = average_weights(folders)
    with atomic_path(args.out) as temporary:
        temporary.mkdir()
        save_model(temporary, load_config(folders[-1]), weights)
    print(f"{args.out}: mean of {len(folders)} models: {', '.join(folder.name for folder in folders)}")
    return 0
