"""`harken bench data`: loader and model measured apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harken.apps.main import main
from harken.train.bench import DataBench


@pytest.mark.parametrize("workers", [0, 1])
def test_both_are_measured_and_nothing_is_left(corpus, tmp_path: Path, capsys, workers: int) -> None:
    config = corpus.yaml(tmp_path, "ctc", "filterbank")
    before = sorted(tmp_path.iterdir())
    report = tmp_path / "bench.json"
    assert main(["bench", "data", str(config), f"data.workers={workers}", "--steps", "3", "--json", str(report)]) == 0
    said = capsys.readouterr().out
    assert f"with {workers} worker(s) a process" in said
    found = json.loads(report.read_text())
    assert found["loader"] > 0
    assert found["model"] > 0
    assert found["verdict"] in said
    report.unlink()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("loader", "workers", "said"),
    [
        (3000.0, 1, "the model is the limit: 1 worker(s) read 3.0 times as fast as it computes"),
        (
            500.0,
            2,
            "the loader is the limit: 2 worker(s) read 0.50 times as fast as the model",
        ),
        (1000.0, 0, "without workers a step waits for its own reading, 50 % of the time: `data.workers=1`"),
    ],
)
def test_the_verdict_says_what_to_do(loader: float, workers: int, said: str) -> None:
    assert DataBench(loader, 1000.0, workers, 20).verdict().startswith(said)


def test_steps_must_be_positive(corpus, tmp_path: Path, capsys) -> None:
    assert main(["bench", "data", str(corpus.yaml(tmp_path, "ctc", "filterbank")), "--steps", "0"]) == 2
    assert "--steps must be positive, got 0" in capsys.readouterr().err
