"""encoders.sh and methods.sh of the default recipe in miniature: everything real, two steps of training on tones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = Path("egs/amazon_queen")
SHORT = """
train: {steps: 2, valid_every_steps: 2}
checkpoint: {every_steps: 2}
batch: {max_seconds: 20, seconds_per_step: 20}
"""
SMALL = """
encoder: {dim: 32, ffn_dim: 64, heads: 2, layers: 4}
batch: {max_seconds: 20, seconds_per_step: 20}
"""


@pytest.fixture(scope="module")
def copy(corpus, python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the recipe on the tiny corpus, with 100 units of it as run.sh makes them."""
    root = tmp_path_factory.mktemp("queen")
    shutil.copytree(ROOT / RECIPE, root / RECIPE, ignore=shutil.ignore_patterns("data", "exp", "results"))
    shutil.copytree(ROOT / "egs/shared", root / "egs/shared")
    shutil.copytree(ROOT / "tools", root / "tools", ignore=shutil.ignore_patterns("bench"))
    (root / "docs").mkdir()
    shutil.copy(ROOT / "docs/methods.md", root / "docs/methods.md")
    (root / "framework").symlink_to(ROOT / "framework")
    data = root / RECIPE / "data"
    data.mkdir()
    shutil.copy(corpus.tokens, data / "tokens.txt")
    for name in ("train", "train-30min", "dev", "test", "test-unseen"):
        shutil.copy(corpus.train if name.startswith("train") else corpus.valid, data / f"{name}.jsonl")
        harken(python, "data", "index", data / f"{name}.jsonl")
    units, mfcc = root / "exp/units1", ("--features", "mfcc", "--average", "4")
    harken(python, "units", "fit", data / "train.jsonl", "--out", units / "km", "--clusters", "100", *mfcc)
    stores = (data / "train.jsonl", data / "dev.jsonl")
    harken(python, "units", "label", *stores, "--clusterer", units / "km", "--out", units / "labels", *mfcc)
    (root / "short.yaml").write_text(SHORT)
    (root / "small.yaml").write_text(SMALL)
    return root


def harken(python: Path, *arguments: str | Path) -> None:
    call = [str(python), "-m", "harken.apps.main", *map(str, arguments)]
    done = subprocess.run(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout


def compare(copy: Path, python: Path, script: str, *arguments: str | Path, code: int = 0) -> str:
    call = [
        "bash",
        str(copy / RECIPE / script),
        "--python",
        str(python),
        "--exp",
        str(copy / "exp"),
        *map(str, arguments),
    ]
    done = subprocess.run(
        call,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    logs = (
        "".join(path.read_text()[-2000:] for path in copy.glob("exp/logs/*/*.log")) if done.returncode != code else ""
    )
    assert done.returncode == code, done.stdout[-4000:] + logs
    return done.stdout


@pytest.mark.slow
def test_encoders_are_pretrained_and_fine_tuned_by_both_objectives(copy: Path, python: Path) -> None:
    asked = ("--conf", copy / "short.yaml", "--minutes", "30", "--seeds", "1", "--jobs", "2", "--steps", "2")
    asked += ("--budget", "2")
    compare(copy, python, "encoders.sh", *asked)
    rows = {path.stem: json.loads(path.read_text()) for path in (copy / RECIPE / "results/encoders").glob("*.json")}
    parts = [(encoder, kind) for encoder in ("transformer", "zipformer") for kind in ("ctc", "transducer")]
    assert sorted(rows) == sorted(f"30-{encoder}_{kind}-1" for encoder, kind in parts)
    for encoder, kind in parts:
        commands = rows[f"30-{encoder}_{kind}-1"]["commands"]
        train = [line for line in commands if line.startswith("harken train ")]
        assert len(train) == 2
        assert all(f"conf/{encoder}.yaml" in line for line in train)
        assert ("transducer.yaml" in train[1]) == (kind == "transducer")
        assert f"train.init_from=exp/encoders/{encoder}" in train[1]
        assert rows[f"30-{encoder}_{kind}-1"]["peak_gib"] > 0
    page = (copy / RECIPE / "README.md").read_text()
    assert page.count("| 30 min | Zipformer, ") == 2
    assert compare(copy, python, "encoders.sh", *asked).count("skipped: finished on") == 4
    assert "--starts must name rows that --help lists, got 'x'" in compare(
        copy, python, "encoders.sh", "--starts", "x", code=2
    )


@pytest.mark.slow
def test_methods_are_pretrained_probed_and_fine_tuned(copy: Path, python: Path, corpus) -> None:
    assert f"{copy}/exp/finetune holds no recogniser" in compare(copy, python, "methods.sh", code=2)
    data = copy / RECIPE / "data"
    harken(
        *(python, "train", copy / RECIPE / "conf/finetune.yaml", copy / "small.yaml", copy / "short.yaml"),
        *(f"data.train={data}/train.jsonl", f"objective.tokenizer={data}/tokens.txt", "--exp", copy / "exp/finetune"),
    )
    asked = ("--methods", "hubert data2vec", "--steps", "2", "--budget", "2", "--conf", copy / "small.yaml")
    compare(copy, python, "methods.sh", *asked)
    found = {path.stem: json.loads(path.read_text()) for path in (copy / RECIPE / "results/methods").glob("*.json")}
    assert sorted(found) == ["data2vec", "hubert"]
    for method, row in found.items():
        assert (row["objective"], row["encoder"], row["steps"]) == (method, "conformer", 2)
        assert row["lines"] == len((ROOT / f"framework/harken/objectives/{method}.py").read_text().splitlines())
        assert str(copy) not in json.dumps(row)
        assert row["files"] == {"hubert": [], "data2vec": ["encoders/teacher.py", "objectives/data2vec.py"]}[method]
        assert row["probe"]["layer"] == 3
        assert 1 <= row["probe"]["rank_encoder"] <= 32
        assert row["rows"][0]["start"] == method
        assert ("data.labels=" in row["commands"][0]) == (method == "hubert")
    lines = (copy / "docs/methods.md").read_text().split("<!-- methods:begin -->")[1].splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines[3:5]]
    assert [(row[1], row[4]) for row in cells] == [("hubert", "0"), ("data2vec", "2")]
    assert (copy / "exp/stages/2-pretrain.commands").read_text().count("harken train ") == 2
    shutil.copytree(copy / "exp/methods/rows/30-hubert-1", copy / "exp/methods/rows/30-hubert-1.old")
    again = compare(copy, python, "methods.sh", *asked, "--seeds", "1 2")
    hubert = json.loads((copy / RECIPE / "results/methods/hubert.json").read_text())
    assert [row["seed"] for row in hubert["rows"]] == [1, 2], "what was put aside does not count"
    assert again.count("skipped: finished on") == 3
    assert again.count("-1: done before") == again.count("-2: done") == 2
