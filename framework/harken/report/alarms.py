"""Alarms over a run's records, once more: which would have rung, with the run's limits or with others."""

from __future__ import annotations

from harken.config.schema import HealthConfig
from harken.report.metrics import Metrics
from harken.train.health import Trouble, look
from harken.train.state import TrainState


def replay(metrics: Metrics, config: HealthConfig) -> list[Trouble]:
    """Hold all records of a run against the alarms, as training does; return those that ring, training's first."""
    state, rung = TrainState(), []
    for kind, records in metrics.kinds.items():
        for record in records:
            state.step = record["step"]
            rung += look(config, kind, record, state)
    return rung
