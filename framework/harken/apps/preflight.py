"""`harken preflight`: whether the nodes of a job can train together."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = (
    "Check, as one process on each node of a Slurm job, that all come, see the folder and as many GPUs, agree about "
    "the time, run the same versions, and how fast they send to each other; names the node that fails."
)
EXAMPLE = "harken preflight --folder exp/base --address node1 --port 29500   # started by srun, once on each node"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--folder", type=Path, required=True, help="that every node must see")
    parser.add_argument("--address", required=True, help="of the first node")
    parser.add_argument("--port", type=int, required=True, help="on the first node, free")
    parser.add_argument("--gpus", type=int, default=0, help="that each node must have (default: 0)")
    parser.add_argument("--wait-seconds", type=int, default=180, help="for all nodes to come (default: 180)")
    parser.add_argument("--max-clock-skew-seconds", type=float, default=2.0, help="default: 2")
    parser.add_argument("--gigabytes-per-second", type=float, help="expected bus bandwidth between two nodes")


def run(args: argparse.Namespace) -> int:
    """Check; a node that fails gives status 69 and is named."""
    from harken.cluster.preflight import Node, Preflight
    from harken.cluster.settings import PreflightConfig

    expected = PreflightConfig(
        wait_seconds=args.wait_seconds,
        max_clock_skew_seconds=args.max_clock_skew_seconds,
        gigabytes_per_second=args.gigabytes_per_second,
    )
    return Preflight(Node.here(), args.folder, args.address, args.port, args.gpus, expected).run()
