"""The flight recorder: the last collectives of every rank, written down when a run that stands is ended.

PyTorch keeps them in a ring for NCCL and gloo: which collective, of which shapes, called from where, begun or finished.
The watchdog writes each rank's into `EXP/stacks/flight_RANK`, and NCCL does so itself where its own timeout or an error
comes first (`nccl_RANK`). `python -m torch.distributed.flight_recorder.fr_trace --prefix flight_ EXP/stacks` compares
the ranks when each has left one. What an earlier start has left is put aside, as `EXP/stacks.before`: its ranks are
others.

Source: PyTorch's "ProcessGroupNCCL environment variables"; its newer versions warn of the old names of `TORCH_FR_*`.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch

from harken.core import distributed
from harken.core.files import atomic_path, remove

EVENTS = 2000
"""Collectives that each rank remembers."""


def record_flights(folder: Path) -> None:
    """Have the process group, which is made after this, remember its collectives; what the user set stays."""
    if torch.cuda.is_available():  # NCCL makes no folder
        (folder / "stacks").mkdir(parents=True, exist_ok=True)
    for name, value in (
        ("TORCH_FR_BUFFER_SIZE", str(EVENTS)),
        ("TORCH_FR_DUMP_TEMP_FILE", str(folder.resolve() / "stacks" / "nccl_")),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
    ):
        os.environ.setdefault(name, value)


def dump_flight(stacks: Path) -> None:
    """Write this rank's last collectives into the folder of stacks; nothing where PyTorch has no recorder."""
    native = torch._C._distributed_c10d  # noqa: SLF001  the only way to ask for them before NCCL's own timeout
    kind = "_dump_nccl_trace" if torch.distributed.get_backend() == "nccl" else "_dump_fr_trace"
    dump = getattr(native, kind, None)
    if dump is not None:
        stacks.mkdir(parents=True, exist_ok=True)
        with atomic_path(stacks / f"flight_{distributed.rank()}") as temporary:
            temporary.write_bytes(with_groups(dump(), distributed.world_size()))


def with_groups(dump: bytes, world_size: int) -> bytes:
    """Return a dump that lists the groups of its collectives, by whose names `fr_trace` looks for their ranks.

    gloo's recorder (torch 2.13) lists one group, without a name, and `fr_trace` ends with a KeyError. All groups of a
    run, its own and DeepSpeed's copy of it, have all ranks.
    """
    data = pickle.loads(dump)  # noqa: S301  of this process itself
    if set(data["pg_config"]) == {""}:
        groups = {tuple(entry["process_group"]) for entry in data["entries"]}
        ranks = str(list(range(world_size)))
        data["pg_config"] = {name: {"name": name, "desc": description, "ranks": ranks} for name, description in groups}
    return pickle.dumps(data)


def put_aside(stacks: Path) -> None:
    """Move what an earlier start left, so that ranks of two starts are not taken for those of one.

    Not into a folder below: `fr_trace` reads those, too.
    """
    old = [*stacks.glob("flight_*"), *stacks.glob("nccl_*")]
    if old:
        before = stacks.with_name(f"{stacks.name}.before")
        remove(before)
        before.mkdir()
        for path in old:
            path.rename(before / path.name)
