"""A run that stands is ended, and the rank it stands for is named.

Every rank has two threads: one writes and reads heartbeats (`harken.engine.heartbeat`); the other judges them and does
no I/O, so that it judges when the disk is dead, too. A run stands when no rank has noted anything new
(`harken.core.progress`) for `engine.timeout_seconds`; PATIENCE times that until the first step is over and in the
phases that note nothing for long. A rank whose process is gone ends the others after a few seconds.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from harken.core import distributed, progress
from harken.engine.flight import dump_flight, put_aside
from harken.engine.heartbeat import READING_PHASES, Awake, Beat, Heartbeats, has_ended, process_state

HUNG = 69
"""Exit status of a rank that gave a hanging run up: EX_UNAVAILABLE of sysexits.h. The same command goes on."""
PATIENCE = 3
"""Times `engine.timeout_seconds`: for building and loading, the first step (compilation), validation and saving."""
PATIENT_PHASES = ("start", "validate", "save", "roll back")
GONE_SECONDS = 10.0  # the communication library or the launcher ends a run sooner and says more
STATES = {
    "T": "; its process is stopped (SIGSTOP, Ctrl-Z): `kill -CONT` it, or end it",
    "t": "; a debugger holds its process",
    "D": "; its process waits for a disk",
}


def collective_timeout(timeout_seconds: int) -> timedelta:
    """Return gloo's and NCCL's own timeout: later than the watchdog, which knows who is to blame."""
    return timedelta(seconds=(PATIENCE + 1) * timeout_seconds + 60)


@contextmanager
def watched(folder: Path, timeout_seconds: float) -> Iterator[None]:
    """Watch the block, in which a run in `folder` trains; every rank enters and leaves it together.

    A hanging run ends with status HUNG, whatever its main thread is stuck in. When another rank's end is what the
    block fails with, that rank is named on stderr before the exception goes on.
    """
    progress.restart()
    if distributed.is_main():
        put_aside(folder / "stacks")
    dog = Watchdog(folder, timeout_seconds)
    dog.start()
    try:
        yield
        progress.note("end")
        distributed.barrier()  # others may be at work
        dog.stop()
        distributed.barrier()  # no rank writes a heartbeat any more
        if distributed.is_main():
            dog.hearts.remove()
    except Exception as error:
        dog.stop()
        dog.explain(error)
        if distributed.world_size() == 1:  # of several, the others look for the word that was left
            dog.hearts.remove()
        raise
    finally:
        dog.stop()


class Watchdog:
    """The two threads of a rank."""

    def __init__(self, folder: Path, timeout_seconds: float) -> None:
        self.run, self.timeout = folder, timeout_seconds
        self.interval = min(1.0, timeout_seconds / 10)
        self.clock = Awake()
        self.hearts = Heartbeats(folder, self.clock)
        self._stop = threading.Event()
        self._gone: dict[int, float] = {}
        self._own = (-1, 0.0)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._judge)]

    def start(self) -> None:
        """Start watching."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop watching; a thread that hangs in I/O is left behind."""
        self._stop.set()
        for thread in self._threads:
            thread.join(5.0)

    def _exchange(self) -> None:
        while not self._stop.is_set():
            self.hearts.exchange()
            self._stop.wait(self.interval)

    def _judge(self) -> None:
        while not self._stop.wait(self.interval):
            self.clock.tick()
            if self.hearts.alarm:
                self._end(f"harken: rank {self.hearts.rank} ends with the others: {self.hearts.alarm}", first=False)
            complaint = self.complaint()
            if complaint:
                self._end(f"harken: {complaint}", first=True)

    def complaint(self) -> str:
        """Return what is wrong with the run in a sentence for the user; empty when it goes on."""
        moment, hearts = self.clock.seconds, self.hearts
        if progress.now.count != self._own[0]:
            self._own = (progress.now.count, moment)
        gone = self._ranks_gone(moment)
        if gone:
            return self._name(gone, "is gone")
        stalled = moment - max(self._own[1], *hearts.moved.values())
        if stalled < self.timeout:
            return ""
        for_seconds = f"has made no progress for {stalled:.0f} s"
        if moment - hearts.answered > self.timeout / 2:
            return f"{self.run} has not answered for {moment - hearts.answered:.0f} s, and " + self._name(
                [hearts.rank], for_seconds
            )
        silent = [rank for rank, heard in hearts.heard.items() if moment - heard > self.timeout / 2]
        if silent:
            return self._name(silent, f"has been silent for {moment - hearts.heard[silent[0]]:.0f} s")
        behind = ranks_behind(hearts.seen)
        patient = any(hearts.seen[rank].phase in PATIENT_PHASES or not hearts.seen[rank].warm for rank in behind)
        if stalled < self.timeout * (PATIENCE if patient else 1):
            return ""
        if len(behind) == 1:
            return self._name(behind, for_seconds) + self._between(behind)
        words = f"ranks {', '.join(map(str, behind))} wait for each other, and " + self._name(behind[:1], for_seconds)
        return words + self._between(behind)

    def _between(self, behind: list[int]) -> str:
        """Ask for the network where ranks of several machines are in what they do together: it may be at fault."""
        hosts = sorted({beat.host for beat in self.hearts.seen.values()})
        if len(hosts) == 1 or any(self.hearts.seen[rank].phase in READING_PHASES for rank in behind):
            return ""
        more = f" and {len(hosts) - 8} more" if len(hosts) > 8 else ""
        return f". The ranks are on {', '.join(hosts[:8])}{more}: is the network between these up?"

    def _ranks_gone(self, moment: float) -> list[int]:
        """Return the ranks that have been gone, or had ended with an error, for some seconds."""
        for rank, beat in self.hearts.seen.items():
            if rank != self.hearts.rank and has_ended(beat):
                self._gone.setdefault(rank, moment)
        return [rank for rank, since in self._gone.items() if moment - since >= min(GONE_SECONDS, self.timeout)]

    def _name(self, ranks: list[int], what: str) -> str:
        """Describe the first of some ranks, and where the others are."""
        rank, seen = ranks[0], {**self.hearts.seen, self.hearts.rank: self.hearts.own()}
        if rank not in seen:
            return f"rank {rank} never wrote a heartbeat into {self.hearts.folder}"
        beat = seen[rank]
        words = f"rank {rank} (process {beat.process} on {beat.host}) {what}, in {beat.where}"
        words += f"; it ended with: {beat.ended}" if beat.ended else STATES.get(process_state(beat), "")
        if len(ranks) > 1:
            words += f"; likewise ranks {', '.join(map(str, ranks[1:]))}"
        others = [f"rank {other} in {_short(seen[other])}" for other in sorted(seen) if other not in ranks]
        return words + (f". Waiting: {', '.join(others[:8])}" if others else "")

    def _end(self, message: str, *, first: bool) -> None:
        """Say why, leave the stacks, have the others do so, and end; nothing that hangs can keep it from ending."""
        work = threading.Thread(target=self._last_words, args=(message,), kwargs={"first": first}, daemon=True)
        work.start()
        work.join(20.0)
        os._exit(HUNG)

    def _last_words(self, message: str, *, first: bool) -> None:
        hearts, stacks = self.hearts, self.run / "stacks" / f"rank-{self.hearts.rank}.txt"
        asked = [first]  # a dead disk answers nothing: then this rank speaks for itself
        if first:
            _bounded(lambda: asked.append(hearts.raise_alarm(message.removeprefix("harken: "))), 5.0)
        if first and not asked[-1]:
            _bounded(hearts.exchange, 5.0)
            message = f"harken: rank {hearts.rank} ends with the others, which found the same: {hearts.alarm}"
        _shout(f"{message}. Stacks: {stacks}; status {HUNG}; the same command goes on from the last checkpoint")
        _bounded(lambda: dump_stacks(stacks, message), 5.0)
        _bounded(lambda: dump_flight(stacks.parent), 5.0)
        for child in multiprocessing.active_children():  # a loader's worker that hangs would outlive this process
            child.kill()
        if first:
            time.sleep(min(5.0, 4 * self.interval))  # a launcher would end the others before their stacks are written

    def explain(self, error: Exception) -> None:
        """Leave word of the error this rank ends with; when it is another rank's end, say whose."""
        last = progress.readings()
        if "DataLoader worker (pid" in str(error) and last:  # torch's words for one that was killed
            read = ", ".join(f"process {item.process}: {item.what}" for item in last[:20])
            _shout(f"harken: a worker of rank {self.hearts.rank}'s loader died; what its workers read last: {read}")
        lost = distributed.lost_another(error)
        words = None if lost else " ".join(f"{type(error).__name__}: {error}".split())[:500]
        _bounded(lambda: self.hearts.exchange(words), 5.0)
        if lost:
            _bounded(lambda: dump_flight(self.run / "stacks"), 5.0)
            _bounded(self._name_who_ended, 10.0)

    def _name_who_ended(self) -> None:
        """Wait a little until it is seen who ended first: a process is gone, or has left word of its error."""
        until = time.monotonic() + 5.0
        while time.monotonic() < until:
            self.hearts.exchange()
            ended = [rank for rank, beat in self.hearts.seen.items() if has_ended(beat)]
            if ended:
                words = self._name(ended, "has ended")
                if self.hearts.raise_alarm(words):
                    _shout(f"harken: {words}. The errors of other ranks follow from that")
                return
            time.sleep(self.interval / 4)


def ranks_behind(seen: dict[int, Beat]) -> list[int]:
    """Return the ranks for which the others wait: those that have noted least.

    When all stand at the same place, that is all of them; while saving it is the main process, which writes.
    """
    least = min(beat.count for beat in seen.values())
    behind = [rank for rank in sorted(seen) if seen[rank].count == least]
    if len(behind) == len(seen) and 0 in seen and seen[0].phase == "save":
        return [0]
    return behind


def dump_stacks(path: Path, why: str) -> None:
    """Add the stacks of all threads of this process to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}: {why}\n")
        stream.flush()
        faulthandler.dump_traceback(file=stream, all_threads=True)


def _short(beat: Beat) -> str:
    return f"`{beat.phase}` of step {beat.step}"


def _shout(text: str) -> None:
    os.write(2, f"{text}\n".encode())  # not sys.stderr, whose lock the main thread may hold


def _bounded(work: Callable[[], None], seconds: float) -> None:
    """Run `work` in a thread that is left behind when it hangs."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
