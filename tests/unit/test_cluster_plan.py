"""`harken plan` against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harken.apps.main import main
from harken.cluster.plan import make_plan
from harken.config.load import load

HUBERT = ["hubert_base", "data.train=t", "data.labels=[l]", "objective.classes=[500]"]


def test_hubert_base_is_planned_as_its_paper_trained_it(capsys) -> None:
    """32 GPUs, 87.5 s each: arXiv 2106.07447 section IV-C; Base has 95 million parameters (table I)."""
    assert main(["plan", *HUBERT, "train.steps=250000", "--hours", "960", "--gpus", "32", "--tflops", "40"]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    values = {name: rest.strip() for name, rest in rows.items()}
    millions = float(values["model"].partition("M")[0])
    assert 90 < millions < 98
    assert values["steps"] == "250000, of 87.5 s of audio on each of 32 GPUs"
    assert values["micro-batches"] == "1 of each GPU a step"
    assert values["audio trained on"] == "194,444 h: 202.55 times the 960 h"
    assert values["audio"] == "61 GB as FLAC"
    assert values["labels"] == "0.35 GB at 50 a second"
    each = millions * 12 / 1000
    assert values["checkpoints"].startswith(f"{3 * each:.1f} GB: {each:.2f} GB each")


def test_time_and_memory_follow_the_devices() -> None:
    config = load(["hubert_base"], HUBERT[1:]).config
    hours = config.train.steps * config.batch.seconds_per_step / 3600
    plan = make_plan(config, corpus_hours=100, gpus=10, parameters=10**9, flops=1e12, tflops=100.0)
    assert plan.wall_hours == pytest.approx(hours / 1000), "a second of audio takes a thousandth of a second"
    assert plan.device_gb == 16
    memory = {}
    for stage in (1, 2, 3):
        changed = replace(config, engine=replace(config.engine, zero_stage=stage))
        memory[stage] = make_plan(
            changed, corpus_hours=100, gpus=10, parameters=10**9, flops=1e12, tflops=None
        ).device_gb
    assert memory == pytest.approx({1: 8.8, 2: 5.2, 3: 1.6})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hours", "0", "--gpus", "8"], "`--hours`, `--gpus` and `--tflops` must be positive, got 0, 8 and none"),
        (["--hours", "9", "--gpus", "8", "--cut-seconds", "-1"], "`--cut-seconds` must be positive, got -1"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys) -> None:
    assert main(["plan", *HUBERT, *arguments]) == 2
    assert message in capsys.readouterr().err
