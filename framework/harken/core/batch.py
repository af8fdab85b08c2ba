"""What the loader gives and an objective takes: a batch of ragged sequences."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from harken.core.packing import Packed, pack


@dataclass(frozen=True)
class Note:
    """What happened to a cut.

    kind: `replaced` (it could not be read), `unreadable` (the same in a stream, where nothing takes its place), `left
    out` (it cannot be learned), `noise left out`, `mixing left out` (`cut` is a noise or an utterance to mix
    in that could not be read), `of another length` (`cut`
    is a shard with some that are too short or too long). cut: its id. reason: a line for the user.
    """

    kind: str
    cut: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A padded batch.

    ids: one cut id for each row.
    inputs: `(B, S)` waveforms in [-1, 1], zero-padded at the end, or `(B, T, D)` precomputed frames.
    lengths: `(B,)` int64 on the CPU, in units of `inputs`. It stays on the CPU wherever the batch goes, so that
        asking whether anything is padded never waits for a device.
    targets: named tensors that the objective's `prepare` made (masks, labels, tokens), first axis B.
    texts: transcripts, empty strings where there are none.
    starts: `(B,)` int64, where in its cut each row begins (a crop), in units of `inputs`.
    num_targets: how many targets the summed loss covers; the loop divides by its sum over the whole step.
    notes: cuts that were replaced or left out of the loss; the loop counts and names them.
    micro_batch: its place within the step over all ranks, which seeds dropout.
    """

    ids: tuple[str, ...]
    inputs: Tensor
    lengths: Tensor
    targets: dict[str, Tensor] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    starts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    num_targets: float = 0.0
    notes: tuple[Note, ...] = ()
    micro_batch: int = 0

    def to(self, device: torch.device) -> Batch:
        """Copy the tensors to a device (asynchronously from pinned memory); `lengths` stays on the CPU."""
        if device.type == "cpu":
            return self
        return replace(
            self,
            inputs=self.inputs.to(device, non_blocking=True),
            targets={name: value.to(device, non_blocking=True) for name, value in self.targets.items()},
        )

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; called by torch's DataLoader in its pin thread.

        What stays on the CPU is copied, so that nothing holds the worker's shared memory.
        """
        return replace(
            self,
            lengths=self.lengths.clone(),
            starts=self.starts.clone(),
            inputs=self.inputs.pin_memory(),
            targets={name: value.pin_memory() for name, value in self.targets.items()},
        )

    def __getstate__(self) -> tuple[Packed, dict[str, Any]]:
        """Have a batch travel from a worker as one piece of memory."""
        fields = dict(vars(self))
        tensors = {name: fields.pop(name) for name in ("inputs", "lengths", "starts")}
        targets = {f"targets.{name}": value for name, value in fields.pop("targets").items()}
        return pack(tensors | targets), fields

    def __setstate__(self, state: tuple[Packed, dict[str, Any]]) -> None:
        """Take the tensors as views of that memory."""
        packed, fields = state
        targets = {}
        for name, value in packed.tensors().items():
            if name.startswith("targets."):
                targets[name.removeprefix("targets.")] = value
            else:
                fields[name] = value
        vars(self).update(fields, targets=targets)

    @property
    def padded(self) -> int:
        """Size of the padded time axis times the batch: what the model computes over, in input units."""
        return int(self.inputs.shape[0] * self.inputs.shape[1])

    @property
    def real(self) -> int:
        """Sum of the lengths, in input units."""
        return int(self.lengths.sum())


def padding_mask(lengths: Tensor, size: int) -> Tensor | None:
    """Return a `(B, size)` bool mask, True where padded, or None when nothing is padded.

    `lengths` is on the CPU, so the question costs no synchronisation; move the result to the device yourself.
    """
    if bool((lengths >= size).all()):
        return None
    return ~real_mask(lengths, size)


def real_mask(lengths: Tensor, size: int, device: torch.device | None = None) -> Tensor:
    """Return a `(B, size)` bool mask on a device, by default that of `lengths`, True where nothing is padded."""
    lengths = lengths.to(device or lengths.device, non_blocking=True)
    return torch.arange(size, device=lengths.device)[None, :] < lengths[:, None]
