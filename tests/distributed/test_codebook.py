"""A codebook that follows its tokens has the same codes on every rank, those of one process with all tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("worker_codebook.py")


def test_two_ranks_move_codes_as_one_does(run_python, tmp_path: Path) -> None:
    output = run_python(WORKER, tmp_path / "store")
    assert float(output.split("apart ")[-1]) < 1e-5, output
