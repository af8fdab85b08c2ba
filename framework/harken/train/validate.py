"""The loss and metrics over a validation manifest."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from harken.core import progress
from harken.core.batch import Batch, Note
from harken.engine.base import Engine
from harken.train.metrics import Meter


def validate(engine: Engine, batches: Iterable[tuple[Batch, bool]]) -> tuple[dict[str, float], list[Note]]:
    """Return the metrics of a loader's batches over all ranks, and this rank's notes of the batches that count.

    Masks are the same at every validation.
    """
    progress.note("validate")
    meter, notes = Meter(), list[Note]()
    training = engine.model.training
    engine.model.eval()
    with torch.no_grad():
        for batch, counts in batches:
            progress.note("validate", ids=batch.ids)
            loss = engine(batch)
            if counts:
                meter.add(loss.metrics)
                notes += batch.notes
    engine.model.train(training)
    return meter.read(), notes
