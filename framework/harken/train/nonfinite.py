"""Where a number that is not finite came from: a step that was skipped is looked into once, by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harken.core import distributed, draws, progress
from harken.core.batch import Batch
from harken.engine.base import Engine
from harken.train.log import say


def name_skipped(engine: Engine, seed: int, step: int, batches: Sequence[Batch], losses: Sequence[Tensor]) -> bool:
    """Say that step `step` (from 0) was skipped, for which cuts, and where the first wrong number arose.

    Every rank calls it with its micro-batches and their losses; return whether a weight of any rank is not finite, so
    that no later step can be better.
    """
    progress.note("diagnose")
    bad = [batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(float(loss))]
    ids = distributed.gather([cut for batch in bad for cut in batch.ids])
    weights = list(dict.fromkeys(distributed.gather(_weights_not_finite(engine.model))))
    if weights:
        cause = f"weights that are not finite: {_some(weights)}"
    elif ids:
        # every rank runs one: ZeRO 3 gathers the weights of each module from all of them
        found = _first_module(engine, seed, step, bad[0] if bad else batches[0])
        cause = next(iter(distributed.gather([found] if bad else [])))
    else:
        cause = "the backward pass made it" + (
            f": gradients of {_some(engine.bad_gradients)}" if engine.bad_gradients else ""
        )
    cuts = f"cuts of micro-batches with such a loss: {', '.join(ids[:20])}" if ids else "every loss is finite"
    say(f"WARNING step {step + 1} skipped: its gradient is not finite; {cuts}; {cause}")
    return bool(weights)


def _weights_not_finite(model: nn.Module) -> list[str]:
    """Return the names of this rank's weights that are not finite; under ZeRO 3 it has a part of each."""
    parts = ((name, getattr(weight, "ds_tensor", weight)) for name, weight in model.named_parameters())
    return [name for name, part in parts if not all_finite(part)]


def _first_module(engine: Engine, seed: int, step: int, batch: Batch) -> str:
    """Run a micro-batch again, with the same dropout, and say which module's output first is not finite."""
    rows = [cut for cut, row in zip(batch.ids, batch.inputs, strict=True) if not all_finite(row)]
    found = [f"the audio itself is not finite: {_some(rows)}"] if rows else []
    names = {module: name for name, module in engine.model.named_modules()}

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if found or all(all_finite(part) for part in tensors(output)):
            return
        if module is engine.model:
            found.append("every module's output is finite: the loss made of them is not")
        else:
            found.append(f"first in the output of module `{names[module]}` ({type(module).__name__})")

    hooks = [module.register_forward_hook(look) for module in names]
    try:
        # compiled code does not call the hooks of what it is made of
        with torch.compiler.set_stance("force_eager"), torch.no_grad(), _buffers_kept(engine.model):
            draws.begin_micro_batch(seed, step, batch.micro_batch)
            engine(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "run again, its loss is finite: the device does not repeat itself"


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give running statistics back what they were: a second look at a batch must not count."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a module returns: a tensor, or a nest of sequences, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinities; integers never do."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
