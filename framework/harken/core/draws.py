"""Seeded randomness without state: every draw is a pure function of (run seed, epoch, id, purpose).

So worker count, prefetch, world size and restarts cannot change what is drawn.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def key(*parts: object) -> int:
    """Return a 64-bit key of the parts: the same on every machine and Python version, unlike `hash`."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Draws:
    """The draws of one epoch of one run."""

    seed: int
    epoch: int

    def generator(self, purpose: str, item: str = "") -> np.random.Generator:
        """Return a fresh generator for one purpose (`mask`, `crop`, `speed`, ...) and one item (a cut id)."""
        return np.random.Generator(np.random.Philox(key=key(self.seed, self.epoch, item, purpose)))


_shared = torch.Generator()
_step = torch.zeros(())  # a tensor, so that compiled code reads its value and is not compiled anew for each step


def begin_micro_batch(seed: int, step: int, micro_batch: int) -> None:
    """Seed torch for one micro-batch, so that dropout depends on its place in the plan alone.

    `micro_batch` is its place within the step over all ranks. The shared generator, for draws in which every rank
    and micro-batch must agree (which layers LayerDrop skips), depends on the step only. What changes in the course of
    training by a schedule reads the step from here too (`current_step`), so a resumed run has nothing to restore.
    """
    _step.fill_(step)
    torch.manual_seed(key(seed, step, micro_batch, "dropout") & (2**63 - 1))
    _shared.manual_seed(key(seed, step, "shared") & (2**63 - 1))


def shared_uniform() -> float:
    """Draw from [0, 1), the same on every rank and micro-batch of a step."""
    return float(torch.rand((), generator=_shared))


def current_step() -> Tensor:
    """Return the step of the micro-batch that was begun last, 0 before the first: a scalar on the CPU."""
    return _step
