"""Trains a tiny model under one layout, or goes on from what another layout saved.

usage: worker_layouts.py PLAN.json, a list of {"processes": N, "jobs": [[STAGE, OPTIMIZER, OFFLOAD, FROM, OUT], ...]}:
a job takes four steps and writes what it holds after two to OUT/next; one with a folder FROM ("": none) goes on from
what is there, writes what it then holds to OUT/state, and takes two. All write their steps' losses to OUT/losses.json.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from worker_train import run_group

from harken.config.schema import EngineConfig, TrainConfig
from harken.core import distributed
from harken.core.batch import Batch
from harken.core.loss import Loss
from harken.engine.deepspeed import DeepSpeedEngine, start_processes
from harken.optim.groups import parameter_groups

MICRO_BATCHES = 4


class Toy(nn.Module):
    """Shapes that no number of ranks divides, one of a single number, a frozen parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.Linear(5, 5, bias=False).requires_grad_(requires_grad=False)
        self.inner = nn.Linear(5, 7)
        self.out = nn.Linear(7, 13)
        self.gain = nn.Linear(1, 1, bias=False)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, batch: Batch) -> Loss:
        outputs = self.out(torch.tanh(self.inner(self.fixed(batch.inputs)))) * self.scale.sum()
        return Loss(total=self.gain(outputs.flatten()[:, None]).square().sum())


class Counting(torch.optim.Optimizer):
    """Momentum whose state has a plain number, and whose groups have one that it changes itself."""

    def __init__(self, groups: list[dict[str, object]]) -> None:
        super().__init__(groups, {"lr": 1e-3, "momentum": 0.9, "taken": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            if group["params"]:
                group["taken"] += 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state.setdefault("momentum", torch.zeros_like(parameter)).mul_(group["momentum"]).add_(parameter.grad)
                parameter.sub_(state["momentum"], alpha=group["lr"] / (state["count"] + group["taken"]))


def make_optimizer(name: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        groups = parameter_groups(model, lambda name, step: 1.0)
        if name == "Counting":
            return Counting(groups)
        return getattr(torch.optim, name)(groups, lr=1e-3)

    return make


def batch(step: int, place: int) -> Batch:
    draws = torch.Generator().manual_seed(100 * step + place)
    return Batch(ids=("a",), inputs=torch.randn(3, 5, generator=draws), lengths=torch.tensor([3]))


def take_step(engine: DeepSpeedEngine, step: int) -> float:
    rank, world = distributed.rank(), distributed.world_size()
    places = range(rank, MICRO_BATCHES, world)
    total = 0.0
    for place in places:
        loss = engine(batch(step, place)).total / 1000
        engine.backward(loss, last=place == places[-1])
        total += float(loss.detach())
    engine.reduce()
    assert engine.step()
    return distributed.sum_over_ranks([total])[0]


def write(engine: DeepSpeedEngine, folder: Path) -> None:
    snapshot = engine.snapshot()
    assert (snapshot is not None) == distributed.is_main(), "one copy, on the main process"
    if snapshot is not None:
        folder.mkdir(parents=True)
        save_file(snapshot.weights, folder / "model.safetensors")
        snapshot.optimizer.write(folder)


def build(stage: int, optimizer: str, offload: bool = False) -> DeepSpeedEngine:
    config = EngineConfig(zero_stage=stage, threads=1, offload_optimizer=offload)
    start_processes(config)
    torch.manual_seed(1)
    return DeepSpeedEngine(Toy(), make_optimizer(optimizer), config, TrainConfig(steps=4))


def work(stage: int, optimizer: str, offload: bool, source: str, out: str) -> None:
    engine = build(stage, optimizer, offload)
    with torch.no_grad():
        if source:  # what is loaded must not be there by chance
            for value in engine.model.state_dict(keep_vars=True).values():
                value.mul_(0.5)
            engine.restore(Path(source))
            write(engine, Path(out) / "state")
    first = 2 if source else 0
    losses = [take_step(engine, step) for step in (first, first + 1)]
    if not source:
        write(engine, Path(out) / "next")
        losses += [take_step(engine, step) for step in (2, 3)]
    if distributed.is_main():
        (Path(out) / "losses.json").write_text(json.dumps(losses))
    distributed.barrier()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        run_group(entry["processes"], entry["jobs"], work)
