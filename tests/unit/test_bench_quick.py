"""The benchmarks of clustering, audio formats and the engine: a quick look at each gives whole tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "tools/bench"


def figures(name: str, *arguments: str, out: Path) -> tuple[list[dict[str, Any]], str]:
    """Run a benchmark; return its rows and what it printed."""
    paths = [str(BENCH.parents[1] / "framework"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(BENCH / name), *arguments, "--json", str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return rows, done.stdout


def test_all_clusterings_see_the_same_frames(corpus, tmp_path: Path) -> None:
    rows, said = figures(
        "clustering.py", str(corpus.train), "--clusters", "5", "--threads", "1", out=tmp_path / "c.json"
    )
    assert {"harken", "scikit-learn"} <= {row["name"] for row in rows}
    assert len({(row["frames"], row["dim"]) for row in rows}) == 1
    distances = [row["mean_squared_distance"] for row in rows]
    assert max(distances) < 1.3 * min(distances)
    assert said.count("\n|") == len(rows) + 2


def test_every_format_is_read(corpus, tmp_path: Path) -> None:
    rows, _ = figures("formats.py", str(corpus.train), "--minutes", "1", out=tmp_path / "f.json")
    assert [row["name"] for row in rows] == ["wav", "flac", "opus", "mp3", "shar", "webdataset"]
    assert all(row["loading"] > 0 and row["mebibytes"] > 0 for row in rows)
    assert rows[2]["mebibytes"] < rows[1]["mebibytes"] < rows[0]["mebibytes"]
    assert [row["decoding"] is None for row in rows] == [False] * 4 + [True] * 2


@pytest.mark.slow
def test_two_processes_of_each_loop_take_steps(tmp_path: Path) -> None:
    small = ["--layers", "1", "--seconds", "0.5", "--batch", "1", "--steps", "1", "--warmup", "0", "--threads", "1"]
    rows, said = figures(
        "engine.py", *small, "--nproc", "2", "--stages", "plain", "0", "2", out=tmp_path / "engine.json"
    )
    assert [row["stage"] for row in rows] == ["plain", "0", "2"]
    assert rows[0]["more_seconds_percent"] == 0
    assert all(row["audio_seconds_per_second"] > 0 for row in rows)
    assert "plain torch" in said
    assert "ZeRO 2" in said
