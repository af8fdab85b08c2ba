"""The gate of speed compares ratios of equal settings, and fails on a loss over a tenth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "tools/bench"
SETTINGS = {"layers": 12, "seconds": 8.0, "batch": 2, "precision": "fp32", "device": "cpu", "threads": 2}


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import check

    return check


def write(folder: Path, speed: float, memory: float, **settings: object) -> str:
    peers = {"harken_is_faster": 9.0, "harken_is_faster_cpu": speed, "harken_takes_memory": memory}
    file = folder / "result.json"
    result = {"settings": {**SETTINGS, **settings}, "figures": {"harken": {**peers}, "fairseq": peers}}
    file.write_text(json.dumps(result))
    return str(file)


@pytest.mark.parametrize(
    ("speed", "memory", "status", "said"),
    [
        (3.0, 0.5, 0, "2 of 2 ratios are within 10 %"),
        (2.75, 0.54, 0, "2 of 2 ratios are within 10 %"),
        (2.6, 0.5, 1, "speed beside fairseq: 2.600, stored 3.000: lost 13 %"),
        (3.0, 0.6, 1, "memory beside fairseq: 1.667, stored 2.000: lost 17 %"),
    ],
)
def test_a_loss_over_a_tenth_fails(check, tmp_path, capsys, speed, memory, status, said) -> None:
    stored = ["--stored", str(tmp_path / "ratios.json")]
    assert check.main([write(tmp_path, 3.0, 0.5), *stored, "--store"]) == 0
    assert check.main([write(tmp_path, speed, memory), *stored]) == status
    output = capsys.readouterr()
    assert said in output.out + output.err


def test_other_settings_are_not_compared(check, tmp_path, capsys) -> None:
    stored = ["--stored", str(tmp_path / "ratios.json")]
    assert check.main([write(tmp_path, 3.0, 0.5), *stored, "--store"]) == 0
    assert check.main([write(tmp_path, 3.0, 0.5, layers=2), *stored]) == 2
    assert "must have ratios of `train_step layers=2" in capsys.readouterr().err


def test_without_a_peer_there_is_nothing_to_compare(check, tmp_path, capsys) -> None:
    file = tmp_path / "alone.json"
    file.write_text(json.dumps({"settings": SETTINGS, "figures": {"harken": {}}}))
    assert check.main([str(file), "--stored", str(tmp_path / "ratios.json"), "--store"]) == 2
    assert "found no ratio in it" in capsys.readouterr().err


@pytest.mark.slow
def test_the_ablation_times_each_switch_and_puts_it_back(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import ablation

    from harken.frontends import waveform
    from harken.nn import waveform as products

    found = ablation.measure(ablation.parse(["--layers=1", "--seconds=0.3", "--steps=2", "--threads=1", "--batch=1"]))
    assert set(found) == set(ablation.SWITCHES)
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found.values())
    assert waveform.pays is products.pays
    assert ablation.ratios({"all": [1.0, 2.0, 4.0], "x": [2.0, 3.0, 4.0]})["x"] == 1.5
