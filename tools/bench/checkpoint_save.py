"""How long saving a checkpoint of HuBERT Base holds up training, what it weighs, and what memory it takes.

python tools/bench/checkpoint_save.py --folder DISK/save
torchrun --standalone --nproc_per_node 2 tools/bench/checkpoint_save.py --folder DISK/save --zero-stage 1

The model has the preset's weights and an optimiser state for each, filled by one step on a loss that costs nothing.
Each save is the training loop's own.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import cast

import torch

from harken.config.load import load
from harken.config.registry import build
from harken.core import distributed
from harken.core.batch import Batch
from harken.core.files import remove
from harken.core.loss import Loss
from harken.engine.deepspeed import DeepSpeedEngine, start_processes
from harken.objectives.saved import build_objective
from harken.optim.groups import parameter_groups
from harken.train.checkpoint import Checkpoints
from harken.train.state import TrainState

MIB = 2**20


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="new folder on the disk to measure; removed at the end"
    )
    parser.add_argument("--layers", type=int, default=12, help="of the encoder (default: 12, HuBERT Base)")
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2), default=0)
    parser.add_argument("--saves", type=int, default=3)
    args = parser.parse_args(arguments)
    if args.folder.exists():
        parser.error(f"--folder must be new, and {args.folder} is there")
    return args


def make_engine(layers: int, zero_stage: int, folder: Path) -> tuple[DeepSpeedEngine, Checkpoints]:
    """Return an engine whose optimiser has taken a step, and checkpoints in a folder."""
    changes = [f"encoder.layers={layers}", f"engine.zero_stage={zero_stage}", "engine.threads=1"]
    config = load(["hubert_base"], ["data.train=none", "data.labels=[none]", *changes]).config
    start_processes(config.engine)
    model = build_objective(config)

    def forward(batch: Batch) -> Loss:
        return Loss(total=torch.stack([parameter.sum() for parameter in model.parameters()]).sum() * 1e-6)

    model.forward = forward  # type: ignore[method-assign]

    def make_optimizer(module: torch.nn.Module) -> torch.optim.Optimizer:
        groups = parameter_groups(module, model.rate_scale)
        return cast(torch.optim.Optimizer, build("optimizer", config.optimizer, groups=groups))

    engine = DeepSpeedEngine(model, make_optimizer, config.engine, config.train)
    batch = Batch(ids=("a",), inputs=torch.zeros(1, 1), lengths=torch.tensor([1]))
    engine.backward(engine(batch).total, last=True)
    engine.reduce()
    engine.step()
    if distributed.is_main():
        folder.mkdir(parents=True)
    distributed.barrier()
    return engine, Checkpoints(folder, config)


def resident(*, peak: bool) -> int:
    """Return this process's resident size, or its largest since `forget_peak`, in MiB. Linux alone."""
    name = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(name))


def forget_peak() -> None:
    """Let the peak begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def main(arguments: list[str]) -> int:
    """Save a few times and print a line for each, and each rank's memory."""
    args = parse(arguments)
    engine, checkpoints = make_engine(args.layers, args.zero_stage, args.folder)
    parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    for step in range(1, args.saves + 1):
        forget_peak()
        before, started, used = resident(peak=False), time.perf_counter(), time.thread_time()
        checkpoints.save(engine, TrainState(step=step), None)
        blocked, used = time.perf_counter() - started, time.thread_time() - used
        checkpoints.wait()
        written = time.perf_counter() - started
        memory = distributed.gather([f"{before} to {resident(peak=True)}"])
        if distributed.is_main():
            size = sum(path.stat().st_size for path in (checkpoints.root / checkpoints.names()[-1]).rglob("*"))
            print(
                f"save {step}: training waits {blocked:.2f} s ({used:.2f} s of CPU), "
                f"on the disk after {written:.2f} s; "
                f"{size / MIB:.0f} MiB, {size / parameters:.2f} bytes a parameter ({parameters / 1e6:.1f}M); "
                f"MiB resident before and at most, by rank: {', '.join(memory)}",
                flush=True,
            )
    if distributed.is_main():
        remove(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
