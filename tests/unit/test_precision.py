"""`engine.precision: auto` is bf16 where the device has it, and what was chosen is what a run is built with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harken.config.load import from_dict
from harken.config.schema import EngineConfig, RunConfig
from harken.core import cpu, distributed
from harken.core.errors import HarkenError
from harken.engine import precision
from harken.train import run

INFO = "processor\t: 0\nmodel name\t: A CPU\n{word}\t\t: fpu sse avx512f {flags}\nbugs\t\t: bf16\n"


@pytest.mark.parametrize(
    ("word", "flags", "found"),
    [
        ("flags", "avx512_bf16 amx_bf16", ["amx_bf16", "avx512_bf16"]),
        ("Features", "asimd bf16", ["bf16"]),
        ("flags", "avx512_vnni", []),
    ],
)
def test_instructions_are_read_from_the_list_of_flags(tmp_path: Path, word: str, flags: str, found: list[str]) -> None:
    (tmp_path / "cpuinfo").write_text(INFO.format(word=word, flags=flags))
    assert cpu.bf16_instructions(tmp_path / "cpuinfo") == found


def test_a_system_that_lists_no_instructions_counts_as_without(tmp_path: Path) -> None:
    assert cpu.bf16_instructions(tmp_path / "none") == []


@pytest.mark.parametrize(("instructions", "chosen"), [(["avx512_bf16"], "bf16"), ([], "fp32")])
def test_auto_on_a_cpu(monkeypatch: pytest.MonkeyPatch, instructions: list[str], chosen: str) -> None:
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(precision, "bf16_instructions", lambda: instructions)
    assert precision.resolved(EngineConfig(precision="auto")).precision == chosen
    assert precision.resolved(EngineConfig(precision="fp16")).precision == "fp16"


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: str) -> None:
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert precision.resolved(EngineConfig(precision="auto")).precision == chosen


def test_one_rank_without_bf16_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "device_has_bf16", lambda: True)
    monkeypatch.setattr(distributed, "any_rank", lambda flag: True)  # another rank raised it
    assert precision.resolved(EngineConfig(precision="auto")).precision == "fp32"


def test_a_run_is_built_with_what_was_chosen(corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = corpus.settings("ctc", "filterbank")
    settings["engine"] = settings.get("engine", {}) | {"precision": "auto"}
    built = []

    def build(config: RunConfig, *parts: object) -> None:
        built.append(config.engine.precision)
        raise HarkenError("enough")

    monkeypatch.setattr(run, "start_processes", lambda config: None)
    monkeypatch.setattr(run, "build_run", build)
    monkeypatch.setattr(precision, "device_has_bf16", lambda: True)
    with pytest.raises(HarkenError, match="enough"):
        run.run_training(from_dict(settings), tmp_path, *[None] * 3)  # type: ignore[arg-type]
    assert built == ["bf16"]
