"""A stage in pieces: begun, done piece by piece and ended it runs what it runs in one go, whatever is interrupted."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

RECIPE = """#!/usr/bin/env bash
set -euo pipefail
root="{root}" recipe="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
last_stage=2 beam=4
recipe_options=(beam)
usage() {{ echo "a recipe in pieces"; }}
. "$root/egs/shared/parse_options.sh"
parse_options "$@"
. "$root/egs/shared/environment.sh"
. "$root/egs/shared/stages.sh"
decode() {{
  anew "$1/old"
  harken ngram text
  harken_in_pieces decode greedy --out "$1"
  harken score greedy
  harken_in_pieces decode beam "$2" --out "$1"
  harken score beam
}}
stage_in_pieces 1 decode "prose" "$exp/result/" decode "$exp/result" "$beam"
stage 1 other "prose" "prose" harken doctor
stage 2 last "$exp/result/" "prose" harken report
stages_summary
"""
# `harken` says what it was called with; decoding without a piece leaves its result; FAIL names a verb that fails.
PYTHON = """#!/bin/bash
if [ "$1" = -c ]; then exit 0; fi
shift 2
echo "$*" >> "$CALLS"
if [ "$1" = "${FAIL:-}" ]; then exit 3; fi
case "$*" in *--piece*) ;; decode*) mkdir -p "${@: -1}" ;; esac
"""
BEGIN = ["ngram text"]
END = ["decode greedy --out {0}", "score greedy", "decode beam 4 --out {0}", "score beam"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "run.sh").write_text(RECIPE.format(root=ROOT))
    return tmp_path


def run(recipe: Path, *arguments: str, code: int = 0, fail: str = "") -> tuple[str, list[str]]:
    """What the recipe says, and what it called `harken` with."""
    calls = recipe / "calls"
    calls.write_text("")
    done = subprocess.run(
        ["bash", str(recipe / "run.sh"), "--mode", "short", "--python", str(recipe / "python"), *arguments],
        env={**os.environ, "CALLS": str(calls), "FAIL": fail},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr, calls.read_text().splitlines()


def job(recipe: Path, *arguments: str, code: int = 0, fail: str = "") -> tuple[str, list[str]]:
    options = ["--launcher", "job", "--stage", "1", "--stop-stage", "1", "--only", "1-decode"]
    return run(recipe, *options, *arguments, code=code, fail=fail)


def result(recipe: Path) -> Path:
    return recipe / "exp/short/result"


def ended(recipe: Path) -> list[str]:
    return [line.format(result(recipe)) for line in END]


def commands(recipe: Path) -> str:
    return (recipe / "exp/short/stages/1-decode.commands").read_text()


def test_here_it_is_a_stage_like_any_other(recipe: Path) -> None:
    result(recipe).mkdir(parents=True)
    (result(recipe) / "old").touch()
    _, calls = run(recipe)
    assert calls == [*BEGIN, *ended(recipe), "doctor", "report"]
    assert not (result(recipe) / "old").exists()


def test_its_parts_together_run_what_it_runs_in_one_go(recipe: Path) -> None:
    run(recipe)
    whole = commands(recipe)
    run(recipe, "--stage", "2", "--force")
    assert "skipped" in job(recipe, "--piece", "2/3")[0], "what is finished has no pieces"
    said, calls = job(recipe, "--piece", "begin", "--beam", "4")
    assert "skipped" in said
    assert calls == []

    (recipe / "exp/short/stages/1-decode.done").unlink()
    assert job(recipe, "--piece", "begin")[1] == BEGIN
    (result(recipe) / "old").touch()
    for piece in ("3/3", "1/3", "2/3", "1/3"):
        assert job(recipe, "--piece", piece)[1] == [
            f"decode greedy --out {result(recipe)} --piece {piece}",
            f"decode beam 4 --out {result(recipe)} --piece {piece}",
        ]
    said, calls = job(recipe)
    assert "and not finished, continues" in said
    assert calls == ended(recipe)
    assert (result(recipe) / "old").exists(), "the begin alone removes"
    assert commands(recipe) == whole
    assert "skipped: finished on" in job(recipe)[0]
    assert (recipe / "exp/short/logs/pieces/1-decode-2.log").exists()


def test_what_failed_goes_on_where_it_was(recipe: Path) -> None:
    job(recipe, "--piece", "begin", code=3, fail="ngram")
    said, calls = job(recipe, "--piece", "1/2", code=1)
    assert "a piece of stage 1 decode needs what the job 1-decode-begin makes, which has not succeeded" in said
    assert calls == []
    assert job(recipe, "--piece", "begin")[1] == BEGIN, "it was not done"
    said, calls = job(recipe, "--piece", "begin")
    assert "its pieces are next" in said
    assert calls == []
    assert len(job(recipe, "--piece", "1/2", code=3, fail="decode")[1]) == 1, "it stops at what fails"
    job(recipe, code=3, fail="score")
    assert run(recipe)[1] == [*ended(recipe), "doctor", "report"], "without Slurm it goes on, too"
    repeated = commands(recipe)
    run(recipe, "--force")
    assert repeated == commands(recipe), "what failed and what was repeated is noted once"


def test_another_command_begins_anew(recipe: Path) -> None:
    job(recipe, "--piece", "begin")
    said, calls = job(recipe, "--piece", "1/2", "--beam", "5", code=1)
    assert "begins anew: its command or a file it names has changed" in said
    assert calls == []
    assert job(recipe, "--piece", "begin", "--beam", "5")[1] == BEGIN
    assert len(job(recipe, "--piece", "1/2", "--beam", "5")[1]) == 2


def test_a_job_runs_its_own_stage_of_those_of_one_number(recipe: Path) -> None:
    _, calls = run(recipe, "--launcher", "job", "--stage", "1", "--stop-stage", "1", "--only", "1-other")
    assert calls == ["doctor"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pieces", "2"], "--nodes, --gpus, --partition, --time, --pieces and --dry-run are for --launcher slurm"),
        (["--launcher", "slurm", "--pieces", "0"], "--pieces must be 1 or more, got '0'"),
        (["--piece", "1/2"], "--only and --piece are for the jobs of --launcher slurm"),
    ],
)
def test_mistakes_are_one_line(recipe: Path, arguments: list[str], message: str) -> None:
    said, calls = run(recipe, *arguments, code=2)
    assert message in said
    assert len(said.splitlines()) == 1
    assert calls == []


def test_what_slurm_refuses_keeps_its_markers(recipe: Path) -> None:
    """A job of the stage still runs: at its next start it must find what it has begun."""
    run(recipe)
    stages = recipe / "exp/short/stages"
    (stages / "1-decode.begun").write_text("hash x\n")
    before = {path.name: path.read_text() for path in stages.iterdir()}
    run(recipe, "--launcher", "slurm", "--force", "--stop-stage", "1", code=3, fail="launch")
    assert {path.name: path.read_text() for path in stages.iterdir()} == before
    run(recipe, "--launcher", "slurm", "--force", "--stop-stage", "1")
    assert not [path for path in stages.iterdir() if path.name.startswith("1-decode.") and "commands" not in path.name]
