"""What a run writes while it trains: one readable line, metrics.jsonl, TensorBoard, a progress bar on a terminal."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from harken.core import distributed
from harken.core.batch import Batch
from harken.core.clock import duration
from harken.core.draws import key


def say(text: str) -> None:
    """Print a line from the main process, with the time."""
    if distributed.is_main():
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class RunLog:
    """The main process writes; other ranks' calls do nothing, except that each writes its own sample log."""

    def __init__(self, folder: Path, *, total_steps: int, tensorboard: bool, samples: bool, start_step: int) -> None:
        self.total = total_steps
        self._samples = (folder / f"samples.rank{distributed.rank()}.jsonl").open("a") if samples else None
        self._metrics = self._board = self._bar = None
        if not distributed.is_main():
            return
        self._metrics = (folder / "metrics.jsonl").open("a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, leave=False)

    def samples(self, step: int, batch: Batch) -> None:
        """Record which cuts and masks a micro-batch of a step had."""
        if self._samples is None:
            return
        mask = batch.targets.get("mask")
        row = {
            "step": step,
            "micro_batch": batch.micro_batch,
            "ids": batch.ids,
            "starts": batch.starts.tolist(),
            "mask": f"{key(mask.numpy().tobytes()):016x}" if mask is not None else "",
        }
        self._samples.write(json.dumps(row) + "\n")
        self._samples.flush()

    def advance(self) -> None:
        """Move the progress bar."""
        if self._bar is not None:
            self._bar.update()

    def write(self, kind: str, step: int, figures: dict[str, float], **extra: Any) -> None:
        """Write one record (`train` or `valid`) to metrics.jsonl and TensorBoard."""
        if self._metrics is None:
            return
        self._metrics.write(json.dumps({"kind": kind, "step": step, "time": time.time(), **extra, **figures}) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def line(self, kind: str, step: int, figures: dict[str, float], eta_seconds: float | None = None) -> None:
        """Print one readable line."""
        parts = [f"{kind} {step}/{self.total}"] + [_format(name, value) for name, value in figures.items()]
        if eta_seconds is not None:
            parts.append(f"eta {duration(eta_seconds)}")
        say("  ".join(parts))

    def close(self) -> None:
        """Close the files."""
        for stream in (self._samples, self._metrics, self._board, self._bar):
            if stream is not None:
                stream.close()


_UNITS = {
    "audio_seconds_per_second": ("speed", "{:.0f} audio-s/s"),
    "padding_percent": ("padding", "{:.1f}%"),
    "data_wait_percent": ("wait", "{:.1f}%"),
    "update_percent": ("update", "{:.1f}%"),
    "logging_percent": ("logging", "{:.1f}%"),
    "mfu_percent": ("mfu", "{:.1f}%"),
    "memory_gib": ("memory", "{:.2f}GiB"),
    "learning_rate": ("lr", "{:.2e}"),
    "gradient_norm": ("gnorm", "{:.3g}"),
}


def _format(name: str, value: float) -> str:
    label, pattern = _UNITS.get(name, (name, "{:.4g}"))
    return f"{label} {pattern.format(value)}"
