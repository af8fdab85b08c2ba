"""Jobs on a real Slurm: recipes, preemption, time limits, crashes, several nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]

RECIPE = """#!/usr/bin/env bash
set -euo pipefail
recipe="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)" root="{root}"
last_stage=3
recipe_options=()
usage() {{ echo "a small recipe"; }}
. "$root/egs/shared/parse_options.sh"
parse_options "$@"
python="$(command -v "$python")"
. "$root/egs/shared/stages.sh"
{stages}
stages_summary
"""
CHAIN = """
stage 1 one "nothing" "$exp/a" bash -c 'echo one on $SLURMD_NODENAME; echo 1 >> "$1"' _ "$exp/a"
stage 2 two "$exp/a" "$exp/b" bash -c 'echo two; cat "$1" > "$2"; test ! -e "$1.fail"' _ "$exp/a" "$exp/b"
stage 3 three "$exp/b" "$exp/c" cp "$exp/b" "$exp/c"
"""
# Counts steps of a tenth of a second; saves when it is told to, as `harken train` does.
TRAINER = """
folder="$1" most="$2"; mkdir -p "$folder/checkpoints"
step="$(ls "$folder/checkpoints" | tail -n 1 | sed 's/step-0*//')"; step="${step:-0}"
echo "continues from step $step"
save() { mkdir -p "$folder/checkpoints/$(printf step-%08d "$step")"; echo "saved step $step"; exit 75; }
trap save USR1 TERM
while [ "$step" -lt "$most" ]; do sleep 0.1; step=$((step + 1)); done
echo "finished $step steps"
"""


def run_recipe(slurm, folder: Path, stages: str, *arguments: str, code: int = 0) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "run.sh").write_text(RECIPE.format(root=ROOT, stages=stages))
    options = ["--mode", "short", "--python", sys.executable, "--launcher", "slurm", "--cluster", str(slurm.cluster)]
    done = subprocess.run(
        ["bash", str(folder / "run.sh"), *options, *arguments],
        env=slurm.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def job_ids(exp: Path) -> dict[str, str]:
    files = [path for path in (exp / "jobs").glob("*.json") if not path.stem.endswith(".starts")]
    return {path.stem: json.loads(path.read_text())["id"] for path in files}


def outcomes(exp: Path, name: str) -> list[str]:
    path = exp / f"jobs/{name}.starts.json"
    return [start["outcome"] for start in json.loads(path.read_text())["starts"]] if path.exists() else []


def test_a_recipe_becomes_jobs_in_order_and_finished_stages_need_none(slurm, tmp_path: Path) -> None:
    exp = tmp_path / "recipe/exp/short"
    said = run_recipe(slurm, tmp_path / "recipe", CHAIN)
    ids = job_ids(exp)
    assert list(ids) != []
    assert f"job {ids['2-two']}, after job {ids['1-one']}: {exp}/jobs/2-two.sbatch" in said
    assert slurm.wait(ids["3-three"], "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"
    assert (exp / "c").read_text() == "1\n"
    assert (exp / "logs/1-one.log").read_text() in {"one on n1\n", "one on n2\n"}
    assert "harken job" in (exp / "logs/1-one.slurm.log").read_text()
    told = slurm.harken("status", exp)
    assert [line.split()[3] for line in told.splitlines()] == ["finished"] * 3, told
    assert run_recipe(slurm, tmp_path / "recipe", CHAIN).count("skipped: finished on") == 3
    assert job_ids(exp) == ids, "nothing was submitted"


def test_what_waits_for_a_failed_stage_is_cancelled_and_says_so(slurm, tmp_path: Path) -> None:
    exp = tmp_path / "recipe/exp/short"
    exp.mkdir(parents=True)
    (exp / "a.fail").touch()
    run_recipe(slurm, tmp_path / "recipe", CHAIN)
    ids = job_ids(exp)
    assert slurm.wait(ids["2-two"], "COMPLETED", "FAILED", "CANCELLED") == "FAILED"
    assert slurm.wait(ids["3-three"], "COMPLETED", "CANCELLED") == "CANCELLED"
    told = slurm.harken("status", exp, code=1)
    assert re.search(r"^2-two +job \d+ +failed in \d+m\d+s: status 1: ", told, re.MULTILINE), told
    assert re.search(r"^3-three +job \d+ +cancelled: 2-two did not succeed$", told, re.MULTILINE), told
    (exp / "a.fail").unlink()
    run_recipe(slurm, tmp_path / "recipe", CHAIN)
    assert slurm.wait(job_ids(exp)["3-three"], "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"


def launch_trainer(slurm, exp: Path, steps: int, *options: str, script: str = TRAINER) -> str:
    command = ["bash", "-c", script, "trainer", str(exp), str(steps)]
    told = slurm.harken(
        "launch",
        "--exp",
        exp,
        "--name",
        "train",
        "--resumes",
        exp,
        "--cluster",
        slurm.cluster,
        "--parsable",
        *options,
        "--",
        *command,
    )
    return told.strip()


def test_the_end_of_its_time_is_no_end_of_a_run(slurm, tmp_path: Path) -> None:
    """A real limit of one minute, and a warning 20 s before it, which Slurm may give up to a minute earlier."""
    exp = tmp_path / "exp"
    job = launch_trainer(slurm, exp, 650, "--time", "1:00")
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=900) == "COMPLETED"
    log = (exp / "logs/train.slurm.log").read_text()
    *before, last = outcomes(exp, "train")
    assert last == "finished"
    assert set(before) == {"requeued"}
    saved = re.findall(r"^saved step (\d+)", log, re.MULTILINE)
    assert len(saved) == len(before)
    assert re.findall(r"^continues from step (\d+)", log, re.MULTILINE) == ["0", *saved]
    assert "saved before the end of its time: requeued; the next start continues from step-" in log


def test_a_node_that_dies_takes_no_run_with_it(slurm, wait, tmp_path: Path) -> None:
    """kill -9 of a slurmd: Slurm takes the node for dead and starts the job again when there are two nodes."""
    exp = tmp_path / "exp"
    job = launch_trainer(slurm, exp, 600, "--nodes", "2")
    slurm.wait(job, "RUNNING")
    wait(lambda: outcomes(exp, "train") == [""])
    slurm.daemons["n2"].kill()
    slurm.daemons["n2"].wait()
    slurm.wait(job, "PENDING", seconds=180)
    slurm.start_node("n2")
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", seconds=600) == "COMPLETED"
    assert outcomes(exp, "train") == ["stopped", "finished"]
    (saved,) = re.findall(r"^saved step (\d+)", (exp / "logs/train.slurm.log").read_text(), re.MULTILINE)
    assert f"continues from step {saved}" in (exp / "logs/train.slurm.log").read_text()


def test_a_crash_loop_stops_and_says_why(slurm, tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    job = launch_trainer(slurm, exp, 1, script='echo "no such device"; exit 1')
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=400) == "FAILED"
    assert outcomes(exp, "train") == ["requeued", "requeued", "failed"]
    told = slurm.harken("status", exp, code=1)
    assert "3 starts in a row ended without a new checkpoint, the last with status 1: no such device" in told


def test_a_job_is_not_submitted_twice_and_scancel_does_not_requeue(slurm, tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    job = launch_trainer(slurm, exp, 10_000)
    slurm.wait(job, "RUNNING")
    time.sleep(3)
    said = slurm.harken("launch", "--exp", exp, "--name", "train", "--cluster", slurm.cluster, "--", "true", code=2)
    assert f"job {job} (train) of {exp} is still RUNNING: wait for it, or end it with `scancel {job}`" in said
    slurm.ask("scancel", job)
    assert slurm.wait(job, "CANCELLED", "FAILED", "COMPLETED", "PENDING") == "CANCELLED"
    time.sleep(2)
    assert outcomes(exp, "train") in (["stopped"], [""])


def test_two_nodes_train_through_preemption_requeue_and_kill_as_if_nothing_had_been(
    slurm, corpus, wait, runs, tmp_path: Path
) -> None:
    """USR1 to the job, `scontrol requeue`, kill -9 of a rank: the samples are those of an unbroken run."""
    steps, exp, whole = 60, tmp_path / "exp", tmp_path / "whole"
    config = runs.write_config(corpus, tmp_path / "config.yaml", steps)
    said = slurm.harken(
        "launch", "--nodes", "2", "--time", "30:00", "--cluster", slurm.cluster, "--", "train", config, "--exp", exp
    )
    job = re.findall(r"submitted job (\d+)", said)[0]
    log = exp / "logs/train.slurm.log"

    def tell() -> str:
        return log.read_text()[-6000:] if log.exists() else slurm.state(job)

    wait(lambda: runs.last_step(exp) >= 3, 300, tell)
    slurm.ask("scancel", "--signal=USR1", "--batch", job)
    wait(lambda: outcomes(exp, "train") == ["requeued"], 120, tell)
    before = runs.last_step(exp)
    wait(lambda: runs.last_step(exp) > before + 2, 300, tell)
    slurm.ask("scontrol", "requeue", job)
    wait(lambda: len(outcomes(exp, "train")) == 3, 300, tell)
    before = runs.last_step(exp)
    wait(lambda: runs.last_step(exp) > before + 2, 300, tell)
    ranks = [
        process.pid
        for process in psutil.process_iter(["cmdline", "environ"])
        if process.info["environ"]
        and process.info["environ"].get("RANK") == "1"
        and str(exp) in (process.info["cmdline"] or [])
    ]
    assert ranks, tell()
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=600) == "COMPLETED", tell()
    text = log.read_text()
    assert outcomes(exp, "train") == ["requeued", "stopped", "requeued", "finished"], text
    assert "harken preflight: 2 nodes see" in text
    assert "asked to stop: saved step" in text
    assert text.count("continuing from") == 3, text
    slurm.harken("train", config, "--exp", whole)
    assert runs.samples(exp) == runs.samples(whole)
    told = slurm.harken("status", exp)
    assert re.search(r"^train +job \d+ +finished in \d+m\d+s, start 4$", told, re.MULTILINE), told


def test_a_submission_on_another_number_of_nodes_goes_on(slurm, corpus, wait, runs, tmp_path: Path) -> None:
    """Two nodes, stopped by `scancel`, then one, then two again: the samples are those of an unbroken run."""
    steps, exp, whole = 40, tmp_path / "exp", tmp_path / "whole"
    config = runs.write_config(corpus, tmp_path / "config.yaml", steps)
    options = ["--time", "30:00", "--cluster", slurm.cluster, "--parsable"]
    verb = ["--", "train", config, "--exp", exp]
    seen, log = 0, exp / "logs/train.slurm.log"

    def tell() -> str:
        return log.read_text()[-6000:] if log.exists() else "no log yet"

    for nodes in ("2", "1"):
        job = slurm.harken("launch", "--nodes", nodes, *options, *verb).strip()
        wait(lambda: runs.last_step(exp) >= seen + 3, 300, tell)  # noqa: B023  called within this turn
        slurm.ask("scancel", "--signal=TERM", "--batch", job)
        slurm.wait(job, "FAILED", "CANCELLED", "COMPLETED", seconds=120)
        assert outcomes(exp, "train") == ["stopped"], tell()
        seen = runs.last_step(exp)
    job = slurm.harken("launch", "--nodes", "2", *options, *verb).strip()
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", tell()
    processes = re.findall(r"trained; (\d) process", log.read_text())
    assert processes == ["2", "1", "2"]
    slurm.harken("train", config, "--exp", whole)
    assert runs.samples(exp) == runs.samples(whole)


def test_a_node_that_is_too_slow_is_named(slurm, tmp_path: Path) -> None:
    exp, cluster = tmp_path / "exp", tmp_path / "cluster"
    cluster.mkdir()
    for name in ("train.sbatch", "stage.sbatch"):
        (cluster / name).write_text((ROOT / "slurm" / name).read_text())
    text = slurm.cluster.read_text() + "max_starts_without_progress: 1\npreflight: {gigabytes_per_second: 100000}\n"
    (cluster / "cluster.yaml").write_text(text)
    said = slurm.harken(
        "launch", "--nodes", "2", "--cluster", cluster / "cluster.yaml", "--", "train", "absent.yaml", "--exp", exp
    )
    job = re.findall(r"submitted job (\d+)", said)[0]
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "FAILED"
    log = (exp / "logs/train.slurm.log").read_text()
    assert re.search(
        r"harken preflight: node n2 is slow: an all-reduce with n1 has, in GB/s, n2 [\d.]+; expected are", log
    )
