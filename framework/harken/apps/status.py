"""`harken status`: how an experiment goes."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Show the stages of an experiment, the states of their jobs, what their logs say last, how far they are."
EXAMPLE = "harken status exp/base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("exp", type=Path, help="folder of the experiment")


def run(args: argparse.Namespace) -> int:
    """Print the table; status 1 when a stage failed, was lost or cancelled."""
    from harken.cluster.status import status, table

    stages = status(args.exp.resolve())
    print(table(stages))
    return int(any(stage.state.startswith(("failed", "lost", "cancelled")) for stage in stages))
