"""DeepSpeed as harken's engine: one CPU process to ZeRO-3 over many GPUs."""

from __future__ import annotations

import atexit
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from harken.config.schema import EngineConfig, TrainConfig
from harken.core import distributed
from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.core.loss import Loss
from harken.core.zero import fastest_stage
from harken.engine.buckets import GradientBuckets
from harken.engine.gather import Partitions
from harken.engine.memory import GIB, device_gib, keep_what_is_free
from harken.engine.partitioned import PartialPass, forget_partitions, forget_pass
from harken.engine.state import Snapshot
from harken.engine.watchdog import collective_timeout

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # schedules of DeepSpeed's own go by them


def start_processes(config: EngineConfig) -> torch.device:
    """Join the process group that the launcher announced (one process is a group too) and set the CPU threads."""
    _quiet()
    world = distributed.environment_world_size()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    torch.set_num_threads(config.threads or max(1, _cores() // local))
    device = distributed.device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif config.keep_memory:
        keep_what_is_free()
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = collective_timeout(config.timeout_seconds)
        if world == 1 and "MASTER_PORT" not in os.environ:
            store = HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
            os.environ["MASTER_PORT"] = "0"
        else:
            torch.distributed.init_process_group(backend, timeout=timeout)
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as compatible_ops

    # DeepSpeed would compile this kernel at start, on every machine that has no compiler in vain; gloo does without
    compatible_ops["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return device


def leave_at_exit() -> None:
    """Have this process leave its group when Python ends, whose threads may else end it by abort().

    For runs that ended well: elsewhere ranks may be lost, and leaving waits for them.
    """
    atexit.register(_leave)


def stay_at_exit() -> None:
    """Take that back: another run of this process begins, which may end otherwise."""
    atexit.unregister(_leave)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _quiet() -> None:
    """DeepSpeed prints its whole configuration at start; harken's own log says what matters."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="deepspeed")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of what DeepSpeed calls


def staged(config: EngineConfig, model: nn.Module) -> EngineConfig:
    """Return the settings with `zero_stage: auto` made the fastest that fits; every rank calls it and gets the same."""
    if config.zero_stage != "auto":
        return config
    if config.precision == "fp16":
        return replace(config, zero_stage=0)
    least = int(config.offload_optimizer)
    if distributed.device().type == "cpu":  # what is free there changes from run to run
        return replace(config, zero_stage=cast(Literal[0, 1], least))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    smallest = distributed.least_of_ranks(device_gib()) * GIB
    most = 1 if config.compile else 2
    stage = fastest_stage(parameters, distributed.world_size(), smallest, least=least, most=most)
    return replace(config, zero_stage=cast(Literal[0, 1, 2], stage))


def deepspeed_config(config: EngineConfig, train: TrainConfig) -> dict[str, Any]:
    """Return DeepSpeed's configuration; `engine.deepspeed` is merged over it.

    Raises HarkenError for settings under which steps cannot be trusted.
    """
    if config.precision == "fp16" and config.zero_stage:  # of autocast alone: its ZeRO scales no loss
        raise HarkenError(
            "`engine.precision: fp16` needs `engine.zero_stage: 0`, as DeepSpeed does not scale its loss under ZeRO, "
            f"got {config.zero_stage}: use stage 0 or `bf16`"
        )
    if config.compile and config.zero_stage in (2, 3):
        raise HarkenError(
            "`engine.compile` needs `engine.zero_stage` 0 or 1, as 2 and 3 send gradients in the order in which they "
            f"come, which compiled graphs change, got {config.zero_stage}"
        )
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage:
        zero.update(
            reduce_bucket_size=config.bucket_elements,
            allgather_bucket_size=config.bucket_elements,
            overlap_comm=torch.cuda.is_available(),
            contiguous_gradients=True,
        )
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    own: dict[str, Any] = {
        # nominal: batches are ragged, and harken scales the loss by the step's target count itself
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        # without ZeRO every rank has whole gradients, and harken clips; their partitions' norm only DeepSpeed knows
        "gradient_clipping": train.clip_norm if config.zero_stage else 0.0,
    }
    if config.precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[config.precision]
        own["torch_autocast"] = {"enabled": True, "dtype": dtype}
    merged = OmegaConf.to_container(OmegaConf.merge(own, config.deepspeed))
    if not isinstance(merged, dict):
        raise HarkenError("`engine.deepspeed` must be a group of DeepSpeed's keys")
    if merged["zero_optimization"].get("compute_grad_norm") is False:
        raise HarkenError(
            "`engine.deepspeed.zero_optimization.compute_grad_norm` must be true, got false: "
            "without the norm a gradient that is not finite would be applied"
        )
    return {str(key): value for key, value in merged.items()}


class DeepSpeedEngine:
    """See `harken.engine.base.Engine`."""

    def __init__(
        self, model: nn.Module, make_optimizer: MakeOptimizer, config: EngineConfig, train: TrainConfig
    ) -> None:
        import deepspeed

        model.to(distributed.device())
        trainable = make_optimizer(model)
        config = staged(config, model)
        self.config, self.clip_norm = config, train.clip_norm
        settings = deepspeed_config(config, train)
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=trainable, config=settings, dist_init_required=False
        )
        self._buckets: GradientBuckets | None = None
        if config.zero_stage == 0:
            parameters = list(model.parameters())
            # DeepSpeed would reduce after the backward pass, and one process would still copy all gradients and back
            self._engine.enable_backward_allreduce = False
            if distributed.world_size() > 1:
                self._buckets = GradientBuckets(parameters, config.bucket_elements)
            # its own goes through all modules by name, which takes as long as clipping
            self._engine.zero_grad = partial(_forget, parameters)
        self._unreduced, self._waiting = ExitStack(), False  # ZeRO 1 between its first backward and `reduce`
        self._partial = PartialPass(self._engine.optimizer) if config.zero_stage == 2 else None
        self.model: nn.Module = self._engine.module
        self._partitions = Partitions(self.model, self.optimizer)
        self.device = distributed.device()
        self.grad_norm = 0.0
        self.bad_gradients: list[str] = []

    def __call__(self, batch: Batch) -> Loss:
        """Run the objective on a batch, under autocast where the precision asks for it."""
        loss: Loss = self._engine(batch.to(self.device))
        return loss

    @property
    def wrapped(self) -> Any:
        """DeepSpeed's own engine."""
        return self._engine

    @property
    def local_passes(self) -> bool:
        """With whole gradients on each rank, they are reduced once: in the last of the step's passes or after it."""
        return self.config.zero_stage in (0, 1)

    @property
    def sent(self) -> bool:
        """See `Engine`; ZeRO 1 sends nothing before `reduce`."""
        return self._buckets is not None and self._buckets.sent > 0

    def backward(self, total: Tensor, *, last: bool) -> None:
        """Add the gradient of `total`; ZeRO 0 reduces it meanwhile in the last pass, ZeRO 2 and 3 in every pass."""
        self._wait_with_reducing()
        self._engine.set_gradient_accumulation_boundary(last and not self.local_passes)
        if self.config.zero_stage:
            total = total * distributed.world_size()  # DeepSpeed averages over ranks, harken and its buckets sum
        elif last and self._buckets is not None:
            self._buckets.watch(total)
        self._engine.backward(total, scale_wrt_gas=False)
        if self._partial is not None:
            self._partial.finished()

    def _wait_with_reducing(self) -> None:
        if self.config.zero_stage == 1 and not self._waiting:
            self._unreduced.enter_context(self._engine.coalesce_grad_reduction())
            self._waiting = True

    def begin_reduce(self) -> None:
        """Send the gradients that the last pass has not sent."""
        if self._buckets is not None:
            self._buckets.send_rest()

    def reduce(self, scale: float = 1.0) -> None:
        """Reduce the step's gradient over the ranks, times `scale`; under ZeRO 2 and 3 it is reduced already."""
        if not self.local_passes:
            return
        self._wait_with_reducing()  # where nothing was left to run
        if self._buckets is not None:
            self._buckets.finish()  # what is missing was sent as zeros
        else:
            self._zero_missing_gradients()
        if scale != 1.0:
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            torch._foreach_mul_(gradients, scale)
        self._engine.set_gradient_accumulation_boundary(True)
        if self.config.zero_stage == 1:
            self._waiting = False
            self._unreduced.close()
            self._engine.set_gradient_accumulation_boundary(True)  # closing put it back

    def abandon(self) -> None:
        """Forget the gradients of this step's passes, those that failed halfway included."""
        if self._buckets is not None:
            self._buckets.forget()
        else:
            _forget(self.model.parameters())
        if self.config.zero_stage:
            forget_pass(self._engine.optimizer)
        if self.config.zero_stage == 2:
            forget_partitions(self._engine.optimizer)

    def recover(self, batch: Batch, *, last: bool) -> None:
        """Run a small batch in the place of the pass that failed; see `harken.engine.partitioned`."""
        if self._partial is None:
            raise HarkenError(
                f"memory ran out in a pass, and `engine.zero_stage: {self.config.zero_stage}` cannot take one up that "
                "was cut off: lower `batch.max_seconds` (or `batch.memory_share` with `auto`), or use stage 2; the "
                "same command then continues from the last checkpoint"
            )
        self._partial.check()
        forget_pass(self._engine.optimizer)
        self.backward(self(batch).total * 0.0, last=last)

    def _zero_missing_gradients(self) -> None:
        """Give parameters that no loss reached (a dropped layer's) a gradient of zero.

        Without one the optimiser would pass them over, and a run would depend on the number of its processes; and what
        ranks reduce must have one shape on all, also where nothing was left to run.
        """
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def step(self) -> bool:
        """Clip and take an optimiser step; return False when nothing changed for a gradient that was not finite.

        The ranks agree: they hold the same reduced gradient, or under ZeRO the same norm of all partitions.
        """
        return self._step_partitioned() if self.config.zero_stage else self._step_whole()

    def _step_whole(self) -> bool:
        scaler = self._engine.torch_autocast_z0_gradscaler  # with fp16 alone
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([own.grad for own in parameters if own.grad is not None])
        self.grad_norm = float(norm)
        if not math.isfinite(self.grad_norm):
            self.bad_gradients = self._gradients_not_finite()
            if scaler is not None:
                scaler.update()  # it saw the overflow: the next loss is scaled by less
            self._engine.zero_grad()
            return False
        if self.clip_norm and self.grad_norm > self.clip_norm:  # no pass over gradients that are short enough
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        self._engine.step()
        return True

    def _gradients_not_finite(self) -> list[str]:
        """Name the parameters with such gradients, those near the loss first: the trouble spreads from there."""
        found = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
        ]
        return found[::-1]

    def _step_partitioned(self) -> bool:
        self._engine.step()  # DeepSpeed skips it when the norm is not finite
        if self.config.zero_stage == 3:
            self._forget_gradients()
        norm = self._engine.get_global_grad_norm()
        self.grad_norm = float(norm) if norm is not None else math.nan
        applied = bool(self._engine.was_step_applied())
        if applied and not math.isfinite(self.grad_norm):
            raise HarkenError(
                f"this DeepSpeed took a step with a gradient of norm {self.grad_norm}, so the weights are lost: "
                "install the version in constraints.txt, or take `engine.deepspeed` back to what skips such steps; "
                "the same command then continues from the last checkpoint"
            )
        return applied

    def _forget_gradients(self) -> None:
        """Zero the gradients that ZeRO 3 keeps.

        It overwrites those of the parameters that a loss reaches, so others (a dropped layer's) would get this step's
        gradient again in the next one, and a run would not go on from a checkpoint as it does without a stop.
        """
        optimizer = self._engine.optimizer
        optimizer.grad_partitions_flat_buffer.zero_()
        for flat in optimizer.fp32_partitioned_groups_flat:  # theirs with `engine.offload_optimizer`
            if flat.grad is not None:
                flat.grad.zero_()

    def snapshot(self) -> Snapshot | None:
        """Return copies of the weights and of the optimiser's state on the main process, None elsewhere.

        They are gathered one tensor at a time; every rank calls it.
        Raises HarkenError for an optimiser whose state cannot be saved.
        """
        scaler = self._engine.torch_autocast_z0_gradscaler
        counters = {name: int(getattr(self._engine, name)) for name in _COUNTERS}
        weights = self._partitions.weights()
        optimizer = self._partitions.state(scaler.state_dict() if scaler is not None else {}, counters)
        return None if optimizer is None else Snapshot(weights, optimizer)

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint, whatever number of ranks and ZeRO stage saved it; every rank calls it.

        Raises HarkenError when it holds another model, optimiser or set of trained parameters.
        """
        details = self._partitions.restore(folder).details
        scaler = self._engine.torch_autocast_z0_gradscaler
        if scaler is not None and details["loss_scaler"]:
            scaler.load_state_dict(details["loss_scaler"])
        for name in _COUNTERS:
            setattr(self._engine, name, details["counters"][name])


def _forget(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def group_names(groups: Sequence[dict[str, Any]]) -> list[str]:
    """Return the name of one parameter of each group."""
    return [str(group["names"][0]) for group in groups]
