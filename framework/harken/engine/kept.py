"""An engine's weights, optimiser state and counters, put aside and put back bit for bit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from harken.engine.deepspeed import DeepSpeedEngine
from harken.optim.ema import WeightAverage

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@contextmanager
def kept(engine: DeepSpeedEngine, average: WeightAverage | None) -> Iterator[None]:
    """Let steps be taken, and afterwards have everything as it was; on the disk, as memory is what is measured."""
    own, optimizer = engine.wrapped, getattr(engine.optimizer, "optimizer", engine.optimizer)
    scaler = own.torch_autocast_z0_gradscaler
    with tempfile.TemporaryFile() as file:
        torch.save(
            {
                "tensors": [tensor.detach() for tensor in _tensors(engine, optimizer, average)],
                "state": [dict(optimizer.state.get(parameter, {})) for parameter in _parameters(optimizer)],
                "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
                "counters": {name: getattr(own, name) for name in COUNTERS},
                "scaler": scaler.state_dict() if scaler is not None else None,
                "updates": average.updates if average is not None else 0,
                "random": torch.get_rng_state(),
            },
            file,
        )
        try:
            yield
        finally:
            file.seek(0)
            saved = torch.load(file, map_location="cpu", weights_only=False)
            _put_back(engine, optimizer, average, saved)
            if scaler is not None:
                scaler.load_state_dict(saved["scaler"])


def _parameters(optimizer: Any) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _tensors(engine: DeepSpeedEngine, optimizer: Any, average: WeightAverage | None) -> Iterator[Tensor]:
    """Weights, buffers, what the optimiser works on (ZeRO's partitions are copies), and the average."""
    averages = average.average.values() if average is not None else ()
    return chain(engine.model.parameters(), engine.model.buffers(), _parameters(optimizer), averages)


@torch.no_grad()
def _put_back(engine: DeepSpeedEngine, optimizer: Any, average: WeightAverage | None, saved: dict[str, Any]) -> None:
    engine.abandon()
    for tensor, value in zip(_tensors(engine, optimizer, average), saved["tensors"], strict=True):
        tensor.copy_(value)
    for parameter, state in zip(_parameters(optimizer), saved["state"], strict=True):
        if not state:
            optimizer.state.pop(parameter, None)
            continue
        for name, value in state.items():
            if isinstance(value, Tensor):
                optimizer.state[parameter][name].copy_(value)
            else:
                optimizer.state[parameter][name] = value
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(values)
    for name, value in saved["counters"].items():
        setattr(engine.wrapped, name, value)
    if average is not None:
        average.updates = saved["updates"]
    torch.set_rng_state(saved["random"])
