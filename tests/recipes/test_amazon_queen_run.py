"""run.sh of the default recipe: what reaches `harken`, which is a stub here, and that its configurations are whole."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from harken.config.load import load

RECIPE = Path(__file__).parents[2] / "egs" / "amazon_queen"
GPU = RECIPE / "conf/gpu.yaml"
NEEDED = {
    "pretrain": ["data.train=t", "objective.classes=[5]"],
    "finetune": ["data.train=t", "objective.tokenizer=t"],
}


@pytest.mark.parametrize("mode", ["short", "full"])
@pytest.mark.parametrize("part", NEEDED)
def test_the_gpu_configuration_fits_over_every_training_stage(mode: str, part: str) -> None:
    loaded = load([RECIPE / f"conf/{mode}/{part}.yaml", GPU], NEEDED[part])
    small = load([RECIPE / f"conf/{mode}/{part}.yaml"], NEEDED[part]).config
    assert loaded.config.encoder.dim > small.encoder.dim  # type: ignore[attr-defined]
    assert loaded.config.train.steps == small.train.steps
    assert loaded.origin["batch.max_seconds"] == str(GPU)


def test_conf_and_layer_reach_every_stage_that_they_are_for(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nexit 0\n")
    stub.chmod(0o755)
    arguments = ["--conf", str(GPU), "--layer", "8", "--exp", str(tmp_path / "exp"), "--python", str(stub)]
    call = ["bash", str(RECIPE / "run.sh"), *arguments, "--stage", "5", "--stop-stage", "8"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = {path.stem: path.read_text() for path in (tmp_path / "exp/stages").glob("*.commands")}
    assert sorted(ran) == ["5-pretrain1", "6-units2", "7-pretrain2", "8-finetune"]
    for stage in ("5-pretrain1", "7-pretrain2", "8-finetune"):
        part = "finetune" if stage == "8-finetune" else "pretrain"
        assert ran[stage].startswith(f"harken train {RECIPE}/conf/full/{part}.yaml {GPU} "), ran[stage]
        assert ran[stage].count("\n") == 1
    fit, label, check = ran["6-units2"].splitlines()
    for line in (fit, label):
        assert "--layer 8" in line
        assert f"--model {tmp_path}/exp/pretrain1" in line
    assert check == f"harken units check {tmp_path}/exp/units2/labels"
