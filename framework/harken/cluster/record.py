"""What is known about the jobs of an experiment, kept in `EXP/jobs`: two files a job, each with one writer.

`NAME.json` is written where the job is submitted, `NAME.starts.json` by the job itself: one entry for each time that
Slurm started it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harken.core.errors import HarkenError
from harken.core.files import write_json_atomic


def folder_of(exp: Path) -> Path:
    """Return the folder of an experiment's jobs."""
    return exp / "jobs"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise HarkenError(
            f"{path} must be what harken wrote about a job: {error}; remove it to go on without"
        ) from error


@dataclass(kw_only=True)
class JobRecord:
    """A job as it was submitted. id: Slurm's. after: ids it waits for. submitted: seconds since 1970.

    pieces: tasks of an array, whose own records are those of jobs `NAME-1`, `NAME-2`, ... and ids `ID_1`, `ID_2`, ...
    """

    name: str
    id: str
    after: list[str]
    log: str
    nodes: int
    gpus: int
    submitted: float
    pieces: int = 0

    def save(self, exp: Path) -> None:
        """Write it into the experiment's folder."""
        write_json_atomic(folder_of(exp) / f"{self.name}.json", asdict(self))


def load_jobs(exp: Path) -> list[JobRecord]:
    """Return the jobs of an experiment in the order of submission."""
    found = [JobRecord(**_read(path)) for path in folder_of(exp).glob("*.json") if not path.stem.endswith(".starts")]
    return sorted(found, key=lambda job: (job.submitted, job.name))


@dataclass(kw_only=True)
class Start:
    """One time that Slurm started a job.

    began, ended: seconds since 1970; ended is None while it runs, and for ever when its node died. nodes: their names.
    checkpoint, left: the newest checkpoint at its begin and its end. status: of the command. signal: the one it was
    stopped by, or empty. outcome: `finished`, `requeued`, `stopped` or `failed`, and why.
    """

    began: float
    nodes: str
    checkpoint: str
    ended: float | None = None
    left: str = ""
    status: int | None = None
    signal: str = ""
    outcome: str = ""
    reason: str = ""


@dataclass(kw_only=True)
class Starts:
    """All starts of a job."""

    id: str
    starts: list[Start] = field(default_factory=list)

    def save(self, exp: Path, name: str) -> None:
        """Write them into the experiment's folder."""
        write_json_atomic(folder_of(exp) / f"{name}.starts.json", asdict(self))


def load_starts(exp: Path, name: str, id: str) -> Starts:
    """Return the starts of a job; those of an earlier job of the same name are not its own."""
    data = _read(folder_of(exp) / f"{name}.starts.json")
    if data is None or data["id"] != id:
        return Starts(id=id)
    return Starts(id=id, starts=[Start(**start) for start in data["starts"]])
