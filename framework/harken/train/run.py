"""From a configuration to a run: everything is built and checked here, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from harken.config.load import flatten, to_yaml
from harken.config.registry import build
from harken.config.saved import load_config
from harken.config.schema import RunConfig
from harken.core import distributed
from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.core.files import write_text_atomic
from harken.core.frames import FrameSpec
from harken.data.dataset import Prepare
from harken.data.loader import EvalLoader, TrainLoader
from harken.data.order import Position
from harken.engine.deepspeed import DeepSpeedEngine, group_names, start_processes
from harken.engine.precision import resolved
from harken.optim.ema import WeightAverage
from harken.optim.groups import parameter_groups, scaled_by_name
from harken.optim.schedules.base import Schedule
from harken.train.checkpoint import Checkpoints
from harken.train.lock import only_run
from harken.train.log import RunLog, say
from harken.train.loop import Run, out_of_patience, rehearse, train
from harken.train.speed import Speedometer, peak_tflops
from harken.train.state import TrainState


class Trainable(Protocol):
    """What this package needs of an objective, which it never imports."""

    def flops(self, batch: Batch) -> float:
        """Operations of a training step."""
        ...

    def rate_scale(self, parameter: str, step: int) -> float:
        """Factor on a parameter's learning rate."""
        ...

    def after_step(self, step: int) -> None:
        """Update what the optimiser does not."""
        ...

    def fingerprint(self, config: RunConfig) -> dict[str, str]:
        """Return what the targets are made of."""
        ...


MakeObjective = Callable[[RunConfig], nn.Module]
MakePrepare = Callable[[bool], Prepare]


def run_training(config: RunConfig, folder: Path, make: MakeObjective, prepare: MakePrepare, spec: FrameSpec) -> str:
    """Train, or continue the run that is in `folder`; return how it ended (see `harken.train.loop.train`).

    make: builds the objective with fresh weights. prepare: builds its worker part, for training or validation.
    spec: the frontend's frame arithmetic.
    """
    start_processes(config.engine)
    config = replace(config, engine=resolved(config.engine))  # what was chosen is what is logged and saved
    folder.mkdir(parents=True, exist_ok=True)
    with only_run(folder):
        return _run(_build(config, folder, make, prepare, spec))


def _run(run: Run) -> str:
    config, folder = run.config, run.folder
    try:
        if run.state.step >= config.train.steps:
            say(f"{folder} has already taken its {config.train.steps} steps: nothing to do")
            return "finished"
        if out_of_patience(run):
            say(
                f"{folder} stopped early at step {run.state.step}: nothing to do; "
                f"`train.patience` above {run.state.validations_without_best}, or 0, goes on"
            )
            return "early stop"
        rehearse(run)
        return train(run)
    finally:
        run.log.close()


def _build(config: RunConfig, folder: Path, make: MakeObjective, prepare: MakePrepare, spec: FrameSpec) -> Run:
    rank, world = distributed.rank(), distributed.world_size()
    loader = TrainLoader(
        config.data,
        config.batch,
        prepare(True),
        seed=config.seed,
        hop=spec.stride,
        rank=rank,
        world_size=world,
        even_passes=config.engine.zero_stage > 1,  # gradients or weights are sent in every pass
    )
    say(f"training data {config.data.train}: {loader.describe()}")
    valid = None
    if config.data.valid is not None:
        valid = EvalLoader(
            config.data.valid, config.data, config.batch.max_seconds, prepare(False), rank=rank, world_size=world
        )
    torch.manual_seed(config.seed)  # the weights: equal on every rank and for every number of ranks
    model = make(config)
    part = cast(Trainable, model)
    rate_scale = scaled_by_name(part.rate_scale, config.train.rate_scales, model)
    names: list[str] = []

    def make_optimizer(module: nn.Module) -> torch.optim.Optimizer:
        groups = parameter_groups(module, rate_scale)
        names.extend(group_names(groups))
        return cast(torch.optim.Optimizer, build("optimizer", config.optimizer, groups=groups))

    engine = DeepSpeedEngine(model, make_optimizer, config.engine, config.train)
    average = _average(config, engine.model)
    checkpoints = Checkpoints(folder, config)
    state = _resume(checkpoints, engine, average, part.fingerprint(config))
    if distributed.is_main():
        write_text_atomic(folder / "config.yaml", to_yaml(config))
    dtype = torch.float32 if config.engine.precision == "fp32" else torch.bfloat16
    peak = config.log.peak_tflops or peak_tflops(dtype)
    _describe(model, config, peak)
    return Run(
        config=config,
        folder=folder,
        engine=engine,
        loader=loader,
        valid=valid,
        schedule=cast(Schedule, build("schedule", config.schedule, steps=config.train.steps)),
        rate_scale=rate_scale,
        group_names=names,
        flops=part.flops,
        after_step=part.after_step,
        checkpoints=checkpoints,
        log=RunLog(
            folder,
            total_steps=config.train.steps,
            tensorboard=config.log.tensorboard,
            samples=config.log.samples,
            start_step=state.step,
        ),
        speed=Speedometer(config.data.sample_rate, peak),
        average=average,
        state=state,
    )


def _average(config: RunConfig, model: nn.Module) -> WeightAverage | None:
    if not config.train.ema_decay:
        return None
    if config.engine.zero_stage == 3:
        raise HarkenError(
            "`train.ema_decay` needs whole weights on each rank, which `engine.zero_stage: 3` does not keep: "
            "use stage 0, 1 or 2"
        )
    return WeightAverage(model, config.train.ema_decay)


def _resume(
    checkpoints: Checkpoints, engine: DeepSpeedEngine, average: WeightAverage | None, fingerprint: dict[str, str]
) -> TrainState:
    newest = checkpoints.newest()
    if newest is None:
        return TrainState(position=Position(), fingerprint=fingerprint)
    changed = config_changes(load_config(newest), checkpoints.config)
    if changed:
        say(f"WARNING the configuration differs from that of {newest}:\n  " + "\n  ".join(changed))
    state = checkpoints.state(newest)
    _check_fingerprint(newest, state.fingerprint, fingerprint)
    state.fingerprint = fingerprint
    checkpoints.load(newest, engine, average)
    say(
        f"continuing from {newest}: step {state.step}, epoch {state.position.epoch}, "
        f"{state.seconds / 3600:.2f} h of audio seen"
    )
    return state


def _check_fingerprint(checkpoint: Path, saved: dict[str, str], found: dict[str, str]) -> None:
    """Raise HarkenError when the model would be trained towards other targets under the same class ids."""
    for name in saved.keys() & found.keys():
        if saved[name] != found[name]:
            raise HarkenError(
                f"`{name}` is not what {checkpoint} was trained with: that was {saved[name]}, this is {found[name]}; "
                "give it the old one, or start another `--exp` from its weights with `train.init_from`"
            )


def config_changes(old: RunConfig, new: RunConfig) -> list[str]:
    """Return one line for each value that differs."""
    before, after = flatten(asdict(old)), flatten(asdict(new))
    missing: Any = "(not there)"
    keys = sorted(before.keys() | after.keys())
    return [
        f"{key}: was {before.get(key, missing)!r}, is {after.get(key, missing)!r}"
        for key in keys
        if before.get(key, missing) != after.get(key, missing)
    ]


def _describe(model: nn.Module, config: RunConfig, peak: float) -> None:
    total = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    trained = sum(
        getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters() if parameter.requires_grad
    )
    say(
        f"{config.objective.name} on {config.encoder.name} and {config.frontend.name}: "
        f"{total / 1e6:.2f}M parameters, {trained / 1e6:.2f}M trained; "
        f"{distributed.world_size()} process(es), {torch.get_num_threads()} threads, ZeRO {config.engine.zero_stage}, "
        f"{config.engine.precision}; peak {peak:.2f} TFLOP/s"
    )
