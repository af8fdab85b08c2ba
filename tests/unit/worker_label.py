"""Labels a manifest in processes of its own, so that a test can end them. usage: worker_label.py JOB.json"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path

from harken.core.batch import Batch
from harken.units.features import Frames, Mfcc
from harken.units.label import Job, label


class SlowMfcc(Mfcc):
    """MFCC that leave time to be interrupted."""

    def __call__(self, batch: Batch) -> list[Frames]:
        time.sleep(0.05)
        return super().__call__(batch)


def main(path: Path) -> None:
    data = json.loads(path.read_text())
    job = Job(
        Path(data["out"]),
        (data["manifest"],),
        data["clusterer"],
        functools.partial(SlowMfcc, 16000),
        16000,
        data["max_seconds"],
    )
    label(job, data["processes"], print)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
