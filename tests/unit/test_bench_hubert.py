"""The benchmark beside Hugging Face compares equal models, and its figures are what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harken.core.errors import HarkenError

BENCH = Path(__file__).resolve().parents[2] / "tools/bench"
SMALL = ["--layers", "1", "--seconds", "0.5", "--steps", "1", "--warmup", "0", "--threads", "1"]


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import hubert_step

    return hubert_step


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(BENCH.parents[1] / "framework"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, str(BENCH / "hubert_step.py"), *SMALL, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )


@pytest.mark.slow
def test_equal_models_take_a_step_each(tmp_path) -> None:
    done = run("--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert 0 < found["outputs"]["hidden_difference"] < 1e-4
    assert found["outputs"]["size"] > 1
    losses = {name: found["steps"][name]["losses"][0] for name in ("harken", "hugging_face")}
    assert losses["harken"] != losses["hugging_face"], "dropout is off: two random streams gave one loss"
    assert losses["harken"] == pytest.approx(losses["hugging_face"], rel=0.05)
    for name in ("harken", "hugging_face"):
        figures = found[name]
        assert figures["audio_seconds_per_second"] == pytest.approx(1000 / figures["milliseconds"])
        # weights, gradients and Adam's two moments of 16.7 million parameters
        assert 16.7e6 * 16 / 2**30 < figures["peak_gib"] < 2
        assert f"{figures['milliseconds']:.0f}" in done.stdout


@pytest.mark.slow
def test_nothing_is_timed_when_outputs_differ() -> None:
    done = run("--tolerance", "0")
    assert done.returncode == 1
    assert "must differ by at most 0" in done.stderr
    assert "audio s/s" not in done.stdout


def test_figures_are_medians_and_pairs(step) -> None:
    taken = {
        "harken": {"seconds": [1.0, 2.0, 9.0], "losses": [0.0] * 3},
        "hugging_face": {"seconds": [2.0, 3.0, 9.0], "losses": [0.0] * 3},
    }
    memory = {
        "harken": {"after_imports": 1 << 30, "peak": 3 << 30},
        "hugging_face": {"after_imports": 2 << 30, "peak": 6 << 30},
    }
    found = step.summarise(taken, memory, audio_seconds=16.0)
    assert found["harken"] == {
        "audio_seconds_per_second": 8.0,
        "milliseconds": 2000.0,
        "milliseconds_min": 1000.0,
        "milliseconds_max": 9000.0,
        "peak_gib": 2.0,
        "speed_ratio": 1.5,  # the median of 2, 1.5 and 1
        "memory_ratio": 0.5,
    }
    lines = step.table(found).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split("|")[1:4] == [" harken       ", "      8.00 ", "      2000 "]


def test_outputs_that_differ_are_refused(step) -> None:
    ours = np.zeros((2, 3), dtype=np.float32)
    assert step.compare(ours, ours + 0.5, 1.0) == 0.5
    with pytest.raises(HarkenError, match=r"differ by at most 0\.1, found 5\.00e-01"):
        step.compare(ours, ours + 0.5, 0.1)
    with pytest.raises(HarkenError, match="found nan"):
        step.compare(ours, ours + np.nan, 0.1)
    with pytest.raises(HarkenError, match=r"one shape.*\(2, 3\).*\(2, 2\)"):
        step.compare(ours, ours[:, :2], 0.1)


def test_a_worker_that_ends_shows_what_it_printed(step, tmp_path) -> None:
    code = "import sys; print('out of luck', file=sys.stderr); sys.exit(3)"
    worker = step.Worker("peer", [sys.executable, "-c", code], threads=1, log=tmp_path / "log")
    try:
        with pytest.raises(step.WorkerError, match=r"(?s)peer ended \(exit 3\) when asked to build.*out of luck"):
            worker.ask("build")
    finally:
        worker.close()


def test_speed_beside_harken_is_over_the_same_steps(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import train_step

    taken = {
        "harken": {"seconds": [1.0, 2.0, 4.0], "cpu_seconds": [1.0, 1.0, 1.0]},
        "fairseq": {"seconds": [2.0, 3.0, 4.0], "cpu_seconds": [3.0, 3.0, 9.0]},
    }
    memory = {"harken": {"after_imports": 1 << 30, "peak": 3 << 30}, "fairseq": {"after_imports": 0, "peak": 4 << 30}}
    found = train_step.summarise(taken, memory, audio_seconds=16.0, shares={"harken": 1.0, "fairseq": 0.5})
    assert found["fairseq"] == {
        "audio_seconds_per_second": 16 / 3,
        "mfu_percent": 100 * 0.5 / 3,
        "peak_gib": 4.0,
        "harken_is_faster": 1.5,
        "harken_is_faster_cpu": 3.0,
        "harken_takes_memory": 0.5,
    }
    assert "1.50" in train_step.table(found).splitlines()[-1]


@pytest.mark.slow
def test_a_step_is_timed_beside_what_is_installed(monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("PYTHONPATH", str(BENCH.parents[1] / "framework"))
    import train_step

    missing = train_step.PACKAGES | {"fairseq": "no_such_toolkit"}
    monkeypatch.setattr(train_step, "PACKAGES", missing)
    assert train_step.main([*SMALL, "--peers", "hugging_face", "harken", "harken_fasthubert", "fairseq"]) == 0
    said = capsys.readouterr().out
    assert "| harken_fasthubert |" in said
    assert "left out: fairseq: no_such_toolkit is not installed" in said
    assert "| hugging_face " in said
