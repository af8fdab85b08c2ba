"""The passes of a step, and what happens when memory runs out in one.

Every rank must make the same collectives, whatever happens to one of them. There are two cases:

- Passes are local (ZeRO 0 and 1: gradients are reduced once). The rank whose memory ran out forgets the step's
  gradients, halves the batch that did not fit and runs its passes again, while the others wait for it at the agreement
  that follows the passes. The last pass of ZeRO 0 sends gradients as they come: a rank that had sent some sends zeros
  for the rest, the agreement tells the others, and all run the step's passes again and send after them.
- Passes send gradients (ZeRO 2). The rank finishes the pass with a small batch, so that it sends what the others wait
  for, and goes on with small batches to the end. Then all ranks know of it, forget the step's gradients, and run all
  passes again, the batch in halves.

So the gradient is that of the step as it was planned, and no step is lost. A single cut that does not fit is left out
of it, and the rest of the step counts in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from torch import Tensor

from harken.core import distributed, draws, progress
from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.core.loss import Loss, Metrics
from harken.data.dataset import Task
from harken.data.loader import Step, TrainLoader
from harken.engine.base import Engine
from harken.engine.memory import free, is_out_of_memory, renew_limit
from harken.train.trainable import Trainable

Work = list[tuple[Task | None, Batch]]  # a batch, and what it was read from where it can be read again


@dataclass(frozen=True)
class Failure:
    """A batch for which memory ran out.

    cuts: their ids. seconds: what the plan counts for the longest one. characters: of the longest text. alone: it was
    one cut, and is left out.
    """

    cuts: tuple[str, ...]
    seconds: float
    characters: float
    alone: bool
    reason: str


@dataclass(frozen=True)
class Pass:
    """A batch that was learned from. total: its summed loss, detached."""

    batch: Batch
    total: Tensor
    metrics: Metrics


@dataclass
class Passes:
    """What became of a step's passes. done: on this rank. failures: of all ranks. scale: what `reduce` is given."""

    done: list[Pass] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    scale: float = 1.0


@dataclass
class StepRunner:
    """Runs a step's passes.

    loader: reads halves, and small batches, in this process; None for a stream, which cannot be read again.
    """

    engine: Engine
    loader: TrainLoader | None
    seed: int

    def run(self, step: Step, number: int) -> Passes:
        """Run this rank's passes of step `number`; every rank calls it, and then `Engine.reduce`."""
        renew_limit()
        tasks: Sequence[Task | None] = step.tasks or [None] * len(step.batches)
        work = list(zip(tasks, step.batches, strict=True))
        # the count of the whole step comes first: each sum is scaled by it, so its division over ranks cannot matter
        targets = self._targets(work)
        if self.engine.local_passes:
            return self._run_local(work, step.idle, number, targets)
        return self._run_sending(work, step.idle, number, targets)

    @staticmethod
    def _targets(work: Work) -> float:
        return max(distributed.sum_over_ranks([sum(batch.num_targets for _, batch in work)])[0], 1.0)

    def _run_local(self, work: Work, idle: list[Batch], number: int, targets: float) -> Passes:
        passes, lost, sending = Passes(), 0.0, True
        while True:
            failed = self.attempt(passes, work, idle, number, targets, sending=sending)
            if failed is not None:
                sent = self.engine.sent
                self.engine.abandon()
                free()
                if failed < len(work):
                    lost += work[failed][1].num_targets if passes.failures[-1].alone else 0.0
                    work[failed : failed + 1] = self._halves(work[failed][0])
                else:
                    idle = []
                if not sent:
                    continue
            self.engine.begin_reduce()
            failures, all_lost, repeat = distributed.sum_over_ranks([len(passes.failures), lost, failed is not None])
            if not repeat:
                break
            self.engine.abandon()
            sending = False
        if failures:
            passes.failures = distributed.gather(passes.failures)
            passes.scale = targets / max(targets - all_lost, 1.0)
        return passes

    def _run_sending(self, work: Work, idle: list[Batch], number: int, targets: float) -> Passes:
        failures: list[Failure] = []
        while True:
            passes = Passes()
            failed = self.attempt(passes, work, idle, number, targets)
            if not distributed.any_rank(failed is not None):
                passes.failures = failures
                return passes
            self.engine.abandon()
            free()
            failures += distributed.gather(passes.failures)
            if failed is not None and failed < len(work):
                work[failed : failed + 1] = self._halves(work[failed][0])
            most = max(distributed.gather([len(work)]))
            idle = [self._reader(None).smallest()] * (max(most, 1) - len(work))
            targets = self._targets(work)

    def _halves(self, task: Task | None) -> Work:
        loader = self._reader(None)
        assert task is not None
        return [(half, loader.dataset[half]) for half in task.halves()]

    def _reader(self, error: BaseException | None) -> TrainLoader:
        """Return the loader. Raises HarkenError, from the one that asks for it, where there is none."""
        if self.loader is None:
            raise HarkenError(
                "memory ran out, and a batch of a stream cannot be read again in halves: lower `batch.max_seconds`; "
                "the same command then continues from the last checkpoint"
            ) from error
        return self.loader

    def attempt(
        self, passes: Passes, work: Work, idle: list[Batch], number: int, targets: float, *, sending: bool = True
    ) -> int | None:
        """Run passes until one fails; return its place. Where passes send, run all of them, small ones in its stead.

        sending: let the last of local passes send its gradients as they come.
        """
        passes.done.clear()
        cast(Trainable, self.engine.model).begin_passes()
        # what counts what it has seen sees by this that a pass without weight is none to count
        batches = [*(batch for _, batch in work), *(replace(batch, num_targets=0.0) for batch in idle)]
        failed, small = None, None
        for place, batch in enumerate(batches):
            last = sending and place == len(batches) - 1
            if small is not None:
                self.engine.backward(self.engine(small).total * 0.0, last=last)
                continue
            counts = place < len(work)
            task = work[place][0] if counts else None
            progress.note("forward", ids=batch.ids)
            draws.begin_micro_batch(self.seed, number, batch.micro_batch)
            loss = self._pass(passes, task, batch, 1.0 / targets if counts else 0.0, last=last)
            if loss is None:
                failed = place
                if self.engine.local_passes:
                    break
                free()
                small = replace(self._reader(None).smallest(), num_targets=0.0)
                draws.begin_micro_batch(self.seed, number, batch.micro_batch)
                self.engine.recover(small, last=last)
            elif counts:
                passes.done.append(Pass(batch, loss.total.detach(), loss.metrics))
        return failed

    def _pass(self, passes: Passes, task: Task | None, batch: Batch, scale: float, *, last: bool) -> Loss | None:
        """Run a batch forward and backward; None when memory ran out. What it held is set free when this returns."""
        try:
            loss = self.engine(batch)
            progress.note("backward")
            self.engine.backward(loss.total * scale, last=last)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            loader = self._reader(error)
            if task is not None:
                seconds, characters = loader.cost(task)
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                passes.failures.append(Failure(batch.ids, seconds, characters, len(batch.ids) == 1, reason))
            return None
        return loss
