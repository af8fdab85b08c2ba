"""Blocks under `torch.compile`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from harken.core.errors import HarkenError

_MOST_GRAPHS = 256
"""Of one function. Blocks of several widths, with and without padding, dropout and gradients share one: torch would go
on without compiling after 8."""


def compile_blocks(blocks: Sequence[nn.Module], whose: str) -> None:
    """Have every block of an encoder compiled in its first pass; names of parameters stay.

    Lengths are symbols, so that ragged batches share a graph. Frontends, heads and losses stay as they are: the
    convolutions of a waveform are a library's, and a head's rows differ in every batch. whose: blocks, for the error.
    Raises HarkenError where there is none.
    """
    from torch._dynamo import config

    config.recompile_limit = config.accumulated_recompile_limit = _MOST_GRAPHS
    # constants stay constants, as the backward pass of an autograd function takes no symbols; schedules are tensors
    config.specialize_float = True
    if not blocks:
        raise HarkenError(f"`engine.compile` must be false for {whose}: what it repeats is not compiled")
    for block in blocks:
        block.compile(dynamic=True)
