"""Labels a manifest in processes of its own, so that a test can end them. usage: worker_label.py JOB.json"""

from __future__ import annotations

import functools
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.units.features import Features, Frames, make_features
from harken.units.label import Job, label


class Slow:
    """Features that leave time to be interrupted."""

    def __init__(self, features: Features) -> None:
        self.features, self.describe = features, features.describe
        self.spec, self.rows = features.spec, features.rows

    def __call__(self, batch: Batch) -> list[Frames]:
        time.sleep(0.05)
        return self.features(batch)


def slow_features(kind: str, *, fail: bool = False, **settings: Any) -> Slow:
    """Make features; `fail` refuses to in the workers."""
    if fail and multiprocessing.parent_process() is not None:
        raise HarkenError("this worker has no features")
    return Slow(make_features(kind, **settings))


def main(path: Path) -> None:
    data = json.loads(path.read_text())
    job = Job(
        Path(data["out"]),
        (data["manifest"],),
        data["clusterer"],
        functools.partial(slow_features, **data["features"]),
        16000,
        data["max_seconds"],
    )
    try:
        label(job, data["processes"], print)
    except HarkenError as error:  # as the command line does
        print(error)
        sys.exit(2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
