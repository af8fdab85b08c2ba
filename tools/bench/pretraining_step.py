"""A pretraining step of HuBERT Base beside one of k2SSL's Zipformer Base, in processes of their own. See README.md."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from apart import measured_apart, write_figures
from hubert_peers import random_targets

from harken.config.load import load
from harken.config.registry import build
from harken.core.batch import Batch
from harken.core.draws import begin_micro_batch
from harken.core.frames import FrameSpec
from harken.data.masking import SpanMask
from harken.objectives.saved import build_objective
from harken.optim.groups import parameter_groups

PRESETS = ("hubert_base", "k2ssl_base")
RATE = 16000


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Measure a pretraining step of two presets: forward, backward, and their own optimisers.",
        epilog="example: python tools/bench/pretraining_step.py --seconds 4 --batch 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), metavar="NAME", help="(default: both Bases)")
    parser.add_argument("--batch", type=int, default=2, metavar="B", help="waveforms of a step (default: 2)")
    parser.add_argument("--seconds", type=float, default=8.0, metavar="S", help="length of each (default: 8)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="timed, after one that is not (default: 3)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default: 1)")
    parser.add_argument("--only", metavar="NAME", help="measure this preset, in this process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    return parser.parse_args()


def noise(args: argparse.Namespace, config: Any, spec: FrameSpec) -> Batch:
    """Return waveforms of noise without padding, random labels, and masks as the preset draws them."""
    rng, samples = np.random.default_rng(1), int(args.seconds * RATE)
    frames = int(spec.num_frames(samples))
    span = SpanMask(probability=config.objective.mask_probability, length=config.objective.mask_length)
    targets, count = random_targets(rng, span, args.batch, frames, config.objective.classes[0])
    return Batch(
        ids=tuple(f"noise-{row}" for row in range(args.batch)),
        inputs=torch.from_numpy(rng.standard_normal((args.batch, samples), dtype=np.float32)),
        lengths=torch.full((args.batch,), samples),
        targets=targets,
        num_targets=count,
    )


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Return what a preset takes: median seconds, and the largest resident size less that before the model, in MiB."""
    torch.set_num_threads(args.threads)
    config = load([args.only], ["data.train=noise", "data.labels=[noise]", "objective.classes=[500]"]).config
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    objective = build_objective(config).train()
    batch = noise(args, config, objective.backbone.spec)
    groups = parameter_groups(objective, objective.rate_scale)
    optimizer: torch.optim.Optimizer = build("optimizer", config.optimizer, groups=groups)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    seconds = []
    for step in range(args.steps + 1):
        begin_micro_batch(config.seed, step, 0)
        started = time.perf_counter()
        (objective(batch).total / batch.num_targets).backward()
        if config.train.clip_norm:
            torch.nn.utils.clip_grad_norm_(objective.parameters(), config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[1:])
    return {
        "preset": args.only,
        "parameters": sum(parameter.numel() for parameter in objective.parameters()),
        "seconds": median,
        "audio seconds a second": args.batch * args.seconds / median,
        "peak MiB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def main() -> None:
    """Print a line for each preset."""
    args = parse()
    if args.only:
        print(json.dumps(measure(args)))
        return
    found = []
    for row in measured_apart(args.presets):
        found.append(row)
        print(
            f"{row['preset']:14} {row['parameters'] / 1e6:6.1f} M {row['seconds']:7.2f} s a step "
            f"{row['audio seconds a second']:6.2f} audio s/s {row['peak MiB']:6.0f} MiB"
        )
    write_figures(args.json, args, "presets", found)


if __name__ == "__main__":
    main()
