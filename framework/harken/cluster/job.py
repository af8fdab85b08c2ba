"""What runs in a job: it starts the command, has it save when Slurm warns, and decides whether the job starts again.

| what happens | what the job does |
|---|---|
| the command ends with status 0 | ends: `finished` |
| USR1: the end of the time is near, or preemption with `send_user_signal` | has it save, `scontrol requeue` |
| TERM: `scancel`, or Slurm's own requeue | has it save and ends: `stopped`; what Slurm does then is Slurm's |
| the command fails, and trains or is a piece | `scontrol requeue`: the next start continues from what is kept |
| it fails with status 2, a mistake in its input, or does not train | ends: `failed` |
| too many starts in a row without a new checkpoint | ends: `failed`, and says what the last one died of |
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from harken.cluster.record import Start, Starts, load_starts
from harken.cluster.script import log_of
from harken.cluster.slurm import ask_slurm
from harken.core.errors import HarkenError

STOPPED = 75  # EX_TEMPFAIL of sysexits.h, as of `harken train --fail-when-stopped`
MISTAKE = 2  # of every verb, for what the user must mend
REPEAT_SECONDS = 20.0
"""A process that is still starting does not hear a signal yet, so the warning is repeated."""


@dataclass
class Job:
    """A start of a job. id: Slurm's. nodes: their names. most: starts in a row without a new checkpoint.

    retry: it is started again after a failure though it does not train, as pieces of work are, which keep what is done.
    """

    exp: Path
    name: str
    command: Sequence[str]
    resumes: Path | None
    id: str
    nodes: str
    most: int
    retry: bool = False
    warned: str = ""
    _sent: float = field(default=0.0)
    _runs: bool = field(default=True)

    def run(self) -> int:
        """Run the command to its end, and return the status that Slurm is told."""
        starts = load_starts(self.exp, self.name, self.id)
        self._close_lost(starts)
        if starts.starts and _without_progress(starts) >= self.most:
            return self._fail(starts, starts.starts[-1], 1, self._loop_reason(starts))
        start = Start(began=time.time(), nodes=self.nodes, checkpoint=self._newest())
        starts.starts.append(start)
        starts.save(self.exp, self.name)
        self._say(f"start {len(starts.starts)} on {self.nodes}, from {start.checkpoint or 'the beginning'}")
        start.status = self._watch()
        start.ended, start.left, start.signal = time.time(), self._newest(), self.warned
        return self._decide(starts, start)

    def _watch(self) -> int:
        """Start the command in a process group of its own, pass warnings on, and return its status."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)
        try:
            child = subprocess.Popen(self.command, process_group=0)
        except OSError as error:
            print(f"harken job: cannot run {self.command[0]}: {error.strerror}", file=sys.stderr, flush=True)
            return 127
        while True:
            with suppress(subprocess.TimeoutExpired):
                status = child.wait(0.5)
                self._runs = False
                return status
            if self.warned and time.monotonic() - self._sent > REPEAT_SECONDS:
                self._sent = time.monotonic()
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGUSR1)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name.removeprefix("SIG")
        if not self.warned and self._runs:
            self._sent = -REPEAT_SECONDS
            self._say(f"got {name}: asking the command to save")
        if self.warned != "TERM":
            self.warned = name

    def _decide(self, starts: Starts, start: Start) -> int:
        if start.status == 0:
            start.outcome = "finished"
            starts.save(self.exp, self.name)
            self._say("finished")
            return 0
        if start.signal in {"TERM", "INT"}:
            start.outcome, start.reason = "stopped", f"by {start.signal}: `scancel`, or Slurm takes the nodes"
            starts.save(self.exp, self.name)
            self._say(f"stopped {start.reason}; submitted again it continues from {start.left or 'the beginning'}")
            return STOPPED
        if not start.signal and start.status == MISTAKE:
            reason = f"status {MISTAKE}, a mistake in what it was given, which no new start mends: {self._last_line()}"
            return self._fail(starts, start, MISTAKE, reason)
        if not start.signal and self.resumes is None and not self.retry:
            return self._fail(starts, start, start.status or 1, f"status {start.status}: {self._last_line()}")
        if _without_progress(starts) >= self.most:
            return self._fail(starts, start, start.status or 1, self._loop_reason(starts))
        return self._requeue(starts, start)

    def _requeue(self, starts: Starts, start: Start) -> int:
        why = "saved before the end of its time" if start.signal else f"status {start.status}"
        start.outcome, start.reason = "requeued", why
        starts.save(self.exp, self.name)
        self._say(f"{why}: requeued; the next start continues from {start.left or 'the beginning'}")
        try:
            ask_slurm("scontrol", "requeue", self.id)
        except HarkenError as error:
            # Slurm ends all processes of a job that it requeues, and scontrol may be the first of them
            if not self._is_ended(10):
                return self._fail(starts, start, start.status or STOPPED, f"{why}, and it cannot be requeued: {error}")
        self._is_ended(60)
        return STOPPED

    def _is_ended(self, seconds: float) -> bool:
        """Wait until Slurm ends this process: one that ended before would be taken for a failed job."""
        until = time.monotonic() + seconds
        while self.warned != "TERM" and time.monotonic() < until:
            time.sleep(0.2)
        return self.warned == "TERM"

    def _fail(self, starts: Starts, start: Start, status: int, reason: str) -> int:
        start.outcome, start.reason = "failed", reason
        starts.save(self.exp, self.name)
        self._say(f"FAILED: {reason}; jobs that wait for it are cancelled")
        return status if status > 0 else 128 - status

    def _close_lost(self, starts: Starts) -> None:
        """End the record of a start that could not do so itself."""
        if starts.starts and starts.starts[-1].ended is None:
            last = starts.starts[-1]
            last.ended, last.left, last.outcome = time.time(), self._newest(), "lost"
            last.reason = f"it was killed, or a node of {last.nodes} died"
            self._say(f"start {len(starts.starts)} ended without a word: {last.reason}")

    def _loop_reason(self, starts: Starts) -> str:
        last = starts.starts[-1]
        what = f"with status {last.status}: {self._last_line()}" if last.status is not None else f"as {last.reason}"
        return (
            f"{_without_progress(starts)} starts in a row ended without a new checkpoint, the last {what} "
            "(`max_starts_without_progress` of cluster.yaml; a longer `time` helps where it was only stopped)"
        )

    def _newest(self) -> str:
        if self.resumes is None:
            return ""
        return max((path.name for path in (self.resumes / "checkpoints").glob("step-*")), default="")

    def _last_line(self) -> str:
        return last_line(log_of(self.exp, self.name), skip="harken job:") or "it printed nothing"

    def _say(self, text: str) -> None:
        print(f"harken job: {time.strftime('%F %T')} {self.name} (job {self.id}) {text}", flush=True)


def _without_progress(starts: Starts) -> int:
    """Return how many of the last starts ended with the checkpoint that they began with."""
    count = 0
    for start in reversed(starts.starts):
        if start.left != start.checkpoint:
            break
        count += 1
    return count


def last_line(path: Path, *, skip: str = "\0") -> str:
    """Return the last line of a log that says something, or nothing; lines that begin with `skip` are passed over."""
    lines = last_lines(path, 20_000)
    return next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith(skip)), "")


def last_lines(path: Path, size: int) -> list[str]:
    """Return the lines in the last `size` bytes of a log; none where there is no log."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - size))
            return stream.read().decode(errors="replace").splitlines()
    except OSError:
        return []
