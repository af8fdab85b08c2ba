"""A step of ScaledAdam beside one of AdamW on torch's fused kernel, on a CPU, in turn. See README.md."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harken.config.registry import SlotConfig, build, find
from harken.core.files import write_json_atomic

Row = dict[str, object]
GROUPS = 20
SIZES = {"64 x 64": (64, 64, 6), "256 x 256": (256, 256, 6), "768 x 768": (768, 768, 2)}
"""Rows and columns of the first group's tensors, and tensors of a group; each group has a column more."""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Measure a step of ScaledAdam beside one of fused AdamW on a CPU: 20 groups of equal shapes.",
        epilog="example: python tools/bench/optimizer_step.py --json optimizer.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=41, metavar="N", help="of each optimiser (default: 41)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser.parse_args()


def stepper(name: str, shapes: list[tuple[int, int]]) -> Callable[[], float]:
    """Return a function that takes a step of an optimiser over seeded tensors and returns its seconds of CPU time."""
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = 0.01 * torch.randn(parameter.shape, generator=generator)
    config: SlotConfig = find("optimizer", name).config(name=name)
    groups: list[dict[str, Any]] = [{"params": parameters, "names": ["all"], "decay": True}]
    optimizer: torch.optim.Optimizer = build("optimizer", config, groups=groups)
    optimizer.param_groups[0]["lr"] = 1e-3

    def step() -> float:
        before = time.process_time()  # not the clock: what else the machine does is not part of it
        optimizer.step()
        return time.process_time() - before

    return step


def measure(label: str, steps: int) -> Row:
    """Take steps of both in turn and return their medians; the first steps, which make the states, are left out."""
    rows, columns, copies = SIZES[label]
    shapes = [(rows, columns + group) for group in range(GROUPS) for _ in range(copies)]
    adamw, scaled = stepper("adamw", shapes), stepper("scaled_adam", shapes)
    pairs = [(adamw(), scaled()) for _ in range(steps)][1:]
    return {
        "tensors": f"{len(shapes)} of {label} and up",
        "parameters": sum(a * b for a, b in shapes),
        "adamw_ms": round(1000 * statistics.median(pair[0] for pair in pairs), 2),
        "scaled_adam_ms": round(1000 * statistics.median(pair[1] for pair in pairs), 2),
        "ratio": round(statistics.median(pair[1] / pair[0] for pair in pairs), 2),
    }


def main() -> None:
    """Print a table and write the figures."""
    args = parse()
    torch.set_num_threads(args.threads)
    found = []
    print(f"{'tensors':28} {'parameters':>11} {'AdamW ms':>9} {'ScaledAdam ms':>14} {'ratio':>6}")
    for label in SIZES:
        row = measure(label, args.steps)
        found.append(row)
        print("{tensors:28} {parameters:>11} {adamw_ms:>9} {scaled_adam_ms:>14} {ratio:>6}".format(**row))
    if args.json:
        write_json_atomic(args.json, {"threads": args.threads, "torch": torch.__version__, "rows": found})


if __name__ == "__main__":
    main()
