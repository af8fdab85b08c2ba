"""Alarms: each is rung by the failure it is named after, none by a sound run; what they do; effective rank."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harken.apps.main import main
from harken.config.schema import HealthConfig
from harken.core.rank import effective_rank
from harken.objectives.beats import Beats
from harken.objectives.bestrq import Bestrq
from harken.objectives.ctc import Ctc
from harken.objectives.hubert import Hubert
from harken.train import loop
from harken.train.health import ALARMS, look
from harken.train.state import TrainState
from harken.units.product_quantizer import ProductQuantizer

CODES = ("data.labels=[]", "objective.bands=20")
EAGER = ("health.after_steps=0", "health.records=2", "log.every_steps=1", "train.valid_every_steps=1")


def rows(exp: Path, kind: str) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


@pytest.mark.parametrize("objective", ["hubert", "wav2vec2", "data2vec", "data2vec_aqc", "unispeech_sat"])
def test_no_alarm_rings_in_a_sound_run(train, corpus, tmp_path: Path, objective: str) -> None:
    # of six entries the first steps of a quantiser of hidden states use hardly two
    more = ("objective.entries=24",) if objective == "unispeech_sat" else ()
    status, out, error = train(objective, *EAGER, f"data.valid={corpus.valid}", *more, steps=4)
    assert status == 0, error
    assert "alarm" not in out
    found = rows(tmp_path / "exp", "valid")
    assert len(found) == 4
    assert all(1.5 < row["rank_frontend"] <= 24 and 1.5 < row["rank_encoder"] <= 32 for row in found)


def constant_frontend(monkeypatch) -> None:
    from harken.frontends.filterbank import Filterbank

    before = Filterbank.forward

    def forward(self, *args, **more):
        frames, lengths = before(self, *args, **more)
        return 0.0 * frames + 3.0, lengths

    monkeypatch.setattr(Filterbank, "forward", forward)


def one_label(monkeypatch) -> None:
    from harken.objectives.hubert import HubertPrepare

    before = HubertPrepare.__call__

    def call(self, batch, draws):
        batch = before(self, batch, draws)
        batch.targets["labels"].zero_()
        return batch

    monkeypatch.setattr(HubertPrepare, "__call__", call)


def one_code(monkeypatch) -> None:
    before = ProductQuantizer.__init__

    def init(self, *args, **more):
        before(self, *args, **more)
        with torch.no_grad():
            self.logits.weight.zero_()
            self.logits.bias.zero_()
            self.logits.bias[:: self.entries] = 50.0

    monkeypatch.setattr(ProductQuantizer, "__init__", init)


def one_guess(monkeypatch) -> None:
    for kind, head in ((Hubert, "project"), (Bestrq, "head"), (Beats, "decoder.leave")):

        def init(self, *args, before=kind.__init__, head=head, **more):
            before(self, *args, **more)
            last = self.get_submodule(head)
            with torch.no_grad():
                last.weight.zero_()
                last.bias.normal_()

        monkeypatch.setattr(kind, "__init__", init)


def blanks(monkeypatch) -> None:
    before = Ctc.__init__

    def init(self, *args, **more):
        before(self, *args, **more)
        with torch.no_grad():
            self.head.bias[0] = 50.0

    monkeypatch.setattr(Ctc, "__init__", init)


def overflow(monkeypatch) -> None:
    before = Hubert.forward
    calls = iter(range(10**6))

    def forward(self, batch):
        loss = before(self, batch)
        if self.training and next(calls) % 16 < 8:  # every other step of eight micro-batches
            loss = replace(loss, total=loss.total * float("inf"))
        return loss

    monkeypatch.setattr(Hubert, "forward", forward)


@pytest.mark.parametrize(
    ("name", "objective", "break_it", "more"),
    [
        ("frontend collapsed", "hubert", constant_frontend, ()),
        ("labels degenerate", "hubert", one_label, ()),
        ("codebook collapse", "wav2vec2", one_code, ()),
        ("codebook collapse", "data2vec_aqc", one_code, ()),
        ("codebook collapse", "unispeech_sat", one_code, ()),
        ("one prediction", "hubert", one_guess, ()),
        ("one prediction", "hubert", one_guess, (*CODES, "objective.name=bestrq", "objective.codes=24")),
        ("one prediction", "hubert", one_guess, (*CODES, "objective.name=beats", "objective.decoder_heads=4")),
        ("CTC blank only", "ctc", blanks, ()),
        ("loss scale loop", "hubert", overflow, ("log.every_steps=2",)),
    ],
)
def test_each_failure_rings_its_alarm_within_four_steps(
    train, corpus, monkeypatch, name: str, objective: str, break_it, more: tuple[str, ...]
) -> None:
    break_it(monkeypatch)
    status, out, error = train(
        objective, *EAGER, f"data.valid={corpus.valid}", "data.workers=0", "schedule.rate=1e-6", *more, steps=4
    )
    assert status == 0, error
    assert f"WARNING alarm `{name}` at step " in out, out
    assert next(alarm.advice for alarm in ALARMS if alarm.name == name) in out


def test_a_collapsed_encoder_rings_its_alarm(train, corpus, monkeypatch) -> None:
    monkeypatch.setattr(loop, "probe_ranks", lambda model, batch: {"rank_frontend": 9.0, "rank_encoder": 1.1})
    _, out, _ = train("hubert", *EAGER, f"data.valid={corpus.valid}", steps=2)
    assert "WARNING alarm `encoder collapsed` at step 2" in out
    assert "`rank_encoder` in 2 valid record(s) since step 1, now 1.1, expected at least `health.min_rank` 1.5" in out


def test_an_alarm_ends_the_run_where_asked(train, monkeypatch) -> None:
    one_label(monkeypatch)
    status, _, error = train("hubert", *EAGER, "data.workers=0", "health.action=stop", steps=4)
    assert status == 2
    assert "alarm `labels degenerate` at step 2: nearly all frames have the same label" in error
    assert "`health.action: stop` ends the run" in error


def test_an_alarm_rolls_back_to_before_it(train, corpus, monkeypatch, tmp_path: Path) -> None:
    found = iter([9.0, 9.0, 1.1, 1.1, 9.0, 9.0, 9.0, 9.0])
    monkeypatch.setattr(loop, "probe_ranks", lambda model, batch: {"rank_frontend": 9.0, "rank_encoder": next(found)})
    more = (f"data.valid={corpus.valid}", "health.action=roll_back", "checkpoint.keep_last=9")
    status, out, error = train("hubert", *EAGER, *more, steps=5)
    assert status == 0, error
    assert "rolled back to" in out
    assert "step-00000002 (1 of at most 3 times); steps 3 to 4 are taken again" in out
    assert [row["step"] for row in rows(tmp_path / "exp", "valid")] == [1, 2, 3, 4, 3, 4, 5]


def test_the_records_of_a_run_ring_its_alarms_once_more(train, corpus, monkeypatch, tmp_path: Path, capsys) -> None:
    one_guess(monkeypatch)
    _, out, _ = train("hubert", *EAGER, f"data.valid={corpus.valid}", "data.workers=0", steps=4)
    rung = [line.split("WARNING ")[1] for line in out.splitlines() if "WARNING alarm" in line]
    assert len(rung) == 2, "in training and in validation"
    exp = str(tmp_path / "exp")
    assert main(["alarms", exp]) == 1
    *found, judged = capsys.readouterr().out.splitlines()
    assert sorted(found) == sorted(rung)
    assert judged.startswith("4 of 4 train records and 4 of 4 valid records are from after step 0")
    assert main(["alarms", exp, "health.min_perplexity=1"]) == 0
    assert capsys.readouterr().out.endswith("no alarm rings\n")
    assert main(["alarms", exp, "health.after_steps=3"]) == 0
    assert "1 of 4 train records and 1 of 4 valid records" in capsys.readouterr().out


def test_only_a_run_has_records_and_only_limits_can_be_others(train, tmp_path: Path, capsys) -> None:
    assert main(["alarms", str(tmp_path)]) == 2
    assert "must be the folder of a training run" in capsys.readouterr().err
    train("hubert", steps=1)
    assert main(["alarms", str(tmp_path / "exp"), "train.steps=3"]) == 2
    assert "takes keys of `health` alone, got `train.steps=3`" in capsys.readouterr().err


def test_what_an_alarm_would_go_back_to_is_kept(train, corpus, monkeypatch, tmp_path: Path) -> None:
    """Three bad validations save three checkpoints, of which two are kept: none from before without the fourth."""
    found = iter([9.0, 9.0, 1.1, 1.1, 1.1, *[9.0] * 5])
    monkeypatch.setattr(loop, "probe_ranks", lambda model, batch: {"rank_frontend": 9.0, "rank_encoder": next(found)})
    more = ("health.action=roll_back", "health.records=3", "checkpoint.keep_last=2", "checkpoint.keep_best=0")
    status, out, error = train("hubert", *EAGER, f"data.valid={corpus.valid}", *more, steps=6)
    assert status == 0, error
    assert "step-00000002 (1 of at most 3 times); steps 3 to 5 are taken again" in out
    assert [row["step"] for row in rows(tmp_path / "exp", "valid")] == [1, 2, 3, 4, 5, 3, 4, 5, 6]
    left = sorted(path.name for path in (tmp_path / "exp/checkpoints").glob("step-*"))
    assert left == ["step-00000005", "step-00000006"], "and no longer than it is needed"


def test_a_model_that_is_not_finite_has_no_rank() -> None:
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.nan], [2.0, 3.0]])))
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.inf], [2.0, 3.0]])))


def test_an_alarm_goes_back_to_its_last_good_record() -> None:
    config, state = HealthConfig(records=2, after_steps=0), TrainState()
    troubles, until = [], []
    for step, value in ((500, 9.0), (1000, 9.0), (1500, 1.0), (2000, 1.0)):
        state.step = step
        troubles += look(config, "valid", {"rank_encoder": value}, state)
        state = TrainState.from_dict(json.loads(json.dumps(state.to_dict())))
        until.append(state.sound_until())
    assert [trouble.since for trouble in troubles] == [1000]
    assert until == [None, None, 1000, 1000]


def test_what_an_alarm_counts_is_in_a_row_and_kept() -> None:
    config, state = HealthConfig(records=2, after_steps=1), TrainState()
    found = []
    for step, value in enumerate([1.0, 1.0, 5.0, 1.0, 1.0, 1.0, float("nan"), 1.0], start=1):
        state.step = step
        found += [(step, trouble.since) for trouble in look(config, "train", {"codebook_perplexity": value}, state)]
        state = TrainState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert found == [(5, 3)]


def test_effective_rank_from_known_spectra() -> None:
    axes = torch.eye(8)[:4]
    even = torch.cat([axes, -axes]) + 7.0  # a mean that all share is no direction
    assert effective_rank(even) == pytest.approx(4.0, rel=1e-6)
    assert effective_rank(torch.cat([even, torch.zeros(8, 8)], 1)) == pytest.approx(
        4.0, rel=1e-6
    )  # fewer rows than columns
    assert effective_rank(torch.full((50, 8), 0.1)) == 1.0
    line = torch.linspace(-1, 1, 20)[:, None] * torch.ones(1, 8)
    assert effective_rank(line) == pytest.approx(1.0, abs=1e-4)
    skewed = torch.cat([3 * axes[:1], -3 * axes[:1], axes[1:2], -axes[1:2]])
    share = torch.tensor([0.75, 0.25])
    assert effective_rank(skewed) == pytest.approx(float((-(share * share.log()).sum()).exp()), rel=1e-6)
