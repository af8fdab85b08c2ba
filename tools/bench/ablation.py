"""A training step of HuBERT Base with each of harken's optimisations switched off alone, in turn in one process.

Figures are the processor's time of a step, which other programs disturb less than the clock, as the median over rounds
of (without it) / (with all). See README.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from engine import Objective
from hubert_peers import PlainLoop, make_batch
from hubert_step import aligned, machine
from step_options import add_step_options, options_of, parse_steps
from torch import Tensor, nn
from torch.nn import functional

from harken.core import draws
from harken.core.files import write_json_atomic
from harken.engine.memory import keep_what_is_free
from harken.frontends import waveform
from harken.nn import attention, dropout, positions


def _plain_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *, padding: int, groups: int) -> Tensor:
    return functional.conv1d(x.transpose(1, 2), weight, bias, padding=padding, groups=groups).transpose(1, 2)


def _plain_dropout(own: nn.Dropout, x: Tensor) -> Tensor:
    return functional.dropout(x, own.p, own.training)


def _torchs_attention(q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, probability: float) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=probability)


@contextmanager
def _unfused(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    for group in optimizer.param_groups:
        group.update(fused=False, foreach=False)
    yield
    for group in optimizer.param_groups:
        group.update(fused=True, foreach=None)


Switch = Callable[[torch.optim.Optimizer], AbstractContextManager[Any]]
SWITCHES: dict[str, Switch] = {
    "all": lambda _: nullcontext(),
    "frontend as matrix products": lambda _: mock.patch.object(waveform, "pays", return_value=False),
    "positions channels last": lambda _: mock.patch.object(positions, "convolve_over_time", _plain_convolution),
    "dropout of 16-bit draws": lambda _: mock.patch.object(dropout.Dropout, "forward", _plain_dropout),
    "attention with own dropout": lambda _: mock.patch.object(attention, "attend_with_dropout", _torchs_attention),
    "fused AdamW": _unfused,
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Time a HuBERT training step with each optimisation switched off alone.",
        epilog="example: python tools/bench/ablation.py --steps 3 --json ablation.json",
    )
    parser.set_defaults(device="cpu")
    add_step_options(parser, steps=3)
    return parse_steps(parser, arguments)


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the processor's seconds of the timed steps of each variant."""
    keep_what_is_free()  # as harken trains
    options = options_of(args)
    loop = PlainLoop(options, Objective)
    loop.build(Path())
    found: dict[str, list[float]] = {name: [] for name in SWITCHES}
    for step in range(args.warmup + args.steps):
        batch = make_batch(options, step)
        turn = step % len(SWITCHES)  # nothing is always first, with caches full of the new batch
        for name, switch in [*SWITCHES.items()][turn:] + [*SWITCHES.items()][:turn]:
            draws.begin_micro_batch(args.seed, step, 0)
            with switch(loop.optimizer):
                started = time.process_time()
                loop.step(batch, step)
                seconds = time.process_time() - started
            if step >= args.warmup:
                found[name].append(seconds)
    return found


def ratios(found: dict[str, list[float]]) -> dict[str, float]:
    """Return how many times longer a step takes without each optimisation: the median over rounds."""
    return {
        name: statistics.median(b / a for a, b in zip(found["all"], seconds, strict=True))
        for name, seconds in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    args = parse(arguments)
    about = machine(packages=())
    found = measure(args)
    slower = ratios(found)
    print(aligned([["without", "step takes"], *([name, f"{slower[name]:.3f}"] for name in list(found)[1:])]))
    if args.json is not None:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        write_json_atomic(
            args.json, {"settings": settings, "machine": about, "cpu_seconds": found, "slower_without": slower}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
