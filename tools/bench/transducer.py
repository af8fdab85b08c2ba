"""Time and memory of the pruned transducer loss beside the full lattice's. See README.md."""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from apart import measured_apart, write_figures
from torch import Tensor

from harken.nn.transducer.arcs import Labels, additive_arcs, joined_arcs, kept_positions, prune_starts
from harken.nn.transducer.lattice import sum_paths

KINDS = ("pruned", "full")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Measure a forward and a backward pass of each loss, each kind in a process of its own.",
        epilog="example: python tools/bench/transducer.py --batch 4 --frames 200 --tokens 50",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, default=30, metavar="B", help="utterances (default: 30)")
    parser.add_argument("--frames", type=int, default=500, metavar="T", help="frames of each (default: 500)")
    parser.add_argument("--tokens", type=int, default=100, metavar="S", help="tokens of each (default: 100)")
    parser.add_argument("--classes", type=int, default=500, metavar="V", help="blank included (default: 500)")
    parser.add_argument("--width", type=int, default=5, metavar="R", help="prune range (default: 5)")
    parser.add_argument("--repeat", type=int, default=2, metavar="N", help="passes; the fastest counts (default: 2)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default: 1)")
    parser.add_argument("--only", choices=KINDS, help="measure this kind, in this process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    return parser.parse_args()


def losses(kind: str, am: Tensor, lm: Tensor, labels: Labels, width: int) -> Tensor:
    """Return the loss of scores `(B, T, V)` and `(B, S + 1, V)`, which the joiner of this benchmark adds."""
    rows = lm.shape[1]
    if kind == "full":
        everywhere = kept_positions(torch.zeros(am.shape[:2], dtype=torch.int64), rows, rows)
        return -sum_paths(joined_arcs(am[:, :, None] + lm[:, None], everywhere, labels)).scores.sum()
    simple = sum_paths(additive_arcs(am, lm, labels, lm_scale=0.25))
    positions = kept_positions(prune_starts(simple, labels, width), rows, width)
    chosen = lm[torch.arange(len(lm))[:, None, None], positions]
    pruned = sum_paths(joined_arcs(am[:, :, None] + chosen, positions, labels))
    return -simple.scores.sum() - pruned.scores.sum()


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Return seconds of the fastest pass, and the largest resident size less that before the first pass, in MiB."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    am = torch.randn(args.batch, args.frames, args.classes).requires_grad_()
    lm = torch.randn(args.batch, args.tokens + 1, args.classes).requires_grad_()
    labels = Labels(
        tokens=torch.randint(1, args.classes, (args.batch, args.tokens)),
        lengths=torch.full((args.batch,), args.tokens),
        frames=torch.full((args.batch,), args.frames),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(args.repeat):
        started = time.perf_counter()
        losses(args.only, am, lm, labels, args.width).backward()
        seconds.append(time.perf_counter() - started)
        am.grad = lm.grad = None
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"loss": args.only, "seconds": min(seconds), "peak MiB": peak}


def main() -> None:
    """Print a line for each kind, and the ratio of the two."""
    args = parse()
    if args.only:
        print(json.dumps(measure(args)))
        return
    found = []
    for row in measured_apart(KINDS):
        found.append(row)
        print(f"{row['loss']:8} {row['seconds']:8.2f} s {row['peak MiB']:8.0f} MiB")
    times, memory = (found[1][key] / found[0][key] for key in ("seconds", "peak MiB"))
    print(f"full / pruned: {times:.1f} in time, {memory:.1f} in memory")
    write_figures(args.json, args, "losses", found)


if __name__ == "__main__":
    main()
