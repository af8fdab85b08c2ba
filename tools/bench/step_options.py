"""What the benchmarks of a step of HuBERT Base can be told alike: sizes, steps, threads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hubert_peers import Options

DEVICES = ("cpu", "cuda")


def add_step_options(parser: argparse.ArgumentParser, *, steps: int) -> None:
    """Add the options; `steps` is how many are timed by default."""
    parser.add_argument("--steps", type=int, default=steps, metavar="N", help=f"timed steps of each (default: {steps})")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="steps before them (default: 2)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads of each (default: 2)")
    parser.add_argument("--layers", type=int, default=12, metavar="N", help="Transformer blocks (default: 12)")
    parser.add_argument("--seconds", type=float, default=8.0, metavar="S", help="length of a waveform (default: 8)")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="waveforms a step (default: 2)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every measurement to this file")


def parse_steps(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; numbers that cannot be meant end the program with a word."""
    args = parser.parse_args(arguments)
    for name in ("steps", "threads", "layers", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.seconds < 0.1 or args.warmup < 0:
        parser.error(f"--seconds must be at least 0.1 and --warmup 0, got {args.seconds} and {args.warmup}")
    return args


def options_of(args: argparse.Namespace, *, compiled: bool = False) -> Options:
    """Return what the models of a run share. LayerDrop is 0, so that all do the same work."""
    names = ("layers", "seconds", "batch", "threads", "precision", "seed", "device")
    return Options(attention="sdpa", layer_drop=0.0, compiled=compiled, **{name: getattr(args, name) for name in names})
