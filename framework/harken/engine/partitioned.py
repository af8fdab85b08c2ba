"""Taking up a ZeRO 2 pass that failed halfway, so that the other ranks do not wait for ever.

Under ZeRO 2 gradients are sent while the backward pass goes on, bucket after bucket, in the order in which parameters
get them. That order follows from the model and not from the batch. So a rank whose memory ran out can run a small batch
instead and send on from where it broke off: parameters that were put into a bucket before are passed over.
"""

from __future__ import annotations

from typing import Any

from harken.core.errors import HarkenError


class PartialPass:
    """Watches which parameters of a pass DeepSpeed's optimiser has taken, and lets none be taken twice."""

    def __init__(self, optimizer: Any) -> None:
        self._process, self._prepare = optimizer.process_gradients, optimizer.setup_buckets
        self._taken: set[int] = set()
        self._taking = False
        optimizer.process_gradients = self._take

    def _take(self, parameter: Any, group: int) -> None:
        if id(parameter) in self._taken:
            return
        self._prepare()  # takes the most memory here, and may be called again
        self._taking = True
        self._process(parameter, group)
        self._taking = False
        self._taken.add(id(parameter))

    def finished(self) -> None:
        """A pass is complete: the next begins."""
        self._taken.clear()

    def check(self) -> None:
        """Raise HarkenError where DeepSpeed itself broke off: nobody can say what it had sent."""
        if self._taking:
            raise HarkenError(
                "memory ran out while gradients were sent, which cannot be taken up: lower `batch.max_seconds` (or "
                "`batch.memory_share` with `auto`) or `engine.bucket_elements`; the same command then continues from "
                "the last checkpoint"
            )


def forget_pass(optimizer: Any) -> None:
    """Let an optimiser of DeepSpeed's leave the backward pass in which it was interrupted."""
    while optimizer._backward_active_depth > 0:  # noqa: SLF001
        optimizer.exit_backward()


def forget_partitions(optimizer: Any) -> None:
    """Drop the gradients that ZeRO 2 has added up, as DeepSpeed does for a step whose gradient is not finite."""
    optimizer.zero_grad(set_to_none=True)
    optimizer.micro_step_id = -1
    if optimizer.cpu_offload:
        optimizer.reset_cpu_buffers()
        return
    for sums in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
        for group in sums:
            sums[group] = None
