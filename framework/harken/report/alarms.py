"""Alarms over a run's records, once more: which would have rung, with the run's limits or with others."""

from __future__ import annotations

from dataclasses import dataclass

from harken.config.schema import HealthConfig
from harken.report.metrics import Metrics
from harken.train.health import Trouble, look
from harken.train.state import TrainState


@dataclass(frozen=True)
class Replay:
    """What the records of a run say. rung: alarms that ring, training's first. records, judged: by kind (`train`,
    `valid`) how many there are, and how many of them come after `health.after_steps`, where all alarms are in force.
    """

    rung: list[Trouble]
    records: dict[str, int]
    judged: dict[str, int]


def replay(metrics: Metrics, config: HealthConfig) -> Replay:
    """Hold all records of a run against the alarms, as training does."""
    kinds = {"train": metrics.train, "valid": metrics.valid}
    state, rung = TrainState(), []
    for kind, records in kinds.items():
        for record in records:
            state.step = record["step"]
            rung += look(config, kind, record, state)
    judged = {kind: sum(one["step"] > config.after_steps for one in records) for kind, records in kinds.items()}
    return Replay(rung, {kind: len(records) for kind, records in kinds.items()}, judged)
