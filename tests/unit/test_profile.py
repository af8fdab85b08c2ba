"""A window of steps under torch.profiler: the trace, its steps, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from harken.apps.main import main
from harken.config.load import load
from harken.core.errors import HarkenError


def test_a_window_of_steps_is_traced_once_and_a_resumed_run_traces_the_rest(corpus, tmp_path: Path, capsys) -> None:
    settings = corpus.settings("hubert", "filterbank")
    OmegaConf.save(OmegaConf.create(settings), tmp_path / "run.yaml")
    command = ["train", str(tmp_path / "run.yaml"), "--exp", str(tmp_path / "exp"), "log.profile=[2,3]"]
    assert main([*command, "train.steps=3"]) == 0  # it ends within the window
    assert not (tmp_path / "exp/profile").exists()
    assert main([*command, "train.steps=6"]) == 0
    (trace,) = (tmp_path / "exp/profile").iterdir()
    assert trace.name == "rank0.steps-4-4.pt.trace.json"
    assert f"profile of steps 4 to 4: {trace}" in capsys.readouterr().out
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::addmm" in names
    assert any(str(name).startswith("Optimizer.step") for name in names), "the whole step is in it"


@pytest.mark.parametrize("window", ["[5]", "[0,3]", "[3,0]", "[1,2,3]"])
def test_a_window_is_a_first_step_and_a_number_of_steps(corpus, window: str) -> None:
    path = corpus.yaml(corpus.root, "hubert", "filterbank")
    with pytest.raises(HarkenError, match=r"`log.profile` must be \[\] or \[first step, number of steps\]"):
        load([path], [f"log.profile={window}"])
