"""Whether a run's curves stay in the band of a reference, which is made from one or several runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from harken.core.errors import HarkenError
from harken.core.files import write_json_atomic
from harken.report.metrics import Metrics, Record, read_metrics, smooth

SMOOTHED = 25
"""A training loss is a running mean over this part of the run, as in the report: single records are noise."""
ABOUT = {"kind", "step", "time"}


@dataclass(frozen=True, kw_only=True)
class Band:
    """Lowest and highest value of a figure at steps, over the runs of a reference."""

    steps: list[int]
    low: list[float]
    high: list[float]


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """How a curve left its band. share: of the band's steps that the run has reached, 0 when it never left.

    step, value, low, high: where it was farthest outside. excess: by how much, in units of the figure.
    """

    name: str
    share: float
    step: int
    value: float
    low: float
    high: float
    excess: float


def read_run(folder: Path) -> Metrics:
    """Read the curves of a run folder.

    Raises HarkenError when it has none.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise HarkenError(f"{folder} must be the folder of a training run, which holds metrics.jsonl: it does not")
    return read_metrics(path)


def make_reference(runs: Sequence[Path], out: Path) -> dict[str, Band]:
    """Write the bands of runs as JSON: every validation figure, and the training loss, that all of them have.

    Raises HarkenError when they have no figure at a step of the first in common.
    """
    curves = [_curves(read_run(run)) for run in runs]
    bands = {}
    for name, (steps, _) in curves[0].items():
        if not all(name in other for other in curves):
            continue
        last = min(float(other[name][0][-1]) for other in curves)
        steps = steps[steps <= last]
        values = np.stack([np.interp(steps, *other[name]) for other in curves])
        if len(steps):
            low, high = values.min(0).tolist(), values.max(0).tolist()
            bands[name] = Band(steps=[int(step) for step in steps], low=low, high=high)
    if not bands:
        raise HarkenError(f"{', '.join(map(str, runs))} have no figure in common to make a reference of")
    content = {"runs": [run.name for run in runs], "bands": {name: asdict(band) for name, band in bands.items()}}
    write_json_atomic(out, content)
    return bands


def read_reference(path: Path) -> dict[str, Band]:
    """Read what `make_reference` wrote.

    Raises HarkenError when the file is missing or is something else.
    """
    try:
        return {name: Band(**band) for name, band in json.loads(path.read_text(encoding="utf-8"))["bands"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HarkenError(
            f"{path} must be a reference, got {type(error).__name__}: "
            f"make one with `harken compare RUN... --make {path}`"
        ) from error


def compare(run: Path, bands: dict[str, Band], margin: float) -> list[Leaving]:
    """Return for each band how the run's curve left it, as far as the run has come; a band it cannot fill is left out.

    margin: what the band is widened by to both sides, as a share of its middle's size at each step.
    Raises HarkenError when the run has no figure of the reference.
    """
    curves, found = _curves(read_run(run)), []
    for name, band in bands.items():
        if name not in curves:
            continue
        own_steps, own = curves[name]
        steps = np.array(band.steps)
        reached = (steps >= own_steps[0]) & (steps <= own_steps[-1])
        if not reached.any():
            continue
        low, high = np.array(band.low)[reached], np.array(band.high)[reached]
        room = margin * np.abs(low + high) / 2
        values = np.interp(steps[reached], own_steps, own)
        excess = np.maximum(np.maximum(low - room - values, values - high - room), 0.0)
        worst = int(excess.argmax())
        found.append(
            Leaving(
                name=name,
                share=float((excess > 0).mean()),
                step=int(steps[reached][worst]),
                value=float(values[worst]),
                low=float(low[worst] - room[worst]),
                high=float(high[worst] + room[worst]),
                excess=float(excess[worst]),
            )
        )
    if not found:
        raise HarkenError(
            f"{run} has none of the figures of the reference at its steps: {', '.join(bands)}; "
            "train on, or compare with a reference of the same objective"
        )
    return found


Line = tuple[np.ndarray, np.ndarray]


def _curves(metrics: Metrics) -> dict[str, Line]:
    """Return the finite values of the figures by `train/` or `valid/` and their name, with their steps."""
    names = dict.fromkeys(name for record in metrics.valid for name in record if name not in ABOUT)
    lines = {f"valid/{name}": _line(metrics.valid, name, 1) for name in names}
    lines["train/loss"] = _line(metrics.train, "loss", max(1, len(metrics.train) // SMOOTHED))
    return {name: line for name, line in lines.items() if len(line[0])}


def _line(records: Sequence[Record], name: str, width: int) -> Line:
    records = [record for record in records if name in record]
    steps = np.array([record["step"] for record in records], dtype=np.float64)
    values = np.array([record[name] for record in records], dtype=np.float64)
    if width > 1:
        values = smooth(values, width)
    finite = np.isfinite(values)
    return steps[finite], values[finite]
