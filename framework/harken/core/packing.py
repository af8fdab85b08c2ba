"""Tensors as one piece of memory, so that a batch travels between processes as one.

A tensor that a worker sends is shared memory, and each opens a connection of its own to the worker, which costs the
receiving process half a millisecond.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 64  # of a cache line; every type's size divides it


@dataclass(frozen=True)
class Packed:
    """Tensors by name, side by side in `memory`. places: name, type, shape and first byte of each."""

    memory: Tensor
    places: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors, as views of the memory; of autograd's they are each their own (`data`)."""
        return {
            name: self.memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape).data
            for name, dtype, shape, start in self.places
        }


def pack(tensors: Mapping[str, Tensor]) -> Packed:
    """Copy tensors of any types and shapes on the CPU into one piece of memory."""
    places, size = [], 0
    for name, tensor in tensors.items():
        places.append((name, tensor.dtype, tuple(tensor.shape), size))
        size += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    packed = Packed(torch.empty(size, dtype=torch.uint8), tuple(places))
    for name, place in packed.tensors().items():
        place.copy_(tensors[name])
    return packed
