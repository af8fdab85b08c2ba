"""Whole weights and optimiser states out of what DeepSpeed divides among the ranks, and back, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harken.config.saved import WEIGHTS, misfits
from harken.core import distributed
from harken.core.errors import HarkenError
from harken.engine.state import Number, OptimizerState, SavedOptimizer, SavedTensors, single

_GATHERED = (torch.float32, torch.bfloat16, torch.float16)  # DeepSpeed gathers in float32, which holds these exactly


@dataclass(frozen=True)
class Slot:
    """A trained parameter.

    owner: under which the torch optimiser keeps its state: the parameter itself, or with ZeRO this rank's partition of
    many parameters. group: its number among the optimiser's parameter groups.
    """

    name: str
    parameter: nn.Parameter
    owner: Tensor
    group: int

    @property
    def divided(self) -> bool:
        """Whether its state lies in a partition."""
        return self.owner is not self.parameter


class Partitions:
    """The trained parameters of a model and where DeepSpeed's optimiser keeps their states.

    Raises HarkenError for a wrapper of DeepSpeed's whose state cannot be saved.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self.base, self._wrapper = model, optimizer, optimizer
        if isinstance(optimizer, torch.optim.Optimizer):
            held = [(p, p, i) for i, group in enumerate(optimizer.param_groups) for p in group["params"]]
        elif hasattr(optimizer, "bit16_groups"):  # ZeRO 1 and 2
            groups = zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
            held = [(p, flat, i) for i, (group, flat) in enumerate(groups) for p in group]
            self.base = optimizer.optimizer
        elif hasattr(optimizer, "fp32_partitioned_groups_flat") and not optimizer.swap_optimizer:  # ZeRO 3
            groups = zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
            numbers = optimizer.sub_group_to_group_id
            held = [(p, flat, numbers[i]) for i, (group, flat) in enumerate(groups) for p in group]
            self.base = optimizer.optimizer
        else:
            raise HarkenError(
                "the settings in `engine.deepspeed` make DeepSpeed keep the optimiser in its "
                f"{type(optimizer).__name__}, or on NVMe, and checkpoints cannot hold that: use `engine.precision`, "
                "`engine.zero_stage` and `engine.offload_optimizer`"
            )
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.slots = [Slot(names[id(parameter)], parameter, owner, i) for parameter, owner, i in held]
        self._fresh = [_numbers(group) for group in self.base.param_groups]

    def weights(self) -> dict[str, Tensor]:
        """Return copies of all weights on the main process, nothing elsewhere; every rank calls it."""
        found: dict[str, Tensor] = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            with _gathered(value):
                if distributed.is_main():
                    found[name] = _copy(value)
        return found

    def state(self, loss_scaler: Mapping[str, Number], counters: Mapping[str, int]) -> OptimizerState | None:
        """Return a copy of the whole state on the main process, None elsewhere; every rank calls it.

        Raises HarkenError for a state that is neither shaped as its parameter nor a single number.
        """
        tensors: dict[str, dict[str, Tensor]] = {}
        numbers: dict[str, dict[str, Number]] = {}
        main = distributed.is_main()
        self._link()
        for slot in self.slots:
            tensors[slot.name], numbers[slot.name] = {}, {}
            for key, value in self.base.state.get(slot.owner, {}).items():
                if isinstance(value, bool | int | float):
                    numbers[slot.name][key] = value
                elif value is not None:
                    whole = self._whole(slot, key, value)
                    if main:  # the other ranks keep nothing of what they help to gather
                        tensors[slot.name][key] = _copy(whole) if whole is value else whole
        if not main:
            return None
        groups = {slot.name: self._changed(slot.group) for slot in self.slots}
        name = type(self.base).__name__
        return OptimizerState(name, tensors, numbers, groups, dict(loss_scaler), dict(counters))

    def _whole(self, slot: Slot, key: str, value: Any) -> Tensor:
        """Return the tensor itself, or a new one on the CPU of what the ranks hold parts of."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if isinstance(value, Tensor):
            as_owner = value.shape == slot.owner.shape
            if not value.dim() or (as_owner and not slot.divided):
                return value
            if as_owner and value.dtype in _GATHERED:
                whole: Tensor = safe_get_full_optimizer_state(slot.parameter, key)
                return whole.to("cpu", value.dtype)
        found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise HarkenError(
            f"the state `{key}` that {type(self.base).__name__} keeps of `{slot.name}` must be a number or a float "
            f"tensor of shape {tuple(slot.owner.shape)} to be saved, found {found}: choose another `optimizer.name`"
        )

    def _changed(self, group: int) -> dict[str, Number]:
        """Return the numbers of a parameter group that the optimiser itself changed; its rate is the loop's."""
        fresh = self._fresh[group]
        now = _numbers(self.base.param_groups[group])
        return {key: value for key, value in now.items() if key != "lr" and value != fresh.get(key)}

    @torch.no_grad()
    def restore(self, folder: Path) -> SavedOptimizer:
        """Load the weights and the optimiser's state of a checkpoint, and return the latter; every rank calls it.

        Raises HarkenError for another model, another optimiser and other trained parameters, naming one; then nothing
        has been loaded.
        """
        own = self.model.state_dict(keep_vars=True)
        weights = SavedTensors(folder / WEIGHTS)
        wrong = misfits({name: _whole_shape(value) for name, value in own.items()}, weights.shapes)
        if wrong:
            raise HarkenError(
                f"{folder} holds another model: {wrong}; "
                f"give the old `frontend`, `encoder` and `objective`, or another `--exp`"
            )
        saved = SavedOptimizer(folder)
        saved.check(type(self.base).__name__, {slot.name: _whole_shape(slot.parameter) for slot in self.slots})
        for names in self._sharing().values():
            saved.check_shared(names)
        for name, value in own.items():
            _set_weight(value, weights.read(name))
        self._make_states(saved)
        self._fill_states(saved)
        for i, group in enumerate(self.base.param_groups):
            names = [slot.name for slot in self.slots if slot.group == i]
            for key, number in (saved.group(names) if names else {}).items():
                group[key] = torch.full_like(group[key], number) if isinstance(group.get(key), Tensor) else number
        return saved

    def _sharing(self) -> dict[int, list[str]]:
        """Return the names of the parameters of each partition."""
        sharing: dict[int, list[str]] = {}
        for slot in self.slots:
            sharing.setdefault(id(slot.owner), []).append(slot.name)
        return sharing

    def _make_states(self, saved: SavedOptimizer) -> None:
        """Make what the optimiser itself would make in its first step, and set what is one number."""
        for slot in self.slots:
            state, group = self.base.state[slot.owner], self.base.param_groups[slot.group]
            for key in saved.keys(slot.name):
                if key not in saved.shaped:
                    state[key] = single(saved.read(key, slot.name), slot.owner, group)
                elif key not in state:
                    dtype = saved.read(key, slot.name).dtype
                    state[key] = torch.zeros_like(slot.owner, dtype=dtype, requires_grad=False)
            state.update(saved.parameters[slot.name]["numbers"])
        self._link()

    def _link(self) -> None:
        """Let ZeRO 1 and 2 find the states: DeepSpeed links those of the first group alone, after the first step."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if hasattr(self._wrapper, "bit16_groups"):
            groups = zip(self._wrapper.bit16_groups, self._wrapper.single_partition_of_fp32_groups, strict=True)
            for parameters, flat in groups:
                lazy_init_hp_params_optimizer_state(parameters, flat, self.base.state)

    def _fill_states(self, saved: SavedOptimizer) -> None:
        for slot in self.slots:
            for key in saved.keys(slot.name):
                if key in saved.shaped:
                    value = saved.read(key, slot.name)
                    if slot.divided:
                        _set_divided(slot.parameter, value, key)
                    else:
                        self.base.state[slot.owner][key].copy_(value)


def _set_weight(target: Tensor, value: Tensor) -> None:
    with _gathered(target, changed_by_main=True):
        if distributed.is_main() or not hasattr(target, "ds_id"):
            target.copy_(value)
    if target.requires_grad:
        _set_divided(target, value)


def _set_divided(parameter: Any, value: Tensor, key: str | None = None) -> None:
    """Set this rank's part of a parameter's state, or of the optimiser's own copy of it, where ZeRO keeps one."""
    from deepspeed import utils

    if hasattr(parameter, "ds_id"):
        # the function for whole tensors fails where the ranks do not divide the number of elements
        part = parameter.ds_tensor.numel()
        rank = torch.distributed.get_rank(parameter.ds_process_group)
        value = value.flatten()[part * rank : part * (rank + 1)]
        value = nn.functional.pad(value, (0, part - value.numel()))
        if key is None:
            utils.safe_set_local_fp32_param(parameter, value)
        else:
            utils.safe_set_local_optimizer_state(parameter, value, key)
    elif key is None:
        utils.safe_set_full_fp32_param(parameter, value)
    else:
        utils.safe_set_full_optimizer_state(parameter, value, key)


@contextmanager
def _gathered(value: Tensor, *, changed_by_main: bool = False) -> Iterator[None]:
    """Make a parameter whole for a while where ZeRO 3 has divided it; every rank calls it."""
    if not hasattr(value, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([value], modifier_rank=0 if changed_by_main else None):
        yield


def _whole_shape(value: Tensor) -> tuple[int, ...]:
    return tuple(getattr(value, "ds_shape", value.shape))


def _numbers(group: Mapping[str, Any]) -> dict[str, Number]:
    """Return the numbers of a parameter group, those that are tensors too."""
    values = {key: value.item() if _is_single(value) else value for key, value in group.items()}
    return {key: value for key, value in values.items() if isinstance(value, bool | int | float)}


def _is_single(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.dim()


def _copy(value: Tensor) -> Tensor:
    """Copy to the host's memory; what is copied may change at once."""
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
