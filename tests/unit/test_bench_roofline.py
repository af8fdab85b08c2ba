"""The floor of a preset is its operations over the peak."""

from __future__ import annotations

from pathlib import Path

import pytest

from harken.core.errors import HarkenError

BENCH = Path(__file__).resolve().parents[2] / "tools/bench"


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import roofline

    return roofline


def test_a_preset_has_a_line_of_its_own(roofline, tmp_path: Path) -> None:
    line = roofline.row("hubert_base", 8.0, 100.0, tmp_path)
    name, encoder, parameters, gflop, milliseconds, seconds = (cell.strip() for cell in line.strip("|").split("|"))
    assert (name, encoder) == ("`hubert_base`", "transformer")
    assert float(parameters) == pytest.approx(94.6, abs=0.1)
    # convolutions, blocks and their attention for 399 frames of 8 s; docs/PERFORMANCE.md counts 43.9 without the head
    assert float(gflop) == pytest.approx(45.0, rel=0.05)
    assert float(milliseconds) == pytest.approx(float(gflop) / 100, abs=1e-3)
    assert float(seconds) == pytest.approx(3.6 * float(gflop) / 100, abs=0.01)
    with pytest.raises(HarkenError, match="no model at none"):
        roofline.row("beats_tokenizer_base", 8.0, 100.0, tmp_path)
