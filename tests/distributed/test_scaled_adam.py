"""ScaledAdam over several processes: the steps of one, a restart, and what ZeRO cannot give it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("worker_train.py")
STEPS, HALF = 14, 11  # the first threshold of the clipping is set in the eleventh step


def write_config(corpus, path: Path, **engine: Any) -> Path:
    settings = corpus.settings("ctc", "filterbank")
    settings["optimizer"] = {"name": "scaled_adam", "clipping_scale": 0.4}  # low enough to clip steps
    settings["schedule"] = {"name": "eden", "lr_hours": 0.01, "warmup_steps": 4}
    settings["batch"].update(seconds_per_step=12.0)
    settings["train"].update(steps=STEPS)
    settings["engine"].update(engine)
    OmegaConf.save(OmegaConf.create(settings), path)
    return path


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_and_go_on_from_a_checkpoint(corpus, run_python, tmp_path: Path) -> None:
    config = write_config(corpus, tmp_path / "run.yaml")
    plan = [
        {"processes": 1, "jobs": [(config, tmp_path / "one", 0)]},
        {"processes": 2, "jobs": [(config, tmp_path / "two", 0)]},
        {"processes": 2, "jobs": [(config, tmp_path / "halves", HALF)]},
        {"processes": 2, "jobs": [(config, tmp_path / "halves", 0)]},
    ]
    (tmp_path / "plan.json").write_text(json.dumps(plan, default=str))
    run_python(WORKER, tmp_path / "plan.json")
    one, two, halves = (
        load_file(tmp_path / name / f"checkpoints/step-{STEPS:08d}/model.safetensors")
        for name in ("one", "two", "halves")
    )
    for name, value in two.items():
        assert torch.equal(halves[name], value), name
        alone = one[name]
        if name.endswith("weight_v"):
            # under weight norm its size has no gradient but rounding, of which ScaledAdam makes full steps
            assert float(alone.norm() / value.norm()) == pytest.approx(1.0, abs=0.05)
            assert float(torch.cosine_similarity(alone.flatten(), value.flatten(), dim=0)) > 1 - 1e-5
        else:
            # sums of other orders, of which ScaledAdam makes larger steps than AdamW: weights here are 0.01 to 0.1
            assert torch.allclose(alone, value, rtol=1e-3, atol=1e-4), name
            assert float((alone - value).norm() / value.norm()) < 5e-4, name


@pytest.mark.slow
def test_zero_is_refused_before_anything_is_made(corpus, tmp_path: Path) -> None:
    config = write_config(corpus, tmp_path / "run.yaml", zero_stage=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["harken.apps.main", "train", str(config), "--exp", str(tmp_path / "exp")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert ended.returncode != 0
    assert (
        "harken train: `engine.zero_stage` must be 0 with `optimizer.name: scaled_adam`, which needs each parameter "
        "whole, got 2: ZeRO gives a rank slices of many parameters strung together; use stage 0, or "
        "`optimizer.name: adamw`\n"
    ) in ended.stderr
    assert not (tmp_path / "exp").exists()
