"""The Zipformer of the default corpus has as many parameters as the default model, in every stage it is trained in."""

from __future__ import annotations

from pathlib import Path

import pytest

from harken.config.load import load
from harken.data.tokens import Characters
from harken.objectives.saved import build_objective

CONF = Path(__file__).resolve().parents[2] / "egs/amazon_queen/conf"


def parameters(*files: Path, overrides: tuple[str, ...]) -> int:
    """Return how many parameters the model of merged configurations has."""
    config = load(list(files), ["data.train=train.jsonl", *overrides]).config
    return sum(parameter.numel() for parameter in build_objective(config).parameters())


@pytest.mark.parametrize("mode", ["full", "short", "compare"])
@pytest.mark.parametrize(
    ("stage", "default", "zipformer"),
    [
        ("pretrain", (), ("zipformer.yaml",)),
        ("finetune", (), ("zipformer.yaml",)),
        ("finetune", ("transducer.yaml",), ("zipformer_transducer.yaml",)),
    ],
)
def test_both_encoders_have_as_many_parameters(
    mode: str, stage: str, default: tuple[str, ...], zipformer: tuple[str, ...], tmp_path: Path
) -> None:
    Characters(list(" 'abcdefghijklmnopqrstuvwxyz")).save(tmp_path / "tokens.txt")
    of_stage = {
        "pretrain": ("data.labels=[units]", "objective.classes=[200]"),
        "finetune": (f"objective.tokenizer={tmp_path / 'tokens.txt'}",),
    }
    counts = [
        parameters(CONF / mode / f"{stage}.yaml", *(CONF / name for name in more), overrides=of_stage[stage])
        for more in (default, zipformer)
    ]
    print(f"{mode} {stage} {' '.join(zipformer)}: default {counts[0]:,}, Zipformer {counts[1]:,}")
    assert abs(counts[1] / counts[0] - 1) < 0.03, counts
