"""Alarms: what the figures of a run say about it once training has gone wrong without an error.

An alarm reads metrics by name, whichever objective reports them, so a new objective has it by reporting the metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harken.config.schema import HealthConfig
from harken.core import distributed
from harken.core.batch import Batch, real_mask
from harken.core.rank import effective_rank
from harken.train.state import TrainState


@dataclass(frozen=True)
class Alarm:
    """A failure with a name. metric: of the log. limit: the field of `health` it is held against.

    above: whether the metric fails above its limit rather than below. at_start: whether the first `health.after_steps`
    count, in which some figures of sound runs look like failures. meaning, advice: what the user is told.
    """

    name: str
    metric: str
    limit: str
    meaning: str
    advice: str
    above: bool = False
    at_start: bool = False

    def wrong(self, value: float, config: HealthConfig) -> bool:
        """Whether a figure is beyond its limit; one that is not a number is not: skipped steps speak for it."""
        limit = float(getattr(config, self.limit))
        return value > limit if self.above else value < limit


ALARMS = (
    Alarm(
        name="codebook collapse",
        metric="codebook_perplexity",
        limit="min_perplexity",
        meaning="nearly all frames have the same code, so predicting it teaches nothing",
        advice="lower `schedule.peak`, lengthen the warm-up, or raise the weight of the diversity loss; codes of a "
        "random projection do not learn: there, look for silent or constant audio with `harken data verify`",
    ),
    Alarm(
        name="labels degenerate",
        metric="label_perplexity",
        limit="min_perplexity",
        meaning="nearly all frames have the same label, so predicting it teaches nothing",
        advice="look at the labels with `harken units check`; label again from another layer or with more clusters",
        at_start=True,
    ),
    Alarm(
        name="one prediction",
        metric="prediction_perplexity",
        limit="min_perplexity",
        meaning="the model predicts the same label for nearly every masked frame, whatever it hears around it",
        advice="train longer where the loss still falls; else lengthen the warm-up or change `schedule.peak`, and of "
        "BEATs set `objective.decoder_position_kernel`, without which masked tokens begin alike",
    ),
    Alarm(
        name="frontend collapsed",
        metric="rank_frontend",
        limit="min_rank",
        meaning="the frontend's frames of the probe batch hardly differ, so the encoder hears nothing",
        advice="look for silent or constant audio with `harken data verify`; lower the frontend's rate in "
        "`train.rate_scales`, or lengthen the warm-up",
    ),
    Alarm(
        name="encoder collapsed",
        metric="rank_encoder",
        limit="min_rank",
        meaning="the encoder's outputs of the probe batch hardly differ from frame to frame",
        advice="lower `schedule.peak` or lengthen the warm-up",
    ),
    Alarm(
        name="loss scale loop",
        metric="skipped_share",
        limit="max_skipped_share",
        meaning="so many steps are skipped, their gradient not finite, that the loss scale rises only to fall again",
        advice="use `engine.precision: bf16`, lower `schedule.peak`, or look at the cuts that the warnings name",
        above=True,
    ),
    Alarm(
        name="CTC blank only",
        metric="blank_share",
        limit="max_blank_share",
        meaning="the model writes nothing: the most probable token of nearly every frame is the blank",
        advice="train longer or raise the rate where the loss still falls; else check that transcripts belong to "
        "their cuts (`harken data check`) and that the encoder's weights were loaded (`train.init_from`)",
        above=True,
    ),
)


@dataclass(frozen=True)
class Trouble:
    """An alarm that rings. since: the step of the last good record, or the one before the first bad one where there was
    no good one. text: what to tell.
    """

    alarm: Alarm
    since: int
    text: str


def look(config: HealthConfig, kind: str, figures: Mapping[str, float], state: TrainState) -> list[Trouble]:
    """Hold a record of the log, of a kind (`train` or `valid`), against the alarms; return those that ring.

    One rings at the `health.records`-th bad record in a row, and again only after a good one. What is counted is kept
    in `state.bad_records`, so that a run that continues counts on. Every rank sees the same figures and decides the
    same.
    """
    troubles = []
    for alarm in ALARMS:
        if alarm.metric not in figures:
            continue
        key = f"{kind}: {alarm.name}"
        value = figures[alarm.metric]
        early = not alarm.at_start and not config.all_judged(state.step)
        if early or not alarm.wrong(value, config):
            state.bad_records.pop(key, None)
            if math.isfinite(value):
                state.good_records[key] = state.step
            continue
        first, count = state.bad_records.get(key, [state.step, 0])
        state.bad_records[key] = [first, count + 1]
        if count + 1 == config.records:
            text = _tell(config, alarm, kind, value, first, state.step)
            troubles.append(Trouble(alarm, state.last_good(key), text))
    return troubles


def _tell(config: HealthConfig, alarm: Alarm, kind: str, value: float, first: int, step: int) -> str:
    limit = getattr(config, alarm.limit)
    expected = f"{'at most' if alarm.above else 'at least'} `health.{alarm.limit}` {limit:g}"
    return (
        f"alarm `{alarm.name}` at step {step}: {alarm.meaning} (`{alarm.metric}` in {config.records} "
        f"{kind} record(s) since step {first}, now {value:.4g}, expected {expected}); {alarm.advice}"
    )


def probe_ranks(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Return the effective rank of a model's frontend and encoder on a fixed batch without masks, a mean over ranks.

    Every rank calls it, with a batch of its own; the model needs a `backbone` (`harken.objectives.base.Objective`).
    """
    backbone = model.get_submodule("backbone")
    frontend = backbone.get_submodule("frontend")
    seen: list[tuple[Tensor, Tensor]] = []
    hook = frontend.register_forward_hook(lambda *call: seen.append(call[2]))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            encoded = backbone(batch.inputs.to(next(model.parameters()).device), batch.lengths)
    finally:
        hook.remove()
        model.train(training)
    outputs = {"rank_frontend": seen[0], "rank_encoder": (encoded.last, encoded.lengths)}
    ranks = [
        effective_rank(frames[real_mask(lengths, frames.shape[1], frames.device)])
        for frames, lengths in outputs.values()
    ]
    sums = distributed.sum_over_ranks(ranks)
    return {name: total / distributed.world_size() for name, total in zip(outputs, sums, strict=True)}
