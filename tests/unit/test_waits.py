"""Between log lines a process alone waits for the device once a step, for the gradient's norm: all else is queued.

Whatever is computed from audio, targets or weights would be on the device; lengths and counts stay on the host. The
contract's tests hold every objective, encoder and frontend to it. Ranks also agree on a step's counts, and ScaledAdam
asks for norms.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harken.apps.main import main
from harken.core.batch import Batch
from harken.train import loop

STEPS = 3


@pytest.fixture
def steps(waits: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Watch the steps of the runs that follow."""
    take_step, to = loop.take_step, Batch.to

    def watched(run: loop.Run, step: Any) -> bool:
        waits.on_device.clear()
        waits.begin([*run.engine.model.parameters(), *run.engine.model.buffers()])
        with waits:
            return take_step(run, step)

    def moved(batch: Batch, device: torch.device) -> Batch:
        found = to(batch, device)
        copies = {name: value.clone() for name, value in found.targets.items()}
        found = replace(found, inputs=found.inputs.clone(), targets=copies)
        waits.begin([found.inputs, *found.targets.values()])
        return found

    monkeypatch.setattr(loop, "take_step", watched)
    monkeypatch.setattr(Batch, "to", moved)
    return waits


@pytest.mark.parametrize("objective", ["hubert", "ctc", "data2vec"])
@pytest.mark.parametrize("frontend", ["filterbank", "waveform"])
def test_a_step_waits_for_the_norm_alone(corpus, tmp_path: Path, steps: Any, frontend: str, objective: str) -> None:
    config = corpus.yaml(tmp_path, objective, frontend)
    assert main(["train", str(config), "--exp", str(tmp_path / "exp"), f"train.steps={STEPS}"]) == 0
    assert dict(steps.found) == {"_local_scalar_dense in deepspeed.py: self.grad_norm = float(norm)": STEPS}


def test_a_value_that_is_asked_for_is_seen(waits: Any) -> None:
    x, host = torch.ones(3), torch.ones(3)
    waits.begin([x])
    with waits:
        y = (x * 2).sum() + host.sum()
        assert float(host.sum()) == 3.0
        assert (host * 1).tolist() == [1.0, 1.0, 1.0]
        assert not waits.found
        assert float(y) == 9.0
        x[x > 0].sum()
        assert y.tolist() == 9.0
        x.new_tensor(1.0)
        x.new_full((), 1.0)
        host.to(x.device, non_blocking=True)
        host.to(x.device)
        host.to(torch.float64)
    kinds = ("_local_scalar_dense", "a mask as an index", "tolist", "new_tensor", "a copy to the device")
    assert waits.found == {f"{how} in none of harken's lines": 1 for how in kinds}
