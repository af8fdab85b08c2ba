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
        "--last",
        type=int,
        default=0,
        metavar="N",
        help="newest checkpoints of the experiment (default: 0, all that are kept)",
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="model folder to write; only an averaged one is replaced"
    )


def run(args: argparse.Namespace) -> int:
    """Average and write."""
    from harken.config.saved import (
        CHECKPOINTS,
        WEIGHTS,
        average_weights,
        checkpoint_names,
        find_model,
        intact,
        load_config,
        save_model,
        weights_digest,
    )
    from harken.core.errors import HarkenError
    from harken.core.files import atomic_folder, check_replaceable, write_json_atomic

    if args.last < 0:
        raise HarkenError(f"`--last` must be 0 (all) or a number of checkpoints, got {args.last}")
    experiment = len(args.models) == 1 and (args.models[0] / CHECKPOINTS).is_dir()
    if args.last and not experiment:
        raise HarkenError("`--last` takes checkpoints of one experiment: name a single folder with checkpoints in it")
    files = ("averaged.json", "config.yaml", WEIGHTS)
    check_replaceable(args.out, kind="averaged model", files=files)
    if experiment:
        root = args.models[0] / CHECKPOINTS
        newest = (root / name for name in reversed(checkpoint_names(root)))
        whole = list(islice(filter(intact, newest), args.last or None))[::-1]
        folders = whole or [find_model(args.models[0])]  # which says why there is none
    else:
        folders = [find_model(path) for path in args.models]
    weights = average_weights(folders)
    with atomic_folder(args.out, kind="averaged model", files=files) as folder:
        save_model(folder, load_config(folders[-1]), weights)
        sources = [{"model": str(one), "sha256": weights_digest(one)} for one in folders]
        write_json_atomic(folder / "averaged.json", {"models": sources})
    print(f"{args.out}: mean of {len(folders)} models: {', '.join(one.name for one in folders)}")
    return 0
