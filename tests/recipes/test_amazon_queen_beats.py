"""beats.sh of the default recipe: both iterations for real, small and on tones, and what its scripts promise."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from harken.config.load import load
from harken.config.saved import find_model, load_config
from harken.units.store import LabelStore

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "egs/amazon_queen"
SMALL = """\
frontend: {channels: 12, patch_frames: 4}
encoder: {dim: 16, layers: 2, heads: 2, ffn_dim: 24, position_kernel: 8, position_groups: 2}
objective: {decoder_layers: 1, decoder_dim: 16, decoder_heads: 2, decoder_ffn_dim: 16, code_dim: 8}
data: {workers: 0}
batch: {max_seconds: 12, seconds_per_step: 24}
train: {steps: 3, valid_every_steps: 3}
checkpoint: {every_steps: 3}
engine: {precision: fp32, threads: 1}
log: {every_steps: 1, tensorboard: false, peak_tflops: 1.0}
"""


@pytest.fixture
def copy(corpus, tmp_path: Path) -> Path:
    """A copy of the recipe over tones."""
    recipe = tmp_path / "egs/amazon_queen"
    recipe.mkdir(parents=True)
    shutil.copy(RECIPE / "beats.sh", recipe / "beats.sh")
    shutil.copytree(RECIPE / "conf", recipe / "conf")
    shutil.copytree(ROOT / "egs/shared", tmp_path / "egs/shared")
    (tmp_path / "framework").symlink_to(ROOT / "framework")
    (recipe / "data").mkdir()
    shutil.copy(corpus.train, recipe / "data/train.jsonl")
    shutil.copy(corpus.valid, recipe / "data/dev.jsonl")
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


def beats(copy: Path, python: Path, *arguments: str, code: int = 0) -> str:
    command = ["bash", str(copy / "egs/amazon_queen/beats.sh"), "--python", str(python), "--exp", str(copy / "exp")]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600, check=False
    )
    assert done.returncode == code, (done.stdout + done.stderr)[-6000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_two_iterations_run_and_are_skipped_afterwards(copy: Path, python: Path) -> None:
    options = ["--mode", "short", "--conf", str(copy / "small.yaml"), "--codes", "20"]
    output = beats(copy, python, *options)
    made = copy / "exp/beats"
    assert f"report: {made}/report.html" in output
    store = LabelStore(made / "units2/labels")
    assert (store.card.rows, store.card.clusters, store.card.cuts) == (4, 20, 72)
    configs = {name: load_config(find_model(made / name)) for name in ("beats1", "tokenizer", "beats2")}
    assert configs["beats1"].objective.targets == "random_projection"
    assert configs["tokenizer"].objective.teacher == f"{made}/beats1"
    assert configs["beats2"].objective.targets == "labels"
    assert configs["beats2"].data.labels == (str(made / "units2/labels"),)
    for name, figures in {
        "beats1": {"accuracy_masked", "codebook_use", "codebook_perplexity"},
        "tokenizer": {"similarity", "commitment_error", "codebook_use", "codebook_perplexity"},
        "beats2": {"accuracy_masked", "label_use", "label_perplexity"},
    }.items():
        records = [json.loads(line) for line in (made / name / "metrics.jsonl").read_text().splitlines()]
        assert records[-1]["step"] == 3
        assert figures <= records[-1].keys(), name
    assert beats(copy, python, *options).count("skipped: finished on") == 5


def test_manifests_have_to_be_there(copy: Path, tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nexit 0\n")
    stub.chmod(0o755)
    (copy / "egs/amazon_queen/data/dev.jsonl").unlink()
    output = beats(copy, stub, code=2)
    assert f"{copy}/egs/amazon_queen/data holds no manifests: run run.sh --stop-stage 3 first" in output


@pytest.mark.parametrize("mode", ["short", "full"])
@pytest.mark.parametrize("part", ["beats", "beats_tokenizer"])
def test_the_configurations_are_whole(mode: str, part: str) -> None:
    needed = ["data.train=t", *(["objective.teacher=t"] if part == "beats_tokenizer" else [])]
    loaded = load([RECIPE / f"conf/{part}.yaml", RECIPE / f"conf/{mode}/beats.yaml"], needed).config
    assert loaded.objective.name == part
    assert loaded.encoder.rows * loaded.frontend.patch_bands == loaded.frontend.bands  # type: ignore[attr-defined]
    assert loaded.train.steps == {"short": 200, "full": 1500}[mode]


def test_help_explains_and_runs_nothing() -> None:
    done = subprocess.run(["bash", str(RECIPE / "beats.sh"), "--help"], capture_output=True, text=True, check=True)
    assert "  egs/amazon_queen/beats.sh --nproc 2 --codes 512" in done.stdout
    assert "--codes N" in done.stdout
