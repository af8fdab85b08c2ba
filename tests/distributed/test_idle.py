"""Ranks that have nothing to learn from in a step stay in step with the others."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORKER = Path(__file__).with_name("worker_nonfinite.py")
CUT, STEPS = "train-005", 26  # an epoch has no more


@pytest.mark.parametrize("poison", ["", "cut"])
def test_a_rank_without_a_batch_logs_and_skips_with_the_others(corpus, run_python, tmp_path: Path, poison: str) -> None:
    """One micro-batch a step for two ranks, every step logged; with the poison, steps are skipped meanwhile."""
    settings = corpus.settings("ctc", "filterbank")
    settings["encoder"]["layer_drop"] = 0.0
    settings["batch"].update(max_seconds=6.0, seconds_per_step=6.0)
    settings["train"].update(steps=STEPS, max_skipped_steps=0)
    settings["engine"]["timeout_seconds"] = 20  # where one waits for the other for ever
    settings["log"]["every_steps"] = 1
    OmegaConf.save(OmegaConf.create(settings), tmp_path / "idle.yaml")
    plan = [{"processes": 2, "jobs": [[tmp_path / "idle.yaml", tmp_path / "idle", poison, CUT]]}]
    (tmp_path / "plan.json").write_text(json.dumps(plan, default=str))
    output = run_python(WORKER, tmp_path / "plan.json")
    assert "WARNING 1 micro-batches of a step over 2 processes: some are idle for a part of each step" in output
    assert json.loads((tmp_path / "idle.json").read_text()) == "finished"
    rows = [json.loads(line) for line in (tmp_path / "idle/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses) == STEPS
    bad = sum(not math.isfinite(loss) for loss in losses)
    assert bad == output.count("skipped: its gradient is not finite; cuts of micro-batches with such a loss")
    assert (bad > 0) == bool(poison)
    if poison:
        assert "first in the output of module `backbone.encoder.blocks.0`" in output
