"""A run that stands is ended by its watchdog, which names the rank, what it does and what it reads."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from harken.config.load import load
from harken.data.dataset import as_it_is
from harken.data.loader import StepTasks, TrainLoader
from harken.data.order import Position
from harken.engine.watchdog import HUNG

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("worker_watchdog.py")
TIMEOUT, STEP, STEPS, MICRO_BATCHES = 12, 3, 4, 4
# processes, what befalls the last of them in the third step, workers of the loader
CASES = {
    "stopped-2": (2, "stopped", 0),
    "stopped-4": (4, "stopped", 0),
    "killed-2": (2, "killed", 0),
    "hangs-1": (1, "hangs", 0),
    "fifo-2": (2, "", 1),
    "validation-1": (1, "slow validation", 0),
    "worker-1": (1, "worker killed", 1),
    "unpicklable-1": (1, "unpicklable", 1),
}


def with_fifo(corpus, config: Path, folder: Path) -> Path:
    """Copy the manifest; the audio of the first cut that the second of two ranks reads for the step is a FIFO."""
    settings = load([config]).config
    loader = TrainLoader(settings.data, settings.batch, as_it_is, seed=settings.seed, hop=1)
    position = Position()
    for _ in range(STEP - 1):
        position = loader.planner.after(position)
    task = StepTasks(loader.planner, 1, 2, even=False).at(position)[0][0]
    rows = [json.loads(line) for line in corpus.train.read_text().splitlines()]
    fifo = folder / "fifo.flac"
    os.mkfifo(fifo)
    rows[int(task.places[0])]["recording"]["sources"][0]["source"] = str(fifo)
    path = folder / "fifo.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def runs(corpus, run_python, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each case run to its end by forked processes."""
    folder = tmp_path_factory.mktemp("watchdog")
    plan = []
    for name, (processes, trouble, workers) in CASES.items():
        settings = corpus.settings("ctc", "filterbank")
        settings["batch"].update(max_seconds=6.0, seconds_per_step=6.0 * MICRO_BATCHES)
        settings["train"].update(steps=STEPS, valid_every_steps=2)
        settings["data"].update(workers=workers)
        settings["engine"].update(timeout_seconds=TIMEOUT)
        if trouble == "slow validation":
            settings["data"]["valid"] = str(corpus.valid)
        config, exp = folder / f"{name}.yaml", folder / name
        OmegaConf.save(OmegaConf.create(settings), config)
        if name == "fifo-2":
            settings["data"]["train"] = str(with_fifo(corpus, config, folder))
            OmegaConf.save(OmegaConf.create(settings), config)
        old = exp / ".watchdog/old"  # what a run that was killed leaves behind
        old.mkdir(parents=True)
        (old / "alarm").write_text("an alarm of an earlier run")
        (exp / "stacks").mkdir()
        (exp / "stacks/flight_7").write_text("of an earlier start")
        entry = {"name": name, "processes": processes, "trouble": trouble, "limit": 300}
        plan.append({**entry, "config": str(config), "exp": str(exp)})
    (folder / "plan.json").write_text(json.dumps(plan))
    run_python(WORKER, folder / "plan.json")
    return folder


def record(runs: Path, name: str) -> tuple[list[Any], list[str]]:
    """Return how each rank ended, [status, seconds] or None, and what each wrote to stderr."""
    ended = json.loads((runs / f"{name}.json").read_text())["ended"]
    ranks = range(CASES[name][0])
    return [ended[str(rank)] for rank in ranks], [(runs / f"{name}.rank{rank}.err").read_text() for rank in ranks]


def the_message(errors: list[str]) -> str:
    """Return the one message that names a culprit; the other ranks only say that they end with it."""
    lines = [line for error in errors for line in error.splitlines() if line.startswith("harken: ")]
    (message,) = [line for line in lines if "ends with the others" not in line]
    return message


@pytest.mark.parametrize("processes", [2, 4])
def test_a_stopped_rank_is_named_by_the_others_which_end(runs: Path, processes: int) -> None:
    name, last = f"stopped-{processes}", processes - 1
    ended, errors = record(runs, name)
    assert ended[last] is None, "a stopped process ends by nothing but SIGKILL"
    assert [status for status, _ in ended[:last]] == [HUNG] * last, errors
    halted = json.loads((runs / f"{name}.json").read_text())["halted"][str(last)]
    for _, seconds in ended[:last]:
        assert TIMEOUT - 2 < seconds - halted < TIMEOUT + 20
    message = the_message(errors)
    assert message.startswith(f"harken: rank {last} (process ")
    assert f"in phase `forward` of step {STEP}; last batch: train-0" in message
    assert "its process is stopped (SIGSTOP, Ctrl-Z): `kill -CONT` it, or end it. Waiting: rank 0 in `" in message
    assert f"status {HUNG}; the same command goes on from the last checkpoint" in message
    for rank in range(last):
        stacks = (runs / name / f"stacks/rank-{rank}.txt").read_text()
        assert "(most recent call first)" in stacks
        assert "loop.py" in stacks, "the main thread's stack says where it waits"
        flight = pickle.loads((runs / name / f"stacks/flight_{rank}").read_bytes())
        last_call = flight["entries"][-1]
        assert last_call["profiling_name"].startswith("gloo:")
        assert any("harken" in frame["filename"] for frame in last_call["frames"]), "it says who called"
    assert not (runs / name / "stacks/flight_7").exists(), "what an earlier start left is put aside"
    assert (runs / name / "stacks.before/flight_7").read_text() == "of an earlier start"


def test_flights_of_all_ranks_are_compared_by_torchs_own_program(runs: Path) -> None:
    """Rank 1 reads a file that never ends, rank 0 waits for it in the sum of the step's targets."""
    command = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", "--prefix", "flight_"]
    done = subprocess.run(
        [*command, str(runs / "fifo-2/stacks")], capture_output=True, text=True, timeout=300, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "Not all ranks joining collective" in said
    assert "collective: gloo:all_reduce" in said
    assert "missing ranks: {1}" in said
    assert "harken/core/distributed.py" in said, "it says who called"


def test_a_killed_rank_is_named_by_the_other_which_ends(runs: Path) -> None:
    ended, errors = record(runs, "killed-2")
    assert ended[1][0] == -9
    assert ended[0][0] == 1
    command = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", "--prefix", "flight_", "-j"]
    shown = subprocess.run(
        [*command, str(runs / "killed-2/stacks")], capture_output=True, text=True, timeout=300, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert "all_reduce(input_sizes=" in shown.stdout + shown.stderr, "what rank 0 has done is shown"
    flight = pickle.loads((runs / "killed-2/stacks/flight_0").read_bytes())
    assert flight["entries"][-1]["profiling_name"].startswith("gloo:"), "what it was in when the other ended"
    message = the_message(errors)
    assert message.startswith("harken: rank 1 (process ")
    assert f"has ended, in phase `forward` of step {STEP}" in message
    assert message.endswith("The errors of other ranks follow from that")


def test_a_run_of_one_process_is_watched(runs: Path) -> None:
    ended, errors = record(runs, "hangs-1")
    assert ended[0][0] == HUNG
    message = the_message(errors)
    assert message.startswith("harken: rank 0 (process ")
    assert "has made no progress for " in message
    assert f"in phase `forward` of step {STEP}; last batch: train-0" in message
    assert "in troubled" in (runs / "hangs-1/stacks/rank-0.txt").read_text()


def test_a_file_that_is_never_read_to_its_end_is_named(runs: Path) -> None:
    ended, errors = record(runs, "fifo-2")
    assert [status for status, _ in ended] == [HUNG] * 2
    message = the_message(errors)
    assert message.startswith("harken: rank 1 (process ")
    assert f"in phase `data` of step {STEP}" in message
    assert f"; reading {runs}/fifo.flac (cut `train-0" in message


def test_a_slow_validation_is_no_hang_and_a_clean_end_leaves_no_heartbeats(runs: Path) -> None:
    ended, errors = record(runs, "validation-1")
    assert ended[0][0] == 0, errors
    kinds = [json.loads(line)["kind"] for line in (runs / "validation-1/metrics.jsonl").read_text().splitlines()]
    assert kinds == ["valid", "train", "valid"]
    assert not (runs / "validation-1/.watchdog").exists()


def test_a_killed_worker_of_the_loader_ends_the_run_with_its_file(runs: Path) -> None:
    ended, errors = record(runs, "worker-1")
    assert ended[0][0] == 1
    message = the_message(errors)
    assert message.startswith("harken: a worker of rank 0's loader died; what its workers read last: process ")
    assert ".flac (cut `train-0" in message
    assert "is killed by signal: Killed" in errors[0]


def test_an_exception_that_cannot_be_pickled_ends_the_run_with_its_cuts(runs: Path) -> None:
    ended, errors = record(runs, "unpicklable-1")
    assert ended[0][0] == 1
    assert "RuntimeError: preparing cuts train-0" in errors[0]
    assert "failed with LocalError: no way home" in errors[0]
    assert "loader died" not in errors[0]
