"""Numbers that are not finite are named, survived where that is possible, and end the run where it is not."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("worker_nonfinite.py")
CUT, WEIGHT = "train-005", "backbone.encoder.blocks.1.down.weight"
STEPS = 6
# processes, ZeRO stage, steps, poison and where it is, `train.max_skipped_steps`
CASES: dict[str, tuple[int, int, int, str, Any, int]] = {
    "plain-1": (1, 0, STEPS + 3, "", 0, 2),
    "cut-1": (1, 0, STEPS, "cut", CUT, 3),
    "cut-2": (2, 3, STEPS, "cut", CUT, 3),
    "audio-1": (1, 0, STEPS, "audio", CUT, 3),
    "weight-1": (1, 0, STEPS, "weight", 4, 2),
    "weight-2": (2, 2, STEPS, "weight", 4, 2),
    "never-1": (1, 0, STEPS, "weight", 1, 0),
    "steps-1": (1, 0, STEPS, "steps", 3, 2),
    "steps-2": (2, 1, STEPS, "steps", 3, 2),
}


@pytest.fixture(scope="module")
def runs(corpus, run_python, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Every case run to its end, and what all of them printed."""
    folder = tmp_path_factory.mktemp("nonfinite")
    jobs: dict[int, list[Any]] = {1: [], 2: []}
    for name, (processes, stage, steps, poison, where, skips) in CASES.items():
        settings = corpus.settings("ctc", "filterbank")
        settings["encoder"]["layer_drop"] = 0.0
        settings["engine"]["zero_stage"] = stage
        settings["train"].update(steps=steps, max_skipped_steps=skips, max_rollbacks=2)
        settings["checkpoint"].update(every_steps=1 if poison == "steps" else 2, keep_last=5)
        OmegaConf.save(OmegaConf.create(settings), folder / f"{name}.yaml")
        jobs[processes].append([folder / f"{name}.yaml", folder / name, poison, where])
    plan = [{"processes": processes, "jobs": group} for processes, group in jobs.items()]
    (folder / "plan.json").write_text(json.dumps(plan, default=str))
    return folder, run_python(WORKER, folder / "plan.json")


def ending(folder: Path, name: str) -> str:
    return json.loads((folder / f"{name}.json").read_text())


def state(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / f"checkpoints/step-{STEPS:08d}/state.json").read_text())


def assert_finite(folder: Path, name: str) -> None:
    weights = load_file(folder / name / f"checkpoints/step-{STEPS:08d}/model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


def samples(folder: Path, name: str) -> list[tuple[int, list[str]]]:
    """Return the step and cuts of each micro-batch, as they came."""
    rows = [json.loads(line) for line in (folder / name / "samples.rank0.jsonl").read_text().splitlines()]
    return [(row["step"], row["ids"]) for row in rows]


@pytest.mark.parametrize("name", ["cut-1", "cut-2", "audio-1"])
def test_a_poisoned_cut_is_skipped_and_the_run_goes_on(runs, name: str) -> None:
    folder, _ = runs
    assert ending(folder, name) == "finished"
    assert_finite(folder, name)
    found = state(folder, name)
    assert found["skipped_steps"] == 2, "the cut is in each of the two epochs once"
    assert found["rollbacks"] == 0


def test_the_first_module_or_the_audio_is_named(runs) -> None:
    lines = [line for line in runs[1].splitlines() if "skipped: its gradient is not finite" in line]
    cut = [line for line in lines if f" {CUT}" in line or f"{CUT}," in line]
    assert sum("; first in the output of module `backbone.encoder.blocks.0` (Block)" in line for line in cut) == 4
    assert sum(f"; the audio itself is not finite: `{CUT}`" in line for line in cut) == 2
    made = "; every module's output is finite: the loss made of them is not"
    assert sum(made in line for line in lines) == 12, "two runs of three times two steps"


@pytest.mark.parametrize("name", ["weight-1", "weight-2"])
def test_a_poisoned_weight_is_rolled_back_at_once(runs, name: str) -> None:
    folder, output = runs
    assert ending(folder, name) == "finished"
    assert_finite(folder, name)
    found = state(folder, name)
    assert (found["rollbacks"], found["skipped_steps"], found["rolled_back_to"]) == (1, 1, None)
    root = folder / name / "checkpoints"
    assert (
        f"WARNING checkpoint {root}/step-00000004 is damaged (model.safetensors holds numbers that are not finite): "
        "trying the one before it"
    ) in output
    assert (
        f"WARNING 1 steps in a row up to step 5 could not be taken: rolled back to {root}/step-00000002 "
        "(1 of at most 2 times); steps 3 to 5 are taken again, with the samples that come next"
    ) in output
    assert output.count(f"weights that are not finite: `{WEIGHT}`") >= 2
    assert len(list(root.glob("rolled-back-step-00000004-*"))) == 1, "what was there is not removed"


def test_after_a_rollback_no_sample_comes_twice_and_none_is_left_out(runs) -> None:
    folder, _ = runs
    rolled, plain = samples(folder, "weight-1"), samples(folder, "plain-1")
    assert list(dict.fromkeys(step for step, _ in plain)) == list(range(1, STEPS + 4))
    assert [ids for _, ids in rolled] == [ids for _, ids in plain]
    assert [step for step, _ in itertools.groupby(step for step, _ in rolled)] == [1, 2, 3, 4, 5, 3, 4, 5, 6]
    assert (
        state(folder, "weight-1")["position"]
        == json.loads((folder / f"plain-1/checkpoints/step-{STEPS + 3:08d}/state.json").read_text())["position"]
    )


def test_without_rollbacks_lost_weights_end_the_run(runs) -> None:
    assert ending(runs[0], "never-1").startswith(
        "weights are not finite after step 2, so no step can be taken any more, and `train.max_skipped_steps: 0` "
        "never rolls back: lower `schedule.peak`"
    )


@pytest.mark.parametrize("name", ["steps-1", "steps-2"])
def test_what_no_rollback_mends_ends_the_run(runs, name: str) -> None:
    folder, output = runs
    assert ending(folder, name).startswith(
        "2 steps in a row up to step 3 could not be taken, after 2 rollbacks (`train.max_rollbacks`): "
    )
    root = folder / name / "checkpoints"
    rolled = [
        f"rolled back to {root}/step-0000000{step} ({times} of at most 2 times)" for step, times in [(2, 1), (1, 2)]
    ]
    assert [line for line in rolled if line in output] == rolled, "the second time an older one: no step had been taken"
