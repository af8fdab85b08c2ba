"""Learning rates: Eden's formula, what the loop gives it, and factors by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harken.config.load import load, to_yaml
from harken.optim.groups import parameter_groups, scaled_by_name
from harken.optim.schedules.eden import Eden, EdenConfig


@pytest.mark.parametrize(
    ("step", "hours", "expected"),
    [
        (0, 0.0, 0.04 * 0.505 * (1 + 4e-8) ** -0.25),  # the first of 100 steps of warm-up, which begins at a half
        (49, 0.0, 0.04 * 0.75 * (1 + 1e-4) ** -0.25),
        (99, 30.0, 0.04 * (1 + 4e-4) ** -0.25 * 2**-0.25),
        (4999, 30.0, 0.04 * 2**-0.5),
        (9999, 90.0, 0.04 * 5**-0.25 * 10**-0.25),
    ],
)
def test_edens_rates_are_those_of_the_formula(step: int, hours: float, expected: float) -> None:
    config = EdenConfig(name="eden", rate=0.04, lr_steps=5000, lr_hours=30, warmup_steps=100)
    assert Eden(config, steps=10)(step, hours) == pytest.approx(expected, rel=1e-12)


def rows(exp: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]


def test_a_run_decays_with_the_audio_it_has_seen_and_goes_on_the_same(train, tmp_path: Path) -> None:
    settings = ("schedule.name=eden", "schedule.rate=1e-3", "schedule.lr_hours=0.01", "schedule.warmup_steps=0")
    settings += ("batch.seconds_per_step=12", "log.every_steps=1")
    assert train("ctc", *settings, steps=6, exp="whole")[0] == 0
    whole = rows(tmp_path / "whole")
    schedule = Eden(EdenConfig(name="eden", rate=1e-3, lr_hours=0.01, warmup_steps=0), steps=6)
    before = [0.0, *(row["hours"] for row in whole)]
    assert [row["learning_rate"] for row in whole] == [schedule(step, before[step]) for step in range(6)]
    assert whole[-1]["learning_rate"] < 0.9e-3
    assert train("ctc", *settings, steps=3, exp="halves")[0] == 0
    assert train("ctc", *settings, steps=6, exp="halves")[0] == 0
    halves = rows(tmp_path / "halves")
    for key in ("step", "learning_rate", "loss"):
        assert [row[key] for row in halves] == [row[key] for row in whole]


def layers() -> torch.nn.Module:
    return torch.nn.ModuleDict({"front": torch.nn.Linear(2, 2), "back": torch.nn.ModuleList([torch.nn.Linear(2, 2)])})


def test_factors_by_name_are_multiplied() -> None:
    scales = {"front": 0.1, "back": {"0": {"bias": 3.0}}, "front.weight": 0.5}
    rate = scaled_by_name(lambda name, step: 2.0, scales, layers())
    names = ["front.weight", "front.bias", "back.0.weight", "back.0.bias"]
    assert [rate(name, 5) for name in names] == pytest.approx([0.1, 0.2, 2.0, 6.0])


def test_a_factor_of_0_freezes() -> None:
    model = layers()
    groups = parameter_groups(model, scaled_by_name(lambda name, step: 1.0, {"front": 0}, model))
    assert [name for group in groups for name in group["names"]] == ["back.0.weight", "back.0.bias"]
    assert not model["front"].weight.requires_grad


def test_factors_scale_what_is_trained(train, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    scales = "train.rate_scales.backbone.frontend=0"
    assert train("hubert", "schedule.rate=1e-30", steps=1, exp="start")[0] == 0
    assert train("hubert", scales, steps=1, exp="moved")[0] == 0
    start, moved = (
        load_file(tmp_path / name / "checkpoints/step-00000001/model.safetensors") for name in ("start", "moved")
    )
    same = {name for name, value in start.items() if torch.allclose(value, moved[name], atol=1e-12)}
    assert same == {name for name in start if name.startswith("backbone.frontend.")}


def test_a_name_of_nothing_is_refused(train) -> None:
    status, _, error = train("hubert", "train.rate_scales.backbone.fronted=0.1")
    assert status == 2
    assert error.endswith(
        "`train.rate_scales` must name parameters or modules of the model, got `backbone.fronted`; "
        "did you mean `backbone.frontend`?\n"
    )


@pytest.mark.parametrize("value", ["-1", "fast", "true", ".inf", ".nan"])
def test_a_factor_is_a_number_of_at_least_0(train, value: str) -> None:
    status, _, error = train("hubert", f"train.rate_scales.backbone.frontend={value}")
    assert status == 2
    assert "`train.rate_scales.backbone.frontend` must be a number of at least 0, got " in error


def test_factors_survive_the_round_trip(corpus, tmp_path: Path) -> None:
    path = corpus.yaml(tmp_path, "hubert", "filterbank")
    (tmp_path / "more.yaml").write_text("train:\n  rate_scales:\n    backbone.frontend: 0.1\n")
    config = load([path, tmp_path / "more.yaml"], ["train.rate_scales.backbone.encoder=0.5"]).config
    assert config.train.rate_scales == {"backbone.frontend": 0.1, "backbone": {"encoder": 0.5}}
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load([tmp_path / "saved.yaml"]).config == config
