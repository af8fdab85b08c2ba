"""From a configuration to a run: everything is built and checked here, before the first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from harken.config.load import flatten, to_yaml
from harken.config.registry import build
from harken.config.saved import load_config
from harken.config.schema import RunConfig
from harken.core import distributed
from harken.core.errors import HarkenError
from harken.core.files import write_text_atomic
from harken.core.frames import FrameSpec
from harken.core.zero import state_bytes
from harken.data.check import check_data
from harken.data.dataset import Prepare
from harken.data.limits import LimitState
from harken.data.loader import EvalLoader, TrainLoader
from harken.data.streams.loader import StreamLoader
from harken.data.streams.shards import is_stream
from harken.engine.deepspeed import DeepSpeedEngine, group_names, leave_at_exit, start_processes, stay_at_exit
from harken.engine.flight import record_flights
from harken.engine.memory import GIB, refuse_above
from harken.engine.precision import resolved
from harken.engine.watchdog import watched
from harken.optim.ema import WeightAverage
from harken.optim.groups import RateScale, parameter_groups, scaled_by_name
from harken.optim.schedules.base import Schedule
from harken.train.autosize import find_sizes
from harken.train.checkpoint import Checkpoints
from harken.train.graphs import GraphCounter
from harken.train.lock import only_run
from harken.train.log import RunLog, say
from harken.train.loop import Run, out_of_patience, rehearse, train
from harken.train.profile import Profile
from harken.train.shrink import limits_of
from harken.train.speed import Speedometer, peak_tflops
from harken.train.state import TrainState
from harken.train.trainable import Trainable
from harken.train.tune import table

MakeObjective = Callable[[RunConfig], nn.Module]
MakePrepare = Callable[[bool], Prepare]


def run_training(config: RunConfig, folder: Path, make: MakeObjective, prepare: MakePrepare, spec: FrameSpec) -> str:
    """Train, or continue the run that is in `folder`; return how it ended (see `harken.train.loop.train`).

    make: builds the objective with fresh weights. prepare: builds its worker part, for training or validation.
    spec: the frontend's frame arithmetic.
    """
    record_flights(folder)
    stay_at_exit()
    start_processes(config.engine)
    config = replace(config, engine=resolved(config.engine))  # what was chosen is what is logged and saved
    folder.mkdir(parents=True, exist_ok=True)
    with only_run(folder), watched(folder, config.engine.timeout_seconds):
        ended = _run(build_run(config, folder, make, prepare, spec))
    leave_at_exit()
    return ended


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
        run.profile.close()
        run.checkpoints.close()
        run.log.close()


def tune_batch(
    config: RunConfig, folder: Path | None, make: MakeObjective, prepare: MakePrepare, spec: FrameSpec
) -> str:
    """Measure which batches fit in this device's memory; return a table, and the keys that give a run its numbers.

    folder: of the run that will use it, whose cache is read and written; None measures for the table alone.
    """
    start_processes(config.engine)
    batch = replace(config.batch, max_seconds="auto", limits=())
    config = replace(config, engine=resolved(config.engine), batch=batch)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    learner = _learner(config, make)
    config = replace(config, engine=learner.engine.config)
    loader = training_loader(config, prepare, spec)
    assert isinstance(loader, TrainLoader), "a stream's loader refuses `auto`"
    sizes = find_sizes(config, folder, learner.engine, learner.average, loader)
    return table(sizes.measured, sizes.limits)


def training_loader(config: RunConfig, prepare: MakePrepare, spec: FrameSpec) -> TrainLoader | StreamLoader:
    """Return what reads a run's training data, of a manifest or a stream; this rank's share of it."""
    kind: type[StreamLoader | TrainLoader] = StreamLoader if is_stream(config.data.train) else TrainLoader
    return kind(
        config.data,
        config.batch,
        prepare(True),
        seed=config.seed,
        hop=spec.stride,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        even_passes=config.engine.zero_stage in (2, 3),  # gradients or weights are sent in every pass
    )


@dataclass(frozen=True)
class _Learner:
    """A model and what changes it. names: of the optimiser's groups. rate_scale: factor on a parameter's rate."""

    model: nn.Module
    engine: DeepSpeedEngine
    average: WeightAverage | None
    names: list[str]
    rate_scale: RateScale


def _learner(config: RunConfig, make: MakeObjective) -> _Learner:
    torch.manual_seed(config.seed)  # the weights: equal on every rank and for every number of ranks
    model = make(config)
    if config.engine.compile:
        cast(Trainable, model).compile_blocks()
    rate_scale = scaled_by_name(cast(Trainable, model).rate_scale, config.train.rate_scales, model)
    names: list[str] = []

    def make_optimizer(module: nn.Module) -> torch.optim.Optimizer:
        groups = parameter_groups(module, rate_scale)
        names.extend(group_names(groups))
        return cast(torch.optim.Optimizer, build("optimizer", config.optimizer, groups=groups))

    own = config.engine
    if config.optimizer.whole_tensors and own.zero_stage == "auto":
        own = replace(own, zero_stage=0)
    engine = DeepSpeedEngine(model, make_optimizer, own, config.train)
    return _Learner(model, engine, _average(config, engine.model), names, rate_scale)


def _limit(config: RunConfig, folder: Path, loader: TrainLoader, learner: _Learner, state: TrainState) -> None:
    """Give the loader the limits that the run was saved with, or that are measured now."""
    auto = config.batch.max_seconds == "auto"
    state.limits = limits_of(state, None if auto else config.batch.micro_batch_seconds)
    if auto and state.limits is None:
        state.limits = LimitState.begin(find_sizes(config, folder, learner.engine, learner.average, loader).limits)
    if state.limits is not None:
        loader.limit(state.limits)


def build_run(config: RunConfig, folder: Path, make: MakeObjective, prepare: MakePrepare, spec: FrameSpec) -> Run:
    """Build a run, and load the newest checkpoint in `folder` if there is one; every rank calls it."""
    _check(config, prepare)
    learner = _learner(config, make)
    if config.engine.zero_stage == "auto" and distributed.world_size() > 1:
        _explain_stage(learner)
    config = replace(config, engine=learner.engine.config)
    loader = training_loader(config, prepare, spec)
    part = cast(Trainable, learner.model)
    checkpoints = Checkpoints(folder, config)
    state = _resume(checkpoints, learner.engine, learner.average, part.fingerprint(config))
    state.position, exactness = loader.restore(state.position)
    if exactness:
        say(exactness)
    if isinstance(loader, TrainLoader):
        _limit(config, folder, loader, learner, state)
    if config.batch.memory_gib is not None:
        refuse_above(config.batch.memory_gib)
    say(f"training data {config.data.train}: {loader.describe()}")
    valid = None
    if config.data.valid is not None:
        most = config.batch.micro_batch_seconds
        if isinstance(loader, TrainLoader):
            most = loader.planner.limits.now.at(math.inf)
        rank, world = distributed.rank(), distributed.world_size()
        valid = EvalLoader(config.data.valid, config.data, most, prepare(False), rank=rank, world_size=world)
    if distributed.is_main():
        write_text_atomic(folder / "config.yaml", to_yaml(config))
    dtype = torch.float32 if config.engine.precision == "fp32" else torch.bfloat16
    measure = None if config.log.peak_tflops else partial(peak_tflops, dtype)
    peak = config.log.peak_tflops or peak_tflops(dtype)
    _describe(learner.model, config, peak)
    return Run(
        config=config,
        folder=folder,
        engine=learner.engine,
        loader=loader,
        valid=valid,
        schedule=cast(Schedule, build("schedule", config.schedule, steps=config.train.steps)),
        rate_scale=learner.rate_scale,
        group_names=learner.names,
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
        speed=Speedometer(config.data.sample_rate, peak, measure),
        profile=Profile(folder, config.log.profile),
        graphs=GraphCounter(enabled=config.engine.compile),
        average=learner.average,
        state=state,
    )


def _check(config: RunConfig, prepare: MakePrepare) -> None:
    """Look at the data in the main process, as one pair of eyes is enough.

    Raises HarkenError on every rank when the run would be spoilt.
    """
    refusal = ""
    if distributed.is_main():
        checked = check_data(config, prepare)
        for doubt in checked.doubts:
            if doubt.level != "wrong":
                say(f"{doubt.level.upper()} {doubt.text}")
        say(f"data checked: {'; '.join(checked.done)}; `harken data check --full` looks at every cut")
        refusal = checked.refusal()
    if refusal := distributed.broadcast_text(refusal):
        raise HarkenError(refusal)


def _average(config: RunConfig, model: nn.Module) -> WeightAverage | None:
    if not config.train.ema_decay:
        return None
    if config.engine.zero_stage == 3:
        raise HarkenError(
            "`train.ema_decay` needs whole weights on each rank, which `engine.zero_stage: 3` does not keep: "
            "use stage 0, 1 or 2"
        )
    return WeightAverage(model, config.train.ema_decay, config.batch.times(config.train.ema_reference_seconds))


def _resume(
    checkpoints: Checkpoints, engine: DeepSpeedEngine, average: WeightAverage | None, fingerprint: dict[str, str]
) -> TrainState:
    newest = checkpoints.newest()
    if newest is None:
        return TrainState(fingerprint=fingerprint)
    changed = config_changes(load_config(newest), checkpoints.config)
    if changed:
        say(f"WARNING the configuration differs from that of {newest}:\n  " + "\n  ".join(changed))
    state = checkpoints.state(newest)
    _check_fingerprint(newest, state.fingerprint, fingerprint)
    state.fingerprint = fingerprint
    checkpoints.load(newest, engine, average)
    say(
        f"continuing from {newest}: step {state.step}, epoch {state.position['epoch']}, "
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


def _explain_stage(learner: _Learner) -> None:
    stage, parameters = cast(int, learner.engine.config.zero_stage), _count(learner.model.parameters())
    kept = state_bytes(parameters, stage, distributed.world_size()) / GIB
    say(
        f"`engine.zero_stage: auto` is {stage}: {kept:.2f} GiB of weights, gradients and optimiser state on each device"
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    """Return the numbers in parameters, whole ones where ZeRO 3 keeps slices."""
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in parameters)


def _describe(model: nn.Module, config: RunConfig, peak: float) -> None:
    total = _count(model.parameters())
    trained = _count(parameter for parameter in model.parameters() if parameter.requires_grad)
    say(
        f"{config.objective.name} on {config.encoder.name} and {config.frontend.name}: "
        f"{total / 1e6:.2f}M parameters, {trained / 1e6:.2f}M trained; "
        f"{distributed.world_size()} process(es), {torch.get_num_threads()} threads, ZeRO {config.engine.zero_stage}, "
        f"{config.engine.precision}; peak {peak:.2f} TFLOP/s"
    )
