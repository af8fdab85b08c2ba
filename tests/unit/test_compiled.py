"""Compiled blocks: the same losses, and no graph is made after the first steps."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo
from torch import nn

from harken.apps.main import main
from harken.nn.dropout import Dropout

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
PLAIN = ["encoder.dropout=0", "encoder.attention_dropout=0", "encoder.input_dropout=0", "encoder.layer_drop=0"]
ZIPFORMER = (
    "encoder={name: zipformer, downsampling: [1], layers: [1], dims: [32], unmasked_dims: [16], ffn_dims: [32], "
    "heads: [4], kernels: [7], query_dims: [8], value_dims: [6], position_dim: 16, dropout: 0, start_dropout: 0, "
    "position_dropout: 0, random_skips: false}"
)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Leave nothing compiled to other tests."""
    yield
    torch._dynamo.reset()


def records(folder: Path, config: Path, *overrides: str) -> list[dict[str, Any]]:
    options = ["train.steps=8", "log.every_steps=2", *overrides]
    assert main(["train", str(config), "--exp", str(folder), *options]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "backend"),
    [
        pytest.param(PLAIN, "inductor", marks=needs_compiler),
        ([ZIPFORMER], "aot_eager"),  # traced as always, but not compiled to C++, which takes minutes
    ],
    ids=["transformer", "zipformer"],
)
def test_compiled_blocks_learn_the_same_and_ragged_batches_share_their_graphs(
    corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: list[str], backend: str
) -> None:
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend))
    config = corpus.yaml(tmp_path, "hubert", "filterbank")
    plain = records(tmp_path / "plain", config, *encoder)
    compiled = records(tmp_path / "compiled", config, *encoder, "engine.compile=true")
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in plain], rel=1e-3)
    made = [line["compiled_graphs"] for line in compiled]
    assert made[0] > 0
    assert sum(made[2:]) == 0, f"graphs made in two steps each: {made}"
    assert not any("compiled_graphs" in line for line in plain)


def test_an_encoder_without_blocks_is_refused(corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = corpus.yaml(tmp_path, "hubert", "filterbank")
    recurrent = "encoder={name: recurrent, dim: 16, layers: 1}"
    assert main(["train", str(config), "--exp", str(tmp_path / "run"), "engine.compile=true", recurrent]) == 2
    assert "`engine.compile` must be false for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("engine.zero_stage=2", "`engine.compile` needs `engine.zero_stage` 0 or 1"),
        (
            "engine.activation_checkpointing=true",
            "`engine.compile` must be false with `engine.activation_checkpointing`",
        ),
        ("batch.max_seconds=auto", "`batch.max_seconds` must be a number with `engine.compile`"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str, message: str
) -> None:
    config = corpus.yaml(tmp_path, "hubert", "filterbank")
    assert main(["train", str(config), "--exp", str(tmp_path / "run"), "engine.compile=true", other]) == 2
    assert message in capsys.readouterr().err


def test_dropout_does_not_cut_a_graph() -> None:
    block = nn.Sequential(nn.Linear(4, 4), Dropout(0.5), nn.Linear(4, 4)).train()
    explained = torch._dynamo.explain(block)(torch.ones(8, 4))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
