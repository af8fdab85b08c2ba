"""The process group, reached in one place so that every collective can be found."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Work

_T = TypeVar("_T")


def rank() -> int:
    """Rank of this process among all (0 when there is one)."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes logs and files."""
    return rank() == 0


def environment_world_size() -> int:
    """Number of processes the launcher (torchrun, deepspeed) announced; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """Device of this process: its GPU by local rank, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """All-reduce (sum) a few numbers in float64."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device())
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def sum_tensor(values: Tensor) -> Tensor:
    """Return the sum over ranks of tensors of one shape, in their own precision."""
    if world_size() == 1:
        return values
    summed = values.clone()
    dist.all_reduce(summed)
    return summed


def begin_sum(values: Tensor) -> Work:
    """Begin to sum a tensor over ranks in its place; it must not be touched before the returned work's `wait`."""
    work: Work = dist.all_reduce(values, async_op=True)
    return work


def least_of_ranks(value: float) -> float:
    """Return the smallest of the ranks' numbers, on every rank; rare."""
    return min(gather([value]))


def any_rank(flag: bool) -> bool:
    """Whether any rank raised the flag; all ranks get the same answer."""
    return sum_over_ranks([float(flag)])[0] > 0


def gather(items: Sequence[_T]) -> list[_T]:
    """Return the items of all ranks, in the order of ranks, on every rank; small and rare ones."""
    if world_size() == 1:
        return list(items)
    boxes: list[list[_T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(boxes, list(items))
    return [item for box in boxes for item in box]


def lost_another(error: BaseException) -> bool:
    """Whether an exception tells that another rank is lost: its connection is closed, or it did not answer in time."""
    # gloo raises plain RuntimeErrors that begin with the file of its source they come from
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def broadcast_text(text: str) -> str:
    """Return rank 0's text on every rank."""
    if world_size() == 1:
        return text
    box: list[str] = [text]
    dist.broadcast_object_list(box, src=0, device=device())
    return box[0]
