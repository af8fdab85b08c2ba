"""`harken alarms`: a run's records, held against the alarms once more."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Tell which alarms a run's records ring, with its limits or with others; exit status 1 when one does."
EXAMPLE = "harken alarms exp/pretrain health.after_steps=200"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("run", type=Path, help="the folder of a training run")
    parser.add_argument("overrides", nargs="*", metavar="health.KEY=VALUE", help="limits other than the run's own")


def run(args: argparse.Namespace) -> int:
    """Print the alarms that ring, and how many records were judged."""
    from harken.config.load import load
    from harken.core.errors import HarkenError
    from harken.report.alarms import replay
    from harken.report.compare import read_run

    others = [text for text in args.overrides if not text.startswith("health.")]
    if others:
        raise HarkenError(f"`harken alarms` takes keys of `health` alone, got `{others[0]}`")
    metrics = read_run(args.run)
    config = load([args.run / "config.yaml"], args.overrides).config.health
    rung = replay(metrics, config)
    for trouble in rung:
        print(trouble.text)
    judged = " and ".join(
        f"{sum(config.all_judged(record['step']) for record in records)} of {len(records)} {kind} records"
        for kind, records in metrics.kinds.items()
    )
    print(f"{judged} are from after step {config.after_steps}, before which only the labels are judged")
    if not rung:
        print("no alarm rings")
    return int(bool(rung))
