"""How an experiment goes: its stages, their jobs, the last line of their logs, how far they are, how long they need."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harken.cluster.job import last_line, last_lines
from harken.cluster.record import JobRecord, Start, load_jobs, load_starts
from harken.cluster.slurm import Queued, queue
from harken.core.clock import duration
from harken.core.errors import HarkenError

PROGRESS = re.compile(r"\btrain (\d+)/(\d+)\b.*?(?:\beta (\S+))?$")


@dataclass(frozen=True)
class Stage:
    """A stage or a job. state: one word, with a reason behind it where there is one. progress: steps and time to go."""

    name: str
    job: str
    state: str
    progress: str
    last: str


def status(exp: Path) -> list[Stage]:
    """Return the stages of an experiment in their order, whether run here or as jobs.

    Raises HarkenError when nothing of harken's is in the folder.
    """
    jobs = {job.name: job for job in load_jobs(exp)}
    markers = {path.stem: path for kind in ("begun", "done") for path in (exp / "stages").glob(f"*.{kind}")}
    if not jobs and not markers:
        raise HarkenError(
            f"{exp} must be the folder of a recipe's run or of `harken launch`, found no stages or jobs in it"
        )
    queued, unknown = _queue(jobs)
    lost = {job.id: job.name for job in jobs.values() if _failed(exp, job)}
    found = []
    for name in sorted({*jobs, *markers}, key=lambda name: _order(name, jobs.get(name))):
        log = exp / "logs" / f"{name}.log"
        job = jobs.get(name)
        if job is None:
            state = "finished" if markers[name].suffix == ".done" else "begun"
        else:
            state = unknown or _state(exp, job, queued, lost)
            if state.startswith("cancelled"):
                lost[job.id] = job.name
        log = log if log.exists() or job is None else Path(job.log)
        progress = _progress(log) if not state.startswith(("finished", "pending", "cancelled")) else ""
        found.append(Stage(name, job.id if job is not None else "", state, progress, last_line(log)))
    return found


def table(stages: list[Stage]) -> str:
    """Return the stages as lines: name, job, state, progress; below each what its log says last, while it matters."""
    width = max(len(stage.name) for stage in stages)
    lines = []
    for stage in stages:
        job = f"job {stage.job}" if stage.job else ""
        lines.append(f"{stage.name:{width}}  {job:10}  {stage.state}{'  ' if stage.progress else ''}{stage.progress}")
        if stage.last and not stage.state.startswith(("finished", "pending", "cancelled")):
            lines.append(f"{'':{width}}  {stage.last[:160]}")
    return "\n".join(lines)


def _order(name: str, job: JobRecord | None) -> tuple[float, float, str]:
    """Order by a stage's number; what has the same one, such as the jobs of its pieces, as it was submitted."""
    number = re.match(r"\d+", name)
    return (float(number[0]) if number else float("inf"), job.submitted if job is not None else 0.0, name)


def _queue(jobs: Mapping[str, JobRecord]) -> tuple[dict[str, Queued], str]:
    """Return what waits or runs, and what to say of every job when Slurm cannot be asked."""
    if not jobs:
        return {}, ""
    try:
        return queue(), ""
    except HarkenError as error:
        return {}, f"unknown: {error}"


def _failed(exp: Path, job: JobRecord) -> bool:
    parts = [(f"{job.name}-{n}", f"{job.id}_{n}") for n in range(1, job.pieces + 1)] or [(job.name, job.id)]
    found = [load_starts(exp, name, id).starts for name, id in parts]
    return any(starts[-1].outcome == "failed" for starts in found if starts)


def _tasks(exp: Path, job: JobRecord, queued: Mapping[str, Queued]) -> str:
    """Say of an array how many of its pieces are where, and of one that failed why."""
    counts: Counter[str] = Counter()
    reasons = []
    for piece in range(1, job.pieces + 1):
        name, id = f"{job.name}-{piece}", f"{job.id}_{piece}"
        starts = load_starts(exp, name, id).starts
        outcome = starts[-1].outcome if starts else ""
        counts[queued[id].state.lower() if id in queued else outcome or ("lost" if starts else "cancelled")] += 1
        if id not in queued and outcome == "failed":
            reasons.append(f"; piece {piece}: {starts[-1].reason}")
    for word in ("running", "pending", "failed", "lost", "stopped", "cancelled"):
        if counts[word]:
            words = ", ".join(f"{count} {other}" for other, count in counts.items() if other != word)
            return f"{word}: {counts[word]} of {job.pieces} pieces{', ' if words else ''}{words}{''.join(reasons[:1])}"
    return f"finished: {counts['finished']} of {job.pieces} pieces"


def _state(exp: Path, job: JobRecord, queued: Mapping[str, Queued], lost: Mapping[str, str]) -> str:
    if job.pieces:
        return _tasks(exp, job, queued)
    starts = load_starts(exp, job.name, job.id).starts
    again = f", start {len(starts)}" if len(starts) > 1 else ""
    if job.id in queued:
        entry = queued[job.id]
        if entry.state == "PENDING":
            behind = f" to start again after {len(starts)}" if starts else ""
            return f"pending{behind}: {entry.reason}"
        return f"{entry.state.lower()} on {entry.nodes}, {entry.used} of {entry.limit}{again}"
    if starts and starts[-1].outcome:
        last = starts[-1]
        took = f" in {duration(sum((start.ended or 0) - start.began for start in starts if start.ended))}"
        return f"{last.outcome}{took}{again}{': ' if last.reason else ''}{last.reason}"
    if starts:
        return f"lost{again}: {_silence(starts[-1])}"
    failed = [lost[id] for id in job.after if id in lost]
    if failed:
        return f"cancelled: {failed[0]} did not succeed"
    return "cancelled: it never started (scancel, or a job that it waited for did not succeed)"


def _silence(start: Start) -> str:
    began = time.strftime("%F %T", time.localtime(start.began))
    return f"began {began} on {start.nodes} and Slurm ended it (time limit, memory, scancel, a dead node)"


def _progress(log: Path) -> str:
    lines = last_lines(log, 100_000)
    found = next((match for line in reversed(lines) if (match := PROGRESS.search(line.strip()))), None)
    if found is None:
        return ""
    step, steps = int(found[1]), int(found[2])
    return f"step {step} of {steps} ({100 * step // steps} %)" + (f", {found[3]} to go" if found[3] else "")
