"""Heartbeats: each rank says once a second, in a file of the run's folder, that it lives and where it is.

EXP/.watchdog/STAMP/rank-N.json   one small file a rank; another STAMP each time the run starts, so that a process
                                  that outlived an earlier start disturbs nobody
EXP/.watchdog/STAMP/alarm         the first rank that gave the others up writes why; they see it and end
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from harken.core import distributed, progress

FOLDER = ".watchdog"
ALARM = "alarm"
_CAP_SECONDS = 5.0


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    number: of its beats so far. count, phase, step, ids: see `harken.core.progress`. warm: whether its first step is
    over. reading: the file that it or a worker of its loader is reading. ended: the error it ended with.
    """

    rank: int
    process: int
    host: str
    number: int = 0
    count: int = 0
    phase: str = "start"
    step: int = 0
    ids: tuple[str, ...] = ()
    warm: bool = False
    reading: str = ""
    ended: str | None = None

    @property
    def where(self) -> str:
        """Phase, step and batch in words."""
        batch = ", ".join(self.ids[:5]) + (", ..." if len(self.ids) > 5 else "")
        step = f" of step {self.step}" if self.step else ""
        reading = f"; reading {self.reading}" if self.reading and self.phase in READING_PHASES else ""
        return f"phase `{self.phase}`{step}" + (f"; last batch: {batch}" if batch else "") + reading


READING_PHASES = ("start", "data", "validate")


class Awake:
    """Counts the seconds in which this process ran: time in which it was suspended (Ctrl-Z, a debugger) is none."""

    def __init__(self) -> None:
        self.seconds, self._last = 0.0, time.monotonic()

    def tick(self) -> float:
        """Count on; to be called far more often than every five seconds. Return the seconds so far."""
        moment = time.monotonic()
        self.seconds += min(moment - self._last, _CAP_SECONDS)
        self._last = moment
        return self.seconds


class Heartbeats:
    """Writes this rank's file and reads those of the others; all I/O is in `exchange`.

    seen: the last beat of each rank. heard, moved: when, by `clock`, a rank had a new beat, and a new count.
    answered: when the folder last answered. alarm: what a rank wrote that gave the others up.
    """

    def __init__(self, run: Path, clock: Awake) -> None:
        self.rank, self.world, self.clock = distributed.rank(), distributed.world_size(), clock
        if distributed.is_main():
            # none of an earlier start has a meaning; the broadcast below tells the others that they are gone
            shutil.rmtree(run / FOLDER, ignore_errors=True)
        self.folder = run / FOLDER / distributed.broadcast_text(f"{time.time_ns():x}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._number = 0
        self._ended: str | None = None
        self.seen: dict[int, Beat] = {}
        moment = clock.tick()
        self.heard = dict.fromkeys(range(self.world), moment)
        self.moved = dict.fromkeys(range(self.world), moment)
        self.answered, self.alarm = moment, ""

    def own(self) -> Beat:
        """Return this rank's beat as it is now."""
        now = progress.now
        stuck = next((item for item in progress.readings() if not item.done), None)
        return Beat(
            rank=self.rank,
            process=os.getpid(),
            host=socket.gethostname(),
            number=self._number,
            count=now.count,
            phase=now.phase,
            step=now.step,
            ids=now.ids[:6],
            warm=now.steps_begun > 1,
            reading=f"{stuck.what} for {stuck.seconds:.0f} s" if stuck else "",
            ended=self._ended,
        )

    def exchange(self, ended: str | None = None) -> None:
        """Write this rank's beat and read the others'; what a broken folder does not give is simply not heard."""
        self._number, self._ended = self._number + 1, ended or self._ended
        with suppress(OSError):
            temporary = self.folder / f".rank-{self.rank}.tmp"
            temporary.write_text(json.dumps(asdict(self.own())))
            temporary.replace(self.folder / f"rank-{self.rank}.json")
        for rank in range(self.world):
            self._hear(rank)
        with suppress(OSError):
            self.alarm = (self.folder / ALARM).read_text()
        self.answered = self.clock.seconds

    def _hear(self, rank: int) -> None:
        try:
            data = json.loads((self.folder / f"rank-{rank}.json").read_text())
            beat = Beat(**{**data, "ids": tuple(data["ids"])})
        except (OSError, ValueError, TypeError, KeyError):
            return
        old = self.seen.get(rank)
        if old is None or beat.number != old.number:
            self.heard[rank] = self.clock.seconds
        if old is None or beat.count != old.count:
            self.moved[rank] = self.clock.seconds
        self.seen = {**self.seen, rank: beat}  # a new one: the other thread may be going through the old

    def raise_alarm(self, text: str) -> bool:
        """Ask the others to end; return whether this rank is the first to ask."""
        try:
            descriptor = os.open(self.folder / ALARM, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        except OSError:  # where there is no folder any more each rank speaks for itself
            return True
        os.write(descriptor, text.encode())
        os.close(descriptor)
        return True

    def remove(self) -> None:
        """Remove all heartbeats at a clean end."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)


def has_ended(beat: Beat) -> bool:
    """Whether a rank has left word of its error, or its process is gone."""
    return beat.ended is not None or process_state(beat) == "X"


def process_state(beat: Beat) -> str:
    """Return the kernel's letter for a beat's process (T stopped, D in a disk, ...), `X` when it is gone.

    Empty where nothing can be known: on another machine, or without /proc.
    """
    if beat.host != socket.gethostname() or not Path("/proc/self/stat").exists():
        return ""
    try:
        state = Path(f"/proc/{beat.process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"
    return "X" if state == "Z" else state
