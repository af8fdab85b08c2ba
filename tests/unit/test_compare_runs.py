"""`harken compare`: which curves are in the band, where and by how much one leaves it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from harken.apps.main import main
from harken.report.compare import read_reference

ROOT = Path(__file__).resolve().parents[2]


def write_run(folder: Path, offset: float, *, spike: float = 0.0, steps: int = 10) -> Path:
    folder.mkdir()
    records = []
    for step in range(1, steps + 1):
        loss = 10.0 / step + offset + (spike if step == 7 else 0.0)
        records.append({"kind": "train", "step": step, "time": 0.0, "hours": step / 10, "loss": loss})
        records.append({"kind": "valid", "step": step, "time": 0.0, "loss": loss, "rank_encoder": 8.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    runs = [write_run(tmp_path / name, offset) for name, offset in (("one", 1.0), ("two", 1.5))]
    out = tmp_path / "reference.json"
    assert main(["compare", *map(str, runs), "--make", str(out)]) == 0
    return out


def test_a_run_between_those_of_the_reference_is_in_the_band(tmp_path: Path, reference: Path, capsys) -> None:
    new = write_run(tmp_path / "new", 1.2, steps=6)  # one that has come halfway is compared as far as it is
    capsys.readouterr()
    assert main(["compare", str(new), str(reference), "--margin", "0"]) == 0
    assert capsys.readouterr().out == "in  valid/loss\nin  valid/rank_encoder\nin  train/loss\n"


def test_where_and_by_how_much_a_curve_leaves_the_band_is_told(tmp_path: Path, reference: Path, capsys) -> None:
    new = write_run(tmp_path / "new", 1.2, spike=2.0)
    capsys.readouterr()
    assert main(["compare", str(new), str(reference), "--margin", "0"]) == 1
    out = capsys.readouterr().out
    assert (
        "OUT valid/loss: outside at 10% of the steps, by 1.7 at step 7, where it is 4.629 and the band 2.429 to 2.929"
    ) in out
    assert "in  valid/rank_encoder" in out
    assert main(["compare", str(new), str(reference), "--margin", "0.7"]) == 0


def test_what_is_no_reference_is_refused(tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path / "run", 1.0)
    (tmp_path / "other.json").write_text("[]")
    assert main(["compare", str(run), str(tmp_path / "other.json")]) == 2
    assert "must be a reference, got TypeError: make one with `harken compare RUN... --make" in capsys.readouterr().err
    assert main(["compare", str(tmp_path), str(tmp_path / "other.json")]) == 2


@pytest.mark.parametrize(
    "path", sorted((ROOT / "egs").glob("*/results/references/**/*.json")), ids=lambda path: path.stem
)
def test_stored_references_are_whole(path: Path) -> None:
    bands = read_reference(path)
    assert {"train/loss", "valid/loss", "valid/rank_encoder"} <= bands.keys()
    for name, band in bands.items():
        assert band.steps == sorted(set(band.steps)), name
        assert len(band.steps) == len(band.low) == len(band.high), name
        assert all(math.isfinite(low) and low <= high for low, high in zip(band.low, band.high, strict=True)), name
    assert len({band.steps[-1] for band in bands.values()}) == 1, "all curves reach the end of the run"
