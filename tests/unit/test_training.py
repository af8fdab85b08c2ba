"""What a run keeps, when it ends, what it logs, what it goes on with: checkpoints, patience, figures, rates."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harken.config.saved import find_model
from harken.core.batch import Batch
from harken.train import speed
from harken.train.signals import StopRequest
from harken.train.speed import Speedometer


def folders(exp: Path) -> list[str]:
    return sorted(path.name for path in (exp / "checkpoints").glob("step-*"))


def state_of(exp: Path) -> dict[str, Any]:
    return json.loads((max((exp / "checkpoints").glob("step-*")) / "state.json").read_text())


def best_of(exp: Path) -> list[tuple[str, float]]:
    entries = json.loads((exp / "checkpoints/best.json").read_text())
    return [(entry["folder"], entry["score"]) for entry in entries]


def validated(corpus, *more: str) -> tuple[str, ...]:
    return (f"data.valid={corpus.valid}", "train.valid_every_steps=1", *more)


@pytest.mark.parametrize(("flags", "expected"), [((), 0), (("--fail-when-stopped",), 75)])
def test_a_stopped_run_can_be_told_from_a_finished_one(train, monkeypatch, flags, expected: int) -> None:
    monkeypatch.setattr(StopRequest, "agreed", lambda self: True)
    status, out, _ = train("hubert", *flags, steps=3)
    assert status == expected
    assert "asked to stop: saved step 1; the same command continues from there" in out
    monkeypatch.undo()
    assert train("hubert", *flags, steps=3)[0] == 0


def test_a_run_out_of_patience_stops_and_stays_stopped(train, corpus, tmp_path: Path) -> None:
    # a learning rate too small to change a weight: no validation is better than the first
    settings = validated(corpus, "schedule.rate=1e-30", "train.patience=2")
    status, out, _ = train("hubert", *settings, steps=8)
    assert status == 0
    assert "no better `loss` in 2 validations: stopping at step 3" in out
    before = folders(tmp_path / "exp")
    status, out, _ = train("hubert", *settings, steps=8)
    assert status == 0
    assert f"{tmp_path}/exp stopped early at step 3: nothing to do; `train.patience` above 2, or 0, goes on\n" in out, (
        out
    )
    assert folders(tmp_path / "exp") == before
    _, out, _ = train("hubert", *settings, "train.patience=4", steps=8)
    assert "continuing from" in out
    assert "no better `loss` in 4 validations: stopping at step 5" in out


def test_the_best_and_the_last_checkpoints_are_kept(train, corpus, tmp_path: Path, scores) -> None:
    scores(4.0, 2.0, 3.0, 2.5, 5.0, 6.0)
    keep = ("checkpoint.keep_best=2", "checkpoint.keep_last=1")
    assert train("hubert", *validated(corpus, *keep), steps=6)[0] == 0
    exp = tmp_path / "exp"
    assert best_of(exp) == [("step-00000002", 2.0), ("step-00000004", 2.5)]
    assert folders(exp) == ["step-00000002", "step-00000004", "step-00000006"]
    assert find_model(exp).name == "step-00000002"
    assert state_of(exp)["validations_without_best"] == 4


def test_keep_last_counts_the_newest(train, tmp_path: Path) -> None:
    train("hubert", "checkpoint.every_steps=1", "checkpoint.keep_last=3", steps=5)
    assert folders(tmp_path / "exp") == ["step-00000003", "step-00000004", "step-00000005"]
    assert best_of(tmp_path / "exp") == []
    assert find_model(tmp_path / "exp").name == "step-00000005"


@pytest.mark.parametrize(
    ("higher", "values", "best"),
    [
        ("false", (math.nan, 3.0, 2.0, -math.inf, 2.5), [("step-00000003", 2.0), ("step-00000005", 2.5)]),
        ("true", (math.nan, 0.1, 0.3, math.inf, 0.2), [("step-00000003", 0.3), ("step-00000005", 0.2)]),
    ],
)
def test_a_score_that_is_not_finite_is_never_best(
    train, corpus, tmp_path: Path, scores, higher: str, values, best
) -> None:
    scores(*values)
    keep = ("checkpoint.keep_best=2", "checkpoint.keep_last=1", f"checkpoint.higher_is_better={higher}")
    status, out, _ = train("hubert", *validated(corpus, *keep), steps=5)
    assert status == 0
    assert "WARNING `loss` of the validation at step 1 is nan: it is not counted as a best one" in out
    assert out.count("it is not counted as a best one") == 2
    assert best_of(tmp_path / "exp") == best
    assert state_of(tmp_path / "exp")["best_score"] == best[0][1]


def test_scores_that_are_not_finite_use_patience_up(train, corpus, scores) -> None:
    scores(*[math.nan] * 5)
    _, out, _ = train("hubert", *validated(corpus, "train.patience=2"), steps=5)
    assert "no better `loss` in 2 validations: stopping at step 2" in out


def test_tensorboard_holds_what_metrics_jsonl_holds(train, corpus, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("hubert", *validated(corpus), "log.tensorboard=true", "log.every_steps=1", steps=3)
    board = EventAccumulator(str(tmp_path / "exp/tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    rows = [json.loads(line) for line in (tmp_path / "exp/metrics.jsonl").read_text().splitlines()]
    about = {"kind", "step", "time", "epoch", "hours", "wall"}
    expected = {
        (f"{row['kind']}/{name}", row["step"]): value
        for row in rows
        for name, value in row.items()
        if name not in about
    }
    found = {(tag, event.step): event.value for tag in board.Tags()["scalars"] for event in board.Scalars(tag)}
    assert found == pytest.approx(expected, rel=1e-6)
    assert {("train/loss", 1), ("valid/loss", 3), ("train/mfu_percent", 2)} <= found.keys()


def test_the_speedometers_figures_from_known_numbers(monkeypatch) -> None:
    now = [110.0]
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    meter = Speedometer(sample_rate=100, peak=2.0, started=100.0, waited=2.0, updated=0.4, logged=0.08, excluded=2.0)
    # 4.5 s of audio in 6 s with padding; 10 s have passed, 2 of them for validation: 8 s
    meter.add(Batch(ids=("a", "b"), inputs=torch.zeros(2, 300), lengths=torch.tensor([300, 150])), flops=4e12)
    figures = meter.read()
    assert figures.pop("memory_gib") > 0
    assert figures == pytest.approx(
        {
            "audio_seconds_per_second": 4.5 / 8,
            "padding_percent": 25.0,
            "data_wait_percent": 25.0,
            "update_percent": 5.0,
            "logging_percent": 1.0,
            "mfu_percent": 25.0,
        }
    )
    now[0] = 120.0
    meter.add(Batch(ids=("a",), inputs=torch.zeros(1, 500), lengths=torch.tensor([500])), flops=0.0)
    assert meter.read() == {
        "audio_seconds_per_second": pytest.approx(0.5),
        "padding_percent": 0.0,
        "data_wait_percent": 0.0,
        "update_percent": 0.0,
        "logging_percent": 0.0,
        "mfu_percent": 0.0,
        "memory_gib": pytest.approx(speed.memory_gib()),
    }, "the second interval begins anew"


def test_a_peak_that_a_run_exceeds_is_measured_again(monkeypatch) -> None:
    now, measured = [108.0], iter([1.5, 5.0])
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    meter = Speedometer(sample_rate=100, peak=2.0, measure=lambda: next(measured), started=100.0)

    def mfu(tera: float) -> float:
        meter.add(Batch(ids=("a",), inputs=torch.zeros(1, 100), lengths=torch.tensor([100])), flops=tera * 1e12)
        return meter.read()["mfu_percent"]

    assert mfu(8.0) == pytest.approx(50.0), "below it: the peak stands"
    now[0] = 116.0
    assert mfu(24.0) == pytest.approx(150.0), "still busy: a lower figure is not taken"
    now[0] = 124.0
    assert mfu(24.0) == pytest.approx(60.0)
    assert meter.peak == 5.0
    now[0] = 132.0
    assert mfu(40.0) == pytest.approx(100.0), "at it: not measured again"


def test_a_peak_is_that_of_the_fastest_product(monkeypatch) -> None:
    rates = {512: 0.25, 1024: 0.5}
    monkeypatch.setattr(speed, "_measured", lambda size, device, dtype: rates[size])
    assert speed.peak_tflops(torch.float32) == 0.5
    monkeypatch.undo()
    seconds = iter([0.0, 0.0, 4.0, 4.0, 6.0, 6.0, 9.0, 9.0, 12.0, 12.0, 15.0, 15.0])
    monkeypatch.setattr(speed, "_MEASURED_SECONDS", 0.0)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    assert speed._measured(8, torch.device("cpu"), torch.float32) == pytest.approx(2 * 8**3 / 2 / 1e12)


def test_ctc_scales_the_rates_as_configured(corpus) -> None:
    from harken.objectives.saved import build_objective

    settings = ("objective.freeze_steps=5", "objective.layer_decay=0.5", "objective.head_rate=3.0")
    model = build_objective(corpus.config("ctc", "filterbank", *settings))
    frozen = build_objective(corpus.config("ctc", "filterbank", *settings, "objective.freeze_frontend=true"))
    names = [name for name, _ in model.named_parameters()]
    expected = {"head.": 3.0, "backbone.encoder.blocks.1.": 1.0, "backbone.encoder.blocks.0.": 0.5}
    expected["backbone.frontend."] = 0.5**3
    for prefix, rate in expected.items():
        matching = [name for name in names if name.startswith(prefix)]
        assert matching, prefix
        for name in matching:
            assert model.rate_scale(name, 4) == (3.0 if prefix == "head." else 0.0), name
            assert model.rate_scale(name, 5) == rate, name
            assert frozen.rate_scale(name, 5) == (0.0 if prefix == "backbone.frontend." else rate), name


def test_a_frozen_backbone_does_not_move_until_its_step(train, tmp_path: Path) -> None:
    settings = ("objective.freeze_steps=2", "objective.freeze_frontend=true", "checkpoint.every_steps=1")
    train("ctc", *settings, "checkpoint.keep_last=3", steps=3)
    steps = [load_file(tmp_path / f"exp/checkpoints/step-0000000{step}/model.safetensors") for step in (1, 2, 3)]

    def moved(step: int, prefix: str) -> set[bool]:
        return {
            not torch.equal(steps[step][name], steps[step - 1][name])
            for name in steps[0]
            if name.startswith(prefix) and name.endswith("weight")
        }

    assert moved(1, "head.") == moved(2, "head.") == {True}
    assert moved(1, "backbone.") == {False}
    assert moved(2, "backbone.frontend.") == {False}
    assert True in moved(2, "backbone.encoder.")


@pytest.fixture
def other_labels(corpus, tmp_path: Path) -> Path:
    """Labels of the same cuts by another clusterer of the same size."""
    from functools import partial

    from harken.config.schema import DataConfig
    from harken.units.clusterer import fit_clusterer
    from harken.units.features import Mfcc, make_features
    from harken.units.kmeans import KMeansConfig
    from harken.units.label import Job, label
    from harken.units.store import LabelStore

    clusterer, store = tmp_path / "other-clusterer", tmp_path / "other-labels"
    old = LabelStore(corpus.labels)
    config = KMeansConfig(clusters=old.card.clusters, seed=99)
    data = DataConfig(train=str(corpus.train), workers=0)
    fit_clusterer(clusterer, str(corpus.train), Mfcc(), data, config, max_frames=10_000, say=lambda _: None)
    manifests = (str(corpus.train), str(corpus.valid))
    label(Job(store, manifests, str(clusterer), partial(make_features, "mfcc"), 16000, 60.0), 1, lambda _: None)
    new = LabelStore(store)
    assert (new.ids, new.card.clusters, new.card.labels) == (old.ids, old.card.clusters, old.card.labels)
    return store


def test_a_run_does_not_go_on_with_labels_of_another_clusterer(
    train, corpus, tmp_path: Path, other_labels: Path
) -> None:
    assert train("hubert")[0] == 0
    status, _, error = train("hubert", f"data.labels=[{other_labels}]", steps=4)
    assert status == 2
    (line,) = error.splitlines()
    assert line.startswith(
        f"harken train: `data.labels[0]` is not what {tmp_path}/exp/checkpoints/step-00000002 was trained with: "
        "that was 12 clusters "
    )
    assert line.endswith("give it the old one, or start another `--exp` from its weights with `train.init_from`")
    moved = tmp_path / "moved"
    moved.symlink_to(corpus.labels)
    assert train("hubert", f"data.labels=[{moved}]", steps=4)[0] == 0, "where they are does not matter"


def test_a_run_does_not_go_on_with_another_tokenizer(train, corpus, tmp_path: Path) -> None:
    assert train("ctc")[0] == 0
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("".join(reversed(corpus.tokens.read_text().splitlines(keepends=True))))
    status, _, error = train("ctc", f"objective.tokenizer={tokens}", steps=4)
    assert status == 2
    assert "harken train: `objective.tokenizer` is not what " in error
    assert "was trained with: that was sha256 " in error
    tokens.write_bytes(corpus.tokens.read_bytes())
    assert train("ctc", f"objective.tokenizer={tokens}", steps=4)[0] == 0


@pytest.mark.parametrize(("saved", "asked"), [(0, 2), (2, 0)])  # DeepSpeed changes torch for good with ZeRO 3
def test_a_run_goes_on_with_another_zero_stage(train, tmp_path: Path, saved: int, asked: int) -> None:
    assert train("ctc", f"engine.zero_stage={saved}", steps=2)[0] == 0
    status, out, error = train("ctc", f"engine.zero_stage={asked}", steps=3)
    assert (status, error) == (0, "")
    assert f"continuing from {tmp_path}/exp/checkpoints/step-00000002: step 2" in out
    assert train("ctc", f"engine.zero_stage={saved}", steps=3, exp="whole")[0] == 0
    for file in ("model.safetensors", "optimizer.safetensors"):
        found, expected = (load_file(find_model(tmp_path / exp) / file) for exp in ("exp", "whole"))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-5), name


def test_a_run_goes_on_with_the_loss_scale_of_fp16(train, tmp_path: Path) -> None:
    settings = ("engine.precision=fp16", "objective.penalty_weight=10000.0")
    assert train("hubert", *settings, steps=8, exp="whole")[0] == 0
    for steps in (5, 8):
        assert train("hubert", *settings, steps=steps)[0] == 0
    whole, halves = (
        json.loads((find_model(tmp_path / exp) / "optimizer.json").read_text()) for exp in ("whole", "exp")
    )
    assert whole["loss_scaler"]["scale"] < 65536, "the first steps overflow"
    assert halves == whole
    assert state_of(tmp_path / "exp")["skipped_steps"] == state_of(tmp_path / "whole")["skipped_steps"]


def test_a_step_that_fp16_overflows_is_skipped_aloud_and_seen(train, tmp_path: Path) -> None:
    """The first loss is scaled by 65536: gradients this large overflow until the scale has been lowered."""
    large = "objective.penalty_weight=10000.0"
    settings = ("engine.precision=fp16", "train.ema_decay=0.9", "log.every_steps=1", large)
    status, out, _ = train("hubert", *settings, steps=8)
    assert status == 0
    rows = [json.loads(line) for line in (tmp_path / "exp/metrics.jsonl").read_text().splitlines()]
    norms = [row["gradient_norm"] for row in rows]
    skipped = [row["step"] for row in rows if not math.isfinite(row["gradient_norm"])]
    assert 0 < len(skipped) < 8, norms
    for step in skipped:
        assert f"WARNING step {step} skipped: its gradient is not finite; every loss is finite" in out
    assert state_of(tmp_path / "exp")["skipped_steps"] == len(skipped) == out.count("skipped: its gradient")
    average = load_file(find_model(tmp_path / "exp") / "average.safetensors")
    assert int(average["#updates"]) == 8 - len(skipped), "a skipped step is not averaged"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("engine.precision=fp16", "engine.zero_stage=1"), "`engine.precision: fp16` needs `engine.zero_stage: 0`"),
        (
            ("engine.zero_stage=1", "engine.deepspeed.zero_optimization.compute_grad_norm=false"),
            "`engine.deepspeed.zero_optimization.compute_grad_norm` must be true, got false",
        ),
    ],
)
def test_settings_under_which_bad_steps_would_be_taken_are_refused(train, settings, words: str) -> None:
    status, _, error = train("ctc", *settings)
    assert status == 2
    assert words in error
