"""The bash library of the recipes, run for real on small recipes in a temporary folder."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT / "egs/shared"

RECIPE = """#!/usr/bin/env bash
set -euo pipefail
recipe="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
last_stage=3 flavour=plain
recipe_options=(flavour)
usage() {{ echo "a small recipe"; }}
. "{shared}/parse_options.sh"
parse_options "$@"
. "{shared}/stages.sh"
{stages}
stages_summary
"""
STAGES = """
stage 1 one "nothing" "$exp/a" bash -c 'echo made one; echo x >> "$1"' _ "$exp/a"
stage 2 two "$exp/a" "$exp/b" bash "$recipe/two.sh" "$exp/b" "$flavour" %force
stage 3 three "prose" "prose" echo three of "$(basename "${conf:-none}")"
"""
TWO = 'echo "made two: $*"; cat "$(dirname "$1")/a" > "$1"\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "conf").mkdir()
    for mode in ("short", "full"):
        (tmp_path / f"conf/{mode}.yaml").write_text("seed: 1\n")
    (tmp_path / "two.sh").write_text(TWO)
    write_stages(tmp_path, STAGES)
    return tmp_path


def write_stages(recipe: Path, stages: str) -> None:
    (recipe / "run.sh").write_text(RECIPE.format(shared=SHARED, stages=stages))


def run(recipe: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        ["bash", str(recipe / "run.sh"), "--mode", "short", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    return output


def exp(recipe: Path) -> Path:
    return recipe / "exp/short"


def finished(recipe: Path) -> list[str]:
    return [path.name for path in (exp(recipe) / "stages").glob("*.done")]


def test_stages_run_once_and_are_skipped_with_a_reason(recipe: Path) -> None:
    first = run(recipe)
    assert "made one" in first
    assert "made two" in first
    assert "three of none" in first
    assert "cost:" in first
    assert (exp(recipe) / "logs/1-one.log").read_text() == "made one\n"
    assert "hash=" in (exp(recipe) / "stages/2-two.done").read_text()
    second = run(recipe)
    assert second.count("skipped: finished on") == 3
    assert "made" not in second
    assert (exp(recipe) / "a").read_text() == "x\n"


def test_force_runs_selected_stages_again_and_passes_the_word_on(recipe: Path) -> None:
    assert "--force" not in run(recipe)
    forced = run(recipe, "--force", "--stage", "2", "--stop-stage", "2")
    assert "runs again: --force" in forced
    assert "plain --force" in forced
    assert "made one" not in forced
    assert "skipped" in run(recipe, "--stage", "2", "--stop-stage", "2")


def test_a_stage_runs_again_after_one_that_wrote_what_it_reads(recipe: Path) -> None:
    run(recipe)
    run(recipe, "--force", "--stop-stage", "1")
    again = run(recipe)
    assert "runs again: 1-one, which writes" in again
    assert "made two" in again
    assert "three of none" not in again.replace("command: echo", "")
    assert (exp(recipe) / "b").read_text() == "x\nx\n"
    assert run(recipe).count("skipped") >= 3


def test_a_stage_that_reads_a_folder_runs_again_after_one_that_wrote_into_it(recipe: Path) -> None:
    stages = """
stage 1 one "nothing" "$exp/decode/greedy/" mkdir -p "$exp/decode/greedy"
stage 2 two "$exp/decode/" "$exp/page" touch "$exp/page"
stage 3 three "$exp/decode/greedy/test.jsonl" "prose" echo read it
"""
    write_stages(recipe, stages)
    run(recipe)
    run(recipe, "--force", "--stop-stage", "1")
    again = run(recipe)
    assert again.count(f"runs again: 1-one, which writes {exp(recipe)}/decode/greedy/, has run since") == 2


@pytest.mark.parametrize("change", ["option", "script"])
def test_a_changed_command_runs_again(recipe: Path, change: str) -> None:
    run(recipe)
    if change == "script":
        (recipe / "two.sh").write_text(TWO + "echo edited\n")
    again = run(recipe, *(["--flavour", "salty"] if change == "option" else []))
    assert "runs again: its command or a file it names has changed" in again
    assert "made two" in again
    assert "made one" not in again


def test_a_stage_whose_output_is_gone_runs_again(recipe: Path) -> None:
    run(recipe)
    (exp(recipe) / "b").unlink()
    again = run(recipe)
    assert f"runs again: {exp(recipe) / 'b'} is gone" in again
    assert (exp(recipe) / "b").exists()


def test_a_failing_stage_names_the_log_and_shows_its_end(recipe: Path) -> None:
    write_stages(recipe, 'stage 1 one a b bash -c "seq 100; echo broken >&2; exit 7"\nstage 2 two a b echo never')
    output = run(recipe, code=7)
    log = exp(recipe) / "logs/1-one.log"
    # bash counts the seconds that began meanwhile, which is one at times for a stage of a few milliseconds
    failed = rf"stage 1 one FAILED after [01] s with exit code 7; log: {re.escape(str(log))}; its last 15 lines:"
    assert re.search(failed, output), output
    shown = output.split("its last 15 lines:\n")[1].split()
    assert shown == [str(n) for n in range(87, 101)] + ["broken"]
    assert "echo never" not in output
    assert finished(recipe) == []


def test_a_function_stops_at_its_first_failing_command(recipe: Path) -> None:
    write_stages(recipe, "both() { false; echo went on; }\nstage 1 one a b both\n")
    output = run(recipe, code=1)
    assert "went on" not in output


def test_an_edited_function_is_a_changed_command(recipe: Path) -> None:
    write_stages(recipe, "both() { echo red; }\nstage 1 one a b both\n")
    run(recipe)
    assert "skipped" in run(recipe)
    write_stages(recipe, "both() { echo blue; }\nstage 1 one a b both\n")
    assert "blue" in run(recipe)


def test_what_a_stage_ran_is_kept_as_lines_that_a_shell_reads_back(recipe: Path) -> None:
    write_stages(
        recipe,
        'harken() { note_command harken "$@"; }\n'
        'many() { harken train "data.labels=[$1]" --exp "$1"; harken score x; }\n'
        'stage 1 one a b many "a b"\nstage 2 two a b printf "<%s>" %force "it\'s"\n',
    )
    for _ in range(2):  # forced, they are those of the last time
        run(recipe, "--force")
        first = (exp(recipe) / "stages/1-one.commands").read_text()
        assert first == "harken train 'data.labels=[a b]' --exp 'a b'\nharken score x\n"
        assert (exp(recipe) / "stages/2-two.commands").read_text() == "printf '<%s>' --force 'it'\\''s'\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_command_and_leaves_no_marker(recipe: Path, number: signal.Signals) -> None:
    saved = recipe / "saved"
    body = f"trap 'echo saving; sleep 0.3; touch {saved}; exit 0' TERM; echo ready; while true; do sleep 0.1; done"
    (recipe / "loop.sh").write_text(body + "\n")
    write_stages(recipe, f"long() {{ bash {recipe}/loop.sh; }}\nstage 1 one a b long\nstage 2 two a b echo never")
    process = subprocess.Popen(
        # As from a terminal: a shell that inherits SIGINT ignored, as one from a background job does, cannot trap it.
        ["env", "--default-signal=INT", "bash", str(recipe / "run.sh"), "--mode", "short"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    log = exp(recipe) / "logs/1-one.log"
    deadline = time.monotonic() + 20
    while not (log.exists() and "ready" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130, output
    assert saved.exists(), "the command must have had the time to save"
    assert f"stage 1 one stopped by {number.name[3:]}" in output
    assert "never" not in output
    assert finished(recipe) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stge", "2"], "unknown option --stge"),
        (["--stage", "two"], "--stage must be a whole number, got 'two'"),
        (["--stage", "9"], "--stage must be between 1 and 3, got 9"),
        (["--stage", "2", "--stop-stage", "1"], "--stop-stage must not be before --stage 2, got 1"),
        (["--nproc", "0"], "--nproc must be 1 or more, got '0'"),
        (["--mode=long"], "--mode must be short or full, got 'long'"),
        (["--conf", "/nowhere.yaml"], "--conf must be a file, found none at /nowhere.yaml"),
        (["--corpus", "/nowhere"], "--corpus must be a folder or a file, found none at /nowhere"),
        (["--exp"], "--exp needs a value"),
        (["again"], "options start with --, got 'again'"),
    ],
)
def test_bad_options_are_one_clear_line(recipe: Path, arguments: list[str], message: str) -> None:
    output = run(recipe, *arguments, code=2)
    assert message in output
    assert len(output.splitlines()) == 1


def test_options_may_carry_an_equals_sign_and_recipes_their_own(recipe: Path) -> None:
    output = run(recipe, "--stage=2", "--stop-stage=2", "--flavour=a b", code=1)  # no stage 1, so its file is missing
    assert "a\\ b" in output


def test_help_lists_options_and_runs_nothing(recipe: Path) -> None:
    output = run(recipe, "--help")
    for option in (
        "--stage N",
        "--stop-stage N",
        "--mode",
        "--nproc",
        "--conf",
        "--exp",
        "--corpus",
        "--force",
    ):
        assert option in output
    assert not (recipe / "exp").exists()


def test_the_default_recipe_explains_itself() -> None:
    script = ROOT / "egs/amazon_queen/run.sh"
    done = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True, timeout=20, check=True)
    assert "Examples:" in done.stdout
    assert done.stdout.count("egs/amazon_queen/run.sh --") >= 2


def test_every_script_parses() -> None:
    scripts = [path for folder in ("tools", "egs", ".ci") for path in (ROOT / folder).rglob("*")]
    scripts = [path for path in scripts if path.suffix == ".sh" or path == ROOT / ".ci/run"]
    assert len(scripts) >= 7
    for script in scripts:
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    scripts = [*sorted((ROOT / "tools").glob("*.sh")), *sorted(SHARED.glob("*.sh")), ROOT / ".ci/run"]
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
