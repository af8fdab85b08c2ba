"""Moves a codebook in two processes by halves of what one process alone gets; prints how far the codes are apart."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from harken.units.ema_codebook import EmaCodebook

STEPS = 3


def move(parts: list[list[torch.Tensor]]) -> torch.Tensor:
    """Return the codes after steps, each of some micro-batches of tokens."""
    torch.manual_seed(0)
    book = EmaCodebook(8, 4, 6, decay=0.7, seed=1)
    for tokens in parts:
        for part in tokens:
            book(part, remember=True)
        book.update()
    return book.codes


def main(store: Path) -> None:
    torch.manual_seed(5)
    steps = [[torch.randn(20, 8), torch.randn(12, 8)] for _ in range(STEPS)]
    alone = move(steps)
    child = os.fork()
    rank = 0 if child else 1
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    together = move([[tokens[rank]] for tokens in steps])
    both = [torch.empty_like(together) for _ in range(2)]
    dist.all_gather(both, together)
    dist.destroy_process_group()
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(both[0], both[1]), "ranks must have the same codes"
    print("apart", float((together - alone).abs().max()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
