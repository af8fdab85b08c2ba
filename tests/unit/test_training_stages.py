"""Stages that train: what is continued, what is put aside, how a step is divided. `harken train` itself is a stub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "egs/amazon_queen/conf"

# `harken train` counts the steps of its folder up to 4 and says where it begins; FAIL_AT stops it before the end.
RECIPE = """#!/usr/bin/env bash
set -euo pipefail
root="{root}" recipe="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
last_stage=2 labels=one
recipe_options=(labels)
usage() {{ echo "a recipe that trains"; }}
. "$root/egs/shared/parse_options.sh"
parse_options "$@"
. "$root/egs/shared/environment.sh"
. "$root/egs/shared/stages.sh"
. "$root/egs/shared/training.sh"
harken() {{
  note_command harken "$@"
  local folder="${{*: -1}}" step
  mkdir -p "$folder/checkpoints"
  touch "$folder/checkpoints/step"
  step="$(wc -l < "$folder/checkpoints/step")"
  echo "trains from step $step"
  while [ "$step" -lt 4 ]; do
    if [ "$step" = "${{FAIL_AT:-}}" ]; then return 3; fi
    echo x >> "$folder/checkpoints/step"
    step=$((step + 1))
  done
}}
make_labels() {{ mkdir -p "$1"; echo "$2" > "$1/card"; }}
stage 1 labels prose "$exp/labels/" make_labels "$exp/labels" "$labels"
train_stage 2 pretrain "$exp/labels/" "$exp/pretrain" \\
  "$recipe/conf/pretrain.yaml" "data.train=t" "objective.classes=[5]"
stages_summary
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose configuration stands on a `base:` that stands on another."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/model.yaml").write_text((CONF / "model.yaml").read_text())
    (tmp_path / "conf/method.yaml").write_text((CONF / "pretrain.yaml").read_text())
    (tmp_path / "conf/pretrain.yaml").write_text("base: method.yaml\ntrain:\n  steps: 10\n")
    (tmp_path / "run.sh").write_text(RECIPE.format(root=ROOT))
    return tmp_path


def run(recipe: Path, *arguments: str, code: int = 0, fail_at: int | None = None) -> str:
    done = subprocess.run(
        ["bash", str(recipe / "run.sh"), "--python", sys.executable, "--exp", str(recipe / "exp"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | ({} if fail_at is None else {"FAIL_AT": str(fail_at)}),
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    return output


@pytest.mark.slow
def test_a_finished_run_is_put_aside_when_a_base_of_its_configuration_changed(recipe: Path) -> None:
    assert "trains from step 0" in run(recipe)
    assert run(recipe).count("skipped: finished on") == 2
    commented = recipe / "conf/model.yaml"
    commented.write_text(commented.read_text() + "# a remark changes no value\n")
    assert run(recipe).count("skipped: finished on") == 2
    commented.write_text(commented.read_text().replace("layers: 6", "layers: 5"))
    again = run(recipe)
    assert "finished before, runs again: its command or a file it names has changed" in again
    assert f"put aside: {recipe}/exp/pretrain.old" in again
    assert "trains from step 0" in again, "the model of the old configuration must not pass for the new one"
    assert (recipe / "exp/pretrain.old/checkpoints/step").exists()
    assert "harken train" in (recipe / "exp/stages/2-pretrain.commands").read_text()


@pytest.mark.slow
def test_a_finished_run_is_put_aside_when_its_labels_were_made_again(recipe: Path) -> None:
    run(recipe)
    again = run(recipe, "--labels", "two")
    assert "runs again: 1-labels, which writes" in again
    assert "trains from step 0" in again


@pytest.mark.slow
def test_an_interrupted_run_continues_unless_something_changed(recipe: Path) -> None:
    assert "trains from step 0" in run(recipe, code=3, fail_at=2)
    again = run(recipe, code=3, fail_at=3)
    assert "and not finished, continues" in again
    assert "trains from step 2" in again
    assert not (recipe / "exp/pretrain.old").exists()
    changed = run(recipe, "--labels", "two", code=3, fail_at=1)
    assert "and not finished, begins anew: 1-labels, which writes" in changed
    assert "trains from step 0" in changed
    assert "trains from step 1" in run(recipe, "--labels", "two")
    assert "trains from step 0" in run(recipe, "--labels", "two", "--force", "--stage", "2")


def test_a_run_of_unknown_origin_is_put_aside(recipe: Path) -> None:
    (recipe / "exp/pretrain/checkpoints").mkdir(parents=True)
    (recipe / "exp/pretrain/checkpoints/step").write_text("x\nx\nx\nx\n")
    output = run(recipe)
    assert f"put aside: {recipe}/exp/pretrain.old" in output
    assert "trains from step 0" in output


def test_a_mistake_in_the_configuration_ends_the_recipe_before_anything_is_put_aside(recipe: Path) -> None:
    run(recipe)
    path = recipe / "conf/method.yaml"
    path.write_text(path.read_text().replace("clip_norm:", "clip_nrm:"))
    assert "unknown key `train.clip_nrm`" in run(recipe, code=2)
    assert not (recipe / "exp/pretrain.old").exists()
    assert (recipe / "exp/stages/2-pretrain.done").exists()


def divided(processes: int, longest: float, micro_batch: float, step: float, crop: str = "None") -> str:
    table = (
        f"data.max_seconds {longest} # a\ndata.crop_seconds {crop} # b\n"
        f"batch.max_seconds {micro_batch} # c\nbatch.seconds_per_step {step} # d"
    )
    shared = f'. "{ROOT}/egs/shared/training.sh"; processes={processes}'
    script = f'{shared}; harken_config() {{ echo "$1"; }}; divided_batch "$1"'
    done = subprocess.run(["bash", "-euc", script, "_", table], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("processes", "longest", "micro_batch", "step", "override"),
    [
        (1, 12.0, 40.0, 40.0, ""),
        (2, 12.0, 40.0, 40.0, "batch.max_seconds=20"),
        (3, 12.0, 40.0, 40.0, "batch.max_seconds=13.3333"),
        (4, 12.0, 40.0, 40.0, ""),  # 10 s would not hold the longest cut: the loader speaks
        (2, 12.0, 40.0, 160.0, ""),  # four micro-batches divide already
        (3, 12.0, 40.0, 160.0, "batch.max_seconds=26.6667"),  # not 53: memory was sized for 40
        (8, 15.6, 87.5, 2800.0, ""),
        (6, 15.6, 87.5, 2800.0, "batch.max_seconds=77.7778"),
    ],
)
def test_a_step_is_divided_among_processes(
    processes: int, longest: float, micro_batch: float, step: float, override: str
) -> None:
    from harken.config.schema import BatchConfig

    assert divided(processes, longest, micro_batch, step) == override
    if override:
        size = float(override.split("=")[1])
        assert BatchConfig(max_seconds=size, seconds_per_step=step).micro_batches_per_step % processes == 0


def test_a_crop_is_the_longest_cut_where_there_is_one() -> None:
    assert divided(4, 30.0, 40.0, 40.0, crop="8.0") == "batch.max_seconds=10"


def test_the_division_reads_what_harken_config_prints(tmp_path: Path) -> None:
    """The recipe's own configuration, through the command that run.sh asks."""
    script = f"""
      die() {{ echo "$*"; exit 2; }}
      root="{ROOT}" python="{sys.executable}" processes=2
      . "$root/egs/shared/environment.sh"; . "$root/egs/shared/training.sh"
      divided_batch "$root/egs/amazon_queen/conf/full/pretrain.yaml" data.train=t objective.classes=[5] \
        batch.max_seconds=36 batch.seconds_per_step=36"""
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "batch.max_seconds=18"


def test_on_a_cluster_every_stage_is_a_job_and_those_that_train_have_the_nodes(recipe: Path) -> None:
    options = ["--launcher", "slurm", "--nodes", "4", "--gpus", "8", "--partition", "gpu", "--time", "8:00:00"]
    printed = run(recipe, *options, "--labels", "a b", "--dry-run")
    labels, pretrain = printed.split("#!/bin/bash\n")[1:]
    assert "# Runs one command on one node." in labels
    assert "#SBATCH --nodes=1\n" in labels
    assert "gpus" not in labels.partition("\nexec ")[0]
    assert "#SBATCH --partition=gpu\n" in labels
    assert "--labels 'a b' --launcher job --stage 1 --stop-stage 1" in labels
    for line in ("nodes=4", "gpus-per-node=8", "time=8:00:00", "dependency=afterok:JOB_OF_1-labels"):
        assert f"#SBATCH --{line}\n" in pretrain
    assert f"--resumes {recipe}/exp/pretrain -- \\\n" in pretrain
    assert not (recipe / "exp/jobs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--launcher", "sge"], "--launcher must be local or slurm, got 'sge'"),
        (["--nodes", "2"], "--nodes, --gpus, --partition, --time, --pieces and --dry-run are for --launcher slurm"),
        (["--launcher", "slurm", "--nodes", "0"], "--nodes must be 1 or more, got '0'"),
        (["--launcher", "slurm", "--cluster", "/no.yaml"], "--cluster must be a file, found none at /no.yaml"),
    ],
)
def test_a_mistake_about_the_cluster_is_one_line(recipe: Path, arguments: list[str], message: str) -> None:
    assert message in run(recipe, *arguments, code=2)
