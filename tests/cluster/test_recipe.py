"""The default recipe's short mode over a real Slurm, with two tasks that train together, against a run without one."""

from __future__ import annotations

import hashlib
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


STAGES = ["3-verify", "4-units1", "5-pretrain1", "6-units2", "7-pretrain2", "8-finetune", "9-decode", "10-report"]
IN_PIECES = ("3-verify", "4-units1", "6-units2", "9-decode")
DECODED = [f"{method}/{split}" for method in ("greedy", "beam") for split in ("test", "test-unseen")]


def commands() -> list[str]:
    """The commands with which docs/cluster.md begins, those of a new user."""
    block = re.search(r"^```console\n(.*?)^```", (ROOT / "docs/cluster.md").read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None
    return [line.removeprefix("$ ") for line in block[1].splitlines()]


@pytest.fixture
def checkout(corpus, tmp_path: Path) -> Path:
    """A checkout with its environment made, and the recipe's data, of the tiny corpus: what two stages would fetch."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "egs", root / "egs", ignore=shutil.ignore_patterns("exp", "data"))
    for name in ("framework", "slurm", "tools", "setup.py", "constraints.txt"):
        (root / name).symlink_to(ROOT / name)
    programs = root / ".venv/bin"
    programs.mkdir(parents=True)
    for name, module in (("python", ""), ("harken", "-m harken.apps.main ")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module}"$@"\n')
        (programs / name).chmod(0o755)
    made_of = b"".join((root / name).read_bytes() for name in ("setup.py", "constraints.txt"))
    stamp = hashlib.sha256(made_of + f"pinned dev {root}\n".encode()).hexdigest()
    (root / ".venv/harken-setup.stamp").write_text(f"hash={stamp}\ntorch=pinned\nextras=dev\n")
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


def shell(checkout: Path, environment: dict[str, str], command: str) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=checkout,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def wrote(exp: Path, data: Path) -> dict[str, bytes]:
    """What a run made, wherever its folder is: tokens, labels, weights, transcripts, error rates."""
    files = [data / "tokens.txt", *sorted(data.glob("*.tsv")), *sorted((exp / "decode").glob("*/*-score/*.json"))]
    for units in ("units1", "units2"):
        files += [exp / units / "labels" / name for name in ("labels.bin", "index.npy", "ids.txt", "card.json")]
    files += [exp / name / "checkpoints/step-00000042/model.safetensors" for name in TRAINED]
    files += [exp / "decode" / f"{name}.jsonl" for name in DECODED]
    names = [str(path.relative_to(exp if path.is_relative_to(exp) else data)) for path in files]
    contents = [path.read_bytes().replace(str(exp).encode(), b"EXP") for path in files]
    return dict(zip(names, contents, strict=True))


def test_a_new_users_commands_give_over_slurm_what_a_run_here_gives(slurm, runs, checkout: Path) -> None:
    """Two tasks on two nodes and arrays of pieces, against two processes and no pieces on this machine: equal bits."""
    clone, setup, recipe, status = commands()
    assert clone == "git clone URL harken && cd harken"
    assert "is up to date" in shell(checkout, slurm.environment, setup)
    data, there, here = (checkout / "egs/amazon_queen" / name for name in ("data", "exp/short", "exp/here"))
    small = " --stage 3 --layer 1 --conf small.yaml"
    cluster = f" --nodes 2 --pieces 2 --cluster {slurm.cluster}"
    said = shell(checkout, slurm.environment, recipe + small + cluster)
    jobs = dict(re.findall(r"^(\d+-\w+) +job (\d+)$", said, re.MULTILINE))
    assert list(jobs) == STAGES
    for before, after in itertools.pairwise(STAGES):
        first = f"{after}-begin" if after in IN_PIECES else after
        assert f"--dependency=afterok:{jobs[before]}\n" in (there / f"jobs/{first}.sbatch").read_text()
    ended = slurm.wait(jobs["10-report"], "COMPLETED", "FAILED", "CANCELLED", seconds=3600)
    assert ended == "COMPLETED", slurm.harken("status", there, code=1)
    told = shell(checkout, slurm.environment, status)
    assert re.findall(r"^(\d+-\w+) +job \d+ +finished", told, re.MULTILINE) == STAGES
    for stage in IN_PIECES:
        assert re.search(rf"^{stage}-pieces +job \d+ +finished: 2 of 2 pieces$", told, re.MULTILINE), told
    for stage in STAGES:
        assert (there / f"logs/{stage}.slurm.log").stat().st_size > 0
        assert (there / f"logs/{stage}.log").stat().st_size > 0
    over_slurm = wrote(there, data)

    options = f" --nproc 2 --exp {here} --python {sys.executable}"
    shell(checkout, slurm.environment, recipe.replace(" --launcher slurm", "") + small + options)
    for name in TRAINED:
        assert len(list((there / name).glob("samples.rank*.jsonl"))) == 2, "two tasks trained together"
        found = runs.samples(there / name)
        assert max(step for step, _ in found) == 42
        assert found == runs.samples(here / name)
    for name, content in wrote(here, data).items():
        assert over_slurm[name] == content, name
    for stage in STAGES:
        # both were called with the same commands; those that train say which launcher started them
        if stage[2:] not in TRAINED:
            assert (there / f"stages/{stage}.commands").read_text().replace(str(there), str(here)) == (
                here / f"stages/{stage}.commands"
            ).read_text()
