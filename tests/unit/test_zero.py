"""What ZeRO leaves on a device, and which stage `auto` is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from harken.config.schema import EngineConfig
from harken.core import distributed
from harken.core.zero import fastest_stage, state_bytes
from harken.engine import deepspeed

GB = 10**9


@pytest.mark.parametrize(
    ("stage", "expected"), [(0, 16.0), (1, 8 + 8 / 4), (2, 4 + 12 / 4), (3, 16 / 4)], ids=["0", "1", "2", "3"]
)
def test_a_stage_divides_what_its_paper_says(stage: int, expected: float) -> None:
    assert state_bytes(1000, stage, 4) == 1000 * expected


@pytest.mark.parametrize(
    ("parameters", "devices", "memory", "options", "stage"),
    [
        (95e6, 8, 80 * GB, {}, 0),
        (1e9, 8, 32 * GB, {}, 0),  # just half
        (1e9, 8, 31.9 * GB, {}, 1),
        (1e9, 8, 17 * GB, {}, 2),  # 9 GB a device at stage 1, 5.5 at stage 2
        (1e9, 8, 2 * GB, {}, 2),  # nothing fits: activations may yet
        (1e9, 1, 2 * GB, {}, 0),  # nobody to divide among
        (95e6, 8, 80 * GB, {"least": 1}, 1),
        (1e9, 1, 2 * GB, {"least": 1}, 1),
        (1e9, 8, 2 * GB, {"most": 0}, 0),
    ],
)
def test_auto_is_the_lowest_stage_that_fits(
    parameters: float, devices: int, memory: float, options: dict[str, int], stage: int
) -> None:
    assert fastest_stage(int(parameters), devices, memory, **options) == stage


@pytest.fixture
def four_small_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "gather", lambda values: [*values, 1e-6])  # another rank has less
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(deepspeed, "device_gib", lambda: 80.0)


def staged(**settings: Any) -> Any:
    return deepspeed.staged(EngineConfig(**settings), nn.Linear(10, 10)).zero_stage


def test_the_engine_asks_the_smallest_device_and_what_its_settings_allow(four_small_devices: None) -> None:
    assert staged() == 2
    assert staged(zero_stage=1) == 1
    assert staged(precision="fp16") == 0
    assert staged(compile=True) == 1


def test_auto_is_0_on_a_cpu_whatever_is_free_there(four_small_devices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))
    assert staged() == 0
    assert staged(offload_optimizer=True) == 1
