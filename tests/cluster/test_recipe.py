"""The default recipe's short mode over a real Slurm, with two tasks that train together."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
# the linear schedule of conf/short warms up for 40 steps
SMALL = """
frontend: {bands: 20, channels: 16}
encoder: {dim: 32, layers: 2, heads: 2, ffn_dim: 64}
data: {workers: 0}
batch: {max_seconds: 20, seconds_per_step: 40}
train: {steps: 42, valid_every_steps: 21}
checkpoint: {every_steps: 21}
engine: {threads: 1, precision: fp32}
log: {samples: true, tensorboard: false, peak_tflops: 1.0}
"""
TRAINED = ("pretrain1", "pretrain2", "finetune")


@pytest.fixture
def checkout(corpus, tmp_path: Path) -> Path:
    """A checkout with the recipe's data made already, of the tiny corpus: what its first two stages would fetch."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "egs", root / "egs", ignore=shutil.ignore_patterns("exp", "data"))
    for name in ("framework", "slurm", "tools"):
        (root / name).symlink_to(ROOT / name)
    data = root / "egs/amazon_queen/data"
    data.mkdir()
    for split in ("train", "train-10min", "train-30min", "train-120min"):
        shutil.copy(corpus.train, data / f"{split}.jsonl")
    rows = [json.loads(line) for line in corpus.valid.read_text().splitlines()]
    for split in ("dev", "test", "test-unseen"):
        lines = [json.dumps({**row, "id": f"{split}-{row['id']}"}) + "\n" for row in rows]
        (data / f"{split}.jsonl").write_text("".join(lines))
    (root / "small.yaml").write_text(SMALL)
    return root


def run_recipe(checkout: Path, environment: dict[str, str], exp: Path, *options: str | Path) -> str:
    command = ["bash", checkout / "egs/amazon_queen/run.sh", "--mode", "short", "--stage", "3", "--layer", "1"]
    command += ["--conf", checkout / "small.yaml", "--exp", exp, "--python", sys.executable, *options]
    done = subprocess.run(
        list(map(str, command)),
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def test_the_short_mode_runs_whole_over_slurm(slurm, corpus, runs, checkout: Path, tmp_path: Path) -> None:
    there = tmp_path / "slurm"
    said = run_recipe(
        checkout, slurm.environment, there, "--launcher", "slurm", "--nodes", "2", "--cluster", slurm.cluster
    )
    jobs = dict(re.findall(r"^(\d+-\w+) +job (\d+)$", said, re.MULTILINE))
    stages = ["3-verify", "4-units1", "5-pretrain1", "6-units2", "7-pretrain2", "8-finetune", "9-decode", "10-report"]
    assert list(jobs) == stages
    for before, after in itertools.pairwise(stages):
        assert f"--dependency=afterok:{jobs[before]}\n" in (there / f"jobs/{after}.sbatch").read_text()
    ended = slurm.wait(jobs["10-report"], "COMPLETED", "FAILED", "CANCELLED", seconds=900)
    told = slurm.harken("status", there, code=0 if ended == "COMPLETED" else 1)
    assert ended == "COMPLETED", told
    assert re.findall(r"^(\d+-\w+) +job \d+ +finished", told, re.MULTILINE) == stages
    for stage in stages:
        assert (there / f"logs/{stage}.slurm.log").stat().st_size > 0
        assert (there / f"logs/{stage}.log").stat().st_size > 0
    for name in TRAINED:
        assert len(list((there / name).glob("samples.rank*.jsonl"))) == 2, "two tasks trained together"
        assert max(step for step, _ in runs.samples(there / name)) == 42
    for name in ("greedy/test.jsonl", "beam/test.jsonl"):
        assert (there / "decode" / name).exists()
