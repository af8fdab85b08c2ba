"""`harken train`: pretraining, fine-tuning, distillation."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Train, or continue, the run that a configuration describes. Under torchrun or deepspeed, one process a GPU."
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
EXAMPLE = (
    "harken train conf/pretrain.yaml --exp exp/pretrain train.steps=1000\n"
    "  torchrun --nproc_per_node 4 -m harken.apps.main train conf/pretrain.yaml --exp exp/pretrain"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "config", nargs="+", help="YAML files or presets, merged left to right, then key=value overrides"
    )
    parser.add_argument("--exp", required=True, type=Path, help="folder of the run; a run that is there is continued")
    parser.add_argument(
        "--fail-when-stopped",
        action="store_true",
        help=f"end with status {STOPPED}, not 0, when asked to stop before the end; for scripts that go on after it",
    )


def run(args: argparse.Namespace) -> int:
    """Train; status 0 when finished, and when stopped by request after saving unless that is to be a failure."""
    from harken.config.load import load
    from harken.objectives.saved import build_objective, preparers
    from harken.train.run import run_training

    files, overrides = split_arguments(args.config)
    config = load(files, overrides).config
    prepare, spec = preparers(config)
    ended = run_training(config, args.exp, build_objective, prepare, spec)
    return STOPPED if ended == "stopped" and args.fail_when_stopped else 0


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Part `key=value` from file names."""
    return [item for item in arguments if "=" not in item], [item for item in arguments if "=" in item]
