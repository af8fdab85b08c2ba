"""What a run will take: arithmetic from its configuration, the hours of its corpus and the speed of its devices."""

from __future__ import annotations

import math
from dataclasses import dataclass

from harken.config.schema import RunConfig
from harken.core.clock import duration
from harken.core.errors import HarkenError
from harken.core.zero import state_bytes

BYTES_PER_PARAMETER = 12
"""Of a checkpoint: weights and AdamW's two averages in float32 (docs/engine.md)."""
FLAC_SHARE = 0.55
"""Size of FLAC beside 16-bit PCM: LibriSpeech's 960 hours are 60.7 GB of FLAC (openslr.org/12), 110.6 GB as PCM."""
FRAMES_PER_SECOND = 50
"""Labels of masked prediction; those of MFCC have 100."""


@dataclass(frozen=True)
class Plan:
    """A run's size, in hours of audio or of the wall, and 10^9 bytes. None: not known without a speed or a limit."""

    steps: int
    audio_hours: float
    epochs: float
    seconds_of_a_device: float
    micro_batches_of_a_device: float | None
    flops: float
    wall_hours: float | None
    checkpoint_gb: float
    kept_gb: float
    corpus_gb: float
    labels_gb: float
    device_gb: float


def make_plan(
    config: RunConfig, *, corpus_hours: float, gpus: int, parameters: int, flops: float, tflops: float | None
) -> Plan:
    """Compute the plan of a run.

    corpus_hours: of training audio. parameters: of the model. flops: of a step on a second of audio. tflops: that each
    GPU reaches, None when it is not known.
    Raises HarkenError for numbers that are not positive.
    """
    if corpus_hours <= 0 or gpus < 1 or (tflops is not None and tflops <= 0):
        raise HarkenError(
            "`--hours`, `--gpus` and `--tflops` must be positive, "
            f"got {corpus_hours:g}, {gpus} and {'none' if tflops is None else f'{tflops:g}'}"
        )
    batch, steps = config.batch, config.train.steps
    audio = steps * batch.seconds_per_step
    wall = None if tflops is None else audio * flops / (tflops * 1e12 * gpus) / 3600
    checkpoint = parameters * (BYTES_PER_PARAMETER + (4 if config.train.ema_decay else 0)) / 1e9
    stage = config.engine.zero_stage
    classes = max(getattr(config.objective, "classes", None) or (0,))
    label_bytes = 0 if not config.data.labels and classes == 0 else (1 if classes <= 256 else 2)
    return Plan(
        steps=steps,
        audio_hours=audio / 3600,
        epochs=audio / 3600 / corpus_hours,
        seconds_of_a_device=batch.seconds_per_step / gpus,
        micro_batches_of_a_device=None if batch.max_seconds == "auto" else batch.micro_batches_per_step / gpus,
        flops=audio * flops,
        wall_hours=wall,
        checkpoint_gb=checkpoint,
        kept_gb=checkpoint * (config.checkpoint.keep_last + config.checkpoint.keep_best),
        corpus_gb=corpus_hours * 3600 * config.data.sample_rate * 2 * FLAC_SHARE / 1e9,
        labels_gb=corpus_hours * 3600 * FRAMES_PER_SECOND * label_bytes / 1e9,
        device_gb=state_bytes(parameters, 0 if stage == "auto" else stage, gpus) / 1e9,
    )


def describe(plan: Plan, *, corpus_hours: float, gpus: int, parameters: int, tflops: float | None) -> str:
    """Return a plan as a table for the terminal."""
    rows = [
        ("model", f"{parameters / 1e6:.1f}M parameters"),
        ("steps", f"{plan.steps}, of {plan.seconds_of_a_device:g} s of audio on each of {gpus} GPUs"),
        ("audio trained on", f"{plan.audio_hours:,.0f} h: {plan.epochs:.2f} times the {corpus_hours:,g} h"),
        ("operations", f"{plan.flops:.3g} FLOP, padding and recomputed activations not counted"),
    ]
    if plan.micro_batches_of_a_device is not None:
        count = plan.micro_batches_of_a_device
        idle = 1 - count / math.ceil(count)
        rows.insert(
            2, ("micro-batches", f"{count:g} of each GPU a step" + (f", {100 * idle:.0f} % idle" if idle else ""))
        )
    if plan.wall_hours is not None:
        wall = f"{duration(plan.wall_hours * 3600)} at {tflops:g} TFLOP/s of each GPU"
        rows.append(("time", f"{wall}: {plan.wall_hours * gpus:,.0f} GPU hours"))
    else:
        rows.append(
            ("time", "give --tflops, what a GPU reaches: `speed` and MFU of a run's log line or `harken bench`")
        )
    rows += [
        ("memory of a GPU", f"{plan.device_gb:.1f} GB for weights, gradients and optimiser, and activations besides"),
        ("checkpoints", f"{plan.kept_gb:.1f} GB: {plan.checkpoint_gb:.2f} GB each, and one more while it is written"),
        ("audio", f"{plan.corpus_gb:,.0f} GB as FLAC"),
    ]
    if plan.labels_gb:
        rows.append(("labels", f"{plan.labels_gb:.2f} GB at {FRAMES_PER_SECOND} a second"))
    return "\n".join(f"{name:18}{value}" for name, value in rows)
