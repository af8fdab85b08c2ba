"""Every ZeRO stage: a step whose gradient is not finite on one rank is none on any rank, and training goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("worker_engine.py")
# processes, ZeRO stage, precision
CASES = [(2, 0, "fp32"), (2, 1, "bf16"), (2, 2, "fp32"), (2, 3, "fp32"), (1, 1, "fp32")]
SKIPPED, SAVED, LAST = 2, 3, 4


def name_of(case: tuple[int, int, str]) -> str:
    return "-".join(map(str, case))


@pytest.fixture(scope="module")
def records(corpus, run_python, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Each case run to its last step, and that step taken again by new processes from the checkpoint before it."""
    folder = tmp_path_factory.mktemp("engine")
    plan = []
    for part in ("first", "second"):
        for processes in (1, 2):
            jobs = []
            for case in CASES:
                if case[0] != processes:
                    continue
                settings = corpus.settings("ctc", "filterbank")
                settings["batch"].update(max_seconds=6.0, seconds_per_step=12.0)
                settings["encoder"]["layer_drop"] = 0.5
                settings["engine"].update(zero_stage=case[1], precision=case[2])
                config = folder / f"{name_of(case)}.yaml"
                OmegaConf.save(OmegaConf.create(settings), config)
                out = folder / f"{name_of(case)}-{part}"
                jobs.append([config, folder / name_of(case), out, LAST, SKIPPED if part == "first" else 0])
            plan.append({"processes": processes, "jobs": jobs})
    (folder / "plan.json").write_text(json.dumps(plan, default=str))
    return folder, run_python(WORKER, folder / "plan.json")


def rows(folder: Path, case: tuple[int, int, str], part: str) -> list[list[dict[str, Any]]]:
    return [json.loads((folder / f"{name_of(case)}-{part}.rank{r}.json").read_text()) for r in range(case[0])]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_gradient_that_is_not_finite_on_one_rank_is_a_skipped_step_on_all(records, case) -> None:
    folder, _ = records
    ranks = rows(folder, case, "first")
    for rank, steps in enumerate(ranks):
        assert [row["step"] for row in steps] == [0, 1, SKIPPED, SAVED, LAST]
        assert [row["applied"] for row in steps[1:]] == [True, False, True, True]
        assert [row["finite"] for row in steps[1:]] == [True, False, True, True]
        if case[1] < 3 or rank == 0:  # ZeRO 3 gathers whole weights on the main process alone
            hashes = [row["weights"] for row in steps]
            assert hashes[SKIPPED] == hashes[1], "a skipped step changes nothing"
            assert len(set(hashes)) == 4, "every other step changes the weights"
    if case[1] < 3:
        assert all(steps == ranks[0] for steps in ranks), "the ranks agree"
    state = json.loads((folder / name_of(case) / f"checkpoints/step-{SAVED:08d}/state.json").read_text())
    assert state["skipped_steps"] == 1


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_new_processes_go_on_from_the_checkpoint(records, case) -> None:
    folder, _ = records
    again, first = rows(folder, case, "second")[0], rows(folder, case, "first")[0]
    assert again == [{key: first[SAVED][key] for key in ("step", "weights")}, first[LAST]]


@pytest.mark.parametrize("case", [case for case in CASES if case[2] == "fp32"], ids=name_of)
def test_every_stage_gives_the_weights_of_stage_0(records, case) -> None:
    """Each step drops a layer or not: one that is dropped must not be given the gradient of the step before."""
    folder, _ = records
    plain, other = (
        load_file(folder / name_of(c) / f"checkpoints/step-{SAVED:08d}/model.safetensors") for c in (CASES[0], case)
    )
    assert other.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.allclose(other[name], value, rtol=1e-3, atol=1e-5), name


def test_the_cuts_of_the_other_rank_are_named(records) -> None:
    _, output = records
    lines = [line for line in output.splitlines() if "skipped: its gradient is not finite" in line]
    assert len(lines) == len(CASES)
    assert all("cuts of micro-batches with such a loss: train-0" in line for line in lines)
