"""Sums of gradients over ranks, sent bucket by bucket while the backward pass still runs.

Source: PyTorch's DDP (arXiv 2006.15704, section 3.2), with two differences. Which bucket goes when follows from the
model alone and never from what a step met, so that sums have the same bits after a restart. And a pass that breaks off
for want of memory leaves nobody waiting: what it has not sent is sent as zeros, for a step that all ranks then repeat.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.distributed import Work

from harken.core import distributed

SMALL = 2**14
"""Numbers of a parameter up to which it is sent last."""
ALIGNED = 16
"""Every gradient begins at a multiple of as many numbers, where optimisers' fused kernels read several at once."""


@dataclass
class Bucket:
    """Parameters whose gradients are sent together, of one type. waiting: those that have none yet in this pass."""

    parameters: list[nn.Parameter]
    waiting: set[int] = field(default_factory=set)

    @property
    def size(self) -> int:
        """Numbers in it."""
        return sum(parameter.numel() for parameter in self.parameters)

    def expect(self, reached: set[int] | None) -> None:
        """Wait for the gradients of a pass: those of `reached`, or all."""
        self.waiting = {id(parameter) for parameter in self.parameters}
        if reached is not None:
            self.waiting &= reached

    def send(self) -> Work:
        """Begin the sum of its gradients, which become parts of one tensor; a missing one counts as zero."""
        first = self.parameters[0]
        room = [-(-parameter.numel() // ALIGNED) * ALIGNED for parameter in self.parameters]
        whole = torch.empty(sum(room), dtype=first.dtype, device=first.device)
        parts = [
            part.as_strided(parameter.size(), parameter.stride())  # those kernels ask for the layout of the parameter
            for part, parameter in zip(whole.split(room), self.parameters, strict=True)
        ]
        pairs = list(zip(parts, self.parameters, strict=True))
        found = [(part, parameter.grad) for part, parameter in pairs if parameter.grad is not None]
        with torch.no_grad():
            if found:
                torch._foreach_copy_([part for part, _ in found], [gradient for _, gradient in found])
            for part, parameter in pairs:
                if parameter.grad is None:
                    part.zero_()
        work = distributed.begin_sum(whole)
        for part, parameter in pairs:
            parameter.grad = part
        return work


def arrange(parameters: Iterable[nn.Parameter], elements: int) -> list[Bucket]:
    """Return buckets of at most `elements` numbers (a larger parameter has its own), in the order of their sending.

    Gradients come in about the reverse of the order of a module's parameters. What does not, and would hold up all
    others, is small: the embedding of masked frames, or a table of positions that all blocks share. So what is small
    comes last, all of it together not 1 % of a model.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    large = [parameter for parameter in reversed(trained) if parameter.numel() > SMALL]
    small = [parameter for parameter in reversed(trained) if parameter.numel() <= SMALL]
    buckets: list[Bucket] = []
    for parameter in (*large, *small):
        last = buckets[-1] if buckets else None
        if last is None or last.size + parameter.numel() > elements or last.parameters[0].dtype != parameter.dtype:
            buckets.append(Bucket([parameter]))
        else:
            last.parameters.append(parameter)
    return buckets


def reached_from(total: Tensor) -> set[int]:
    """Return the ids of the parameters that a backward pass from `total` gives a gradient."""
    assert total.grad_fn is not None
    seen: set[Node] = {total.grad_fn}
    left, found = [total.grad_fn], set()
    while left:
        node = left.pop()
        found.add(id(getattr(node, "variable", None)))
        fresh = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= fresh
        left += fresh
    return found


class GradientBuckets:
    """Sends the buckets of a step, in one order on all ranks.

    A step: `watch` before its last backward pass, `send_rest` after it, `finish`. Every rank makes the same calls of
    the last two, whatever became of its passes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], elements: int) -> None:
        self._buckets = arrange(parameters, elements)
        self._bucket_of = {id(own): bucket for bucket in self._buckets for own in bucket.parameters}
        self._flying: list[Work] = []
        self._watching = self._reaches_few = False
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._arrived)

    @property
    def sent(self) -> int:
        """Buckets of this step that were sent."""
        return len(self._flying)

    @property
    def number(self) -> int:
        """Buckets that there are."""
        return len(self._buckets)

    def watch(self, total: Tensor) -> None:
        """Send a bucket as soon as it and all before it are complete: `total.backward()` is the step's last pass."""
        # what no loss reaches (a dropped layer) must not hold up the rest; to find it takes the host some milliseconds
        reached = reached_from(total) if self._reaches_few else None
        for bucket in self._buckets:
            bucket.expect(reached)
        self._watching = True
        self._send_complete()

    def _arrived(self, parameter: Tensor) -> None:
        if not self._watching:
            return
        waiting = self._bucket_of[id(parameter)].waiting
        if id(parameter) not in waiting:
            raise RuntimeError(f"a parameter of shape {tuple(parameter.shape)} got a gradient twice in one pass")
        waiting.remove(id(parameter))
        self._send_complete()

    def _send_complete(self) -> None:
        while self.sent < self.number and not self._buckets[self.sent].waiting:
            self._flying.append(self._buckets[self.sent].send())

    def send_rest(self) -> None:
        """Send what no pass has sent."""
        self._reaches_few |= self._watching and self.sent < self.number
        self._watching = False
        while self.sent < self.number:
            self._flying.append(self._buckets[self.sent].send())

    def finish(self) -> None:
        """Send the rest and wait: every gradient is then the sum over ranks."""
        self.send_rest()
        while self._flying:
            self._flying.pop(0).wait()

    def forget(self) -> None:
        """Drop the gradients of this step; sums that were begun by all ranks are waited for.

        Where this rank has sent only some, the others are about to send the rest: `send_rest` is then still due.
        """
        self._watching = False
        if self.sent == self.number:
            self.finish()
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.grad = None
