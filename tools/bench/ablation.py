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
from hubert_peers import CLASSES, CLIP_NORM, RATE, Options, make_batch
from hubert_step import aligned, machine
from torch import Tensor, nn
from torch.nn import functional

from harken.config.load import load
from harken.config.registry import build
from harken.core import draws
from harken.core.batch import Batch
from harken.core.files import write_json_atomic
from harken.encoders.backbone import build_backbone
from harken.engine.memory import keep_what_is_free
from harken.frontends import waveform
from harken.nn import attention, dropout, positions
from harken.optim.groups import parameter_groups


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
    for name, default in (("steps", 3), ("threads", 2), ("layers", 12), ("batch", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default: {default}")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: fp32)")
    parser.add_argument("--seconds", type=float, default=8.0, metavar="S", help="length of a waveform (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every measurement to this file")
    args = parser.parse_args(arguments)
    if min(args.steps, args.threads, args.layers, args.batch) < 1 or args.seconds < 0.1:
        parser.error("--steps, --threads, --layers and --batch must be at least 1, --seconds 0.1")
    return args


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the processor's seconds of the steps of each variant; the first round warms up and is not among them."""
    torch.set_num_threads(args.threads)
    keep_what_is_free()  # as harken trains
    options = Options(args.layers, args.seconds, args.batch, args.threads, args.precision, "sdpa", 0.0, args.seed)
    changes = ["data.train=none", f"objective.classes=[{CLASSES}]", f"encoder.layers={args.layers}"]
    config = load(["hubert_base"], [*changes, "encoder.layer_drop=0"]).config
    model = build("objective", config.objective, run=config, backbone=build_backbone(config)).train()
    optimizer = build("optimizer", config.optimizer, groups=parameter_groups(model, lambda *_: 1.0))
    for group in optimizer.param_groups:
        group["lr"] = RATE
    found: dict[str, list[float]] = {name: [] for name in SWITCHES}
    for step in range(args.steps + 1):
        batch = make_batch(options, step)
        turn = step % len(SWITCHES)  # nothing is always first, with caches full of the new batch
        for name, switch in [*SWITCHES.items()][turn:] + [*SWITCHES.items()][:turn]:
            with switch(optimizer):
                seconds = take_step(model, optimizer, batch, args, step)
            if step > 0:
                found[name].append(seconds)
    return found


def take_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, args: argparse.Namespace, step: int
) -> float:
    """Return the processor's seconds of a training step."""
    draws.begin_micro_batch(args.seed, step, 0)
    started = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
        loss = model(batch)
    (loss.total / batch.num_targets).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - started


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
