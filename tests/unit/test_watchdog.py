"""What a watchdog makes of heartbeats: when a run stands, and who is to blame. Time is the test's own."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from harken.core import progress
from harken.engine import heartbeat
from harken.engine.heartbeat import Awake, Beat
from harken.engine.watchdog import GONE_SECONDS, PATIENCE, Watchdog, collective_timeout, ranks_behind

TIMEOUT = 100.0


def beat(rank: int, count: int, phase: str = "backward", **more) -> Beat:
    return Beat(rank, os.getpid(), socket.gethostname(), count, count, phase, 7, ("a", "b"), warm=True, **more)


class Scene:
    """Rank 0 of several: what it has heard, and what it says of the run as time passes."""

    def __init__(self, folder: Path, *beats: Beat) -> None:
        progress.restart()
        self.dog = Watchdog(folder, TIMEOUT)
        self.dog.hearts.seen = {item.rank: item for item in beats}
        self.dog.hearts.heard = self.dog.hearts.moved = {item.rank: 0.0 for item in beats}
        self.dog.clock.seconds = 0.0
        self.dog.complaint()

    def after(self, seconds: float, *, silent: tuple[int, ...] = (), folder: bool = True) -> str:
        hearts = self.dog.hearts
        self.dog.clock.seconds += seconds
        hearts.heard = {rank: 0.0 if rank in silent else self.dog.clock.seconds for rank in hearts.seen}
        hearts.answered = self.dog.clock.seconds if folder else 0.0
        return self.dog.complaint()


@pytest.fixture(autouse=True)
def as_before():
    yield
    progress.restart()


def test_the_rank_that_has_noted_least_is_named_after_the_timeout(tmp_path: Path) -> None:
    scene = Scene(tmp_path, beat(0, 20), beat(1, 18, "data", reading="x.flac (cut `x`) for 99 s"), beat(2, 20))
    assert scene.after(TIMEOUT - 1) == ""
    assert scene.after(2) == (
        f"rank 1 (process {os.getpid()} on {socket.gethostname()}) has made no progress for 101 s, in phase `data` of "
        "step 7; last batch: a, b; reading x.flac (cut `x`) for 99 s. Waiting: rank 0 in `start` of step 0, "
        "rank 2 in `backward` of step 7"
    )


def test_a_rank_that_moves_keeps_the_others_waiting_for_it(tmp_path: Path) -> None:
    """It is slow, not hanging: the clock begins anew with each thing that any rank notes."""
    scene = Scene(tmp_path, beat(0, 20), beat(1, 18))
    for _ in range(5):
        assert scene.after(TIMEOUT - 1) == ""
        scene.dog.hearts.moved[1] = scene.dog.clock.seconds
    assert scene.after(TIMEOUT + 1) != ""


@pytest.mark.parametrize("slow", [beat(1, 18, "save"), beat(1, 18, "validate"), replace(beat(1, 18), warm=False)])
def test_phases_that_take_long_are_given_longer(tmp_path: Path, slow: Beat) -> None:
    scene = Scene(tmp_path, beat(0, 20), slow)
    assert scene.after(PATIENCE * TIMEOUT - 1) == ""
    assert scene.after(2).startswith("rank 1 ")


def test_a_silent_rank_is_given_no_longer_in_any_phase(tmp_path: Path) -> None:
    scene = Scene(tmp_path, beat(0, 20), beat(1, 18, "save"))
    assert "rank 1 " in scene.after(TIMEOUT + 1, silent=(1,))
    assert "has been silent for 101 s" in scene.dog.complaint()


def test_a_rank_that_is_gone_ends_the_others_soon(tmp_path: Path, monkeypatch) -> None:
    scene = Scene(tmp_path, beat(0, 20), beat(1, 18, ended="ValueError: of rank 1"))
    assert scene.after(0) == ""
    assert scene.after(GONE_SECONDS + 1).endswith(
        "it ended with: ValueError: of rank 1. Waiting: rank 0 in `start` of step 0"
    )
    scene = Scene(tmp_path, beat(0, 20), replace(beat(1, 18), process=2**22 + 1))
    assert scene.after(0) == ""
    assert " is gone, in phase `backward`" in scene.after(GONE_SECONDS + 1)


def test_a_folder_that_does_not_answer_is_named_and_not_the_other_ranks(tmp_path: Path) -> None:
    scene = Scene(tmp_path, beat(0, 20), beat(1, 20))
    words = scene.after(TIMEOUT + 1, silent=(0, 1), folder=False)
    assert words.startswith(f"{tmp_path} has not answered for 101 s, and rank 0 (process ")


def test_ranks_at_one_place_wait_for_each_other_and_saving_waits_for_the_main_process(tmp_path: Path) -> None:
    assert (
        Scene(tmp_path, beat(0, 20), beat(1, 20))
        .after(TIMEOUT + 1)
        .startswith("ranks 0, 1 wait for each other, and rank 0 ")
    )
    assert ranks_behind({0: beat(0, 20, "save"), 1: beat(1, 20, "save")}) == [0]
    assert ranks_behind({0: beat(0, 21, "save"), 1: beat(1, 20, "save")}) == [1]


def test_time_in_which_the_process_was_suspended_does_not_count(monkeypatch) -> None:
    now = [50.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    clock = Awake()
    for seconds in (1.0, 3600.0, 1.0):
        now[0] += seconds
        clock.tick()
    assert clock.seconds == pytest.approx(7.0)


def test_the_librarys_own_timeout_is_later_than_every_allowance() -> None:
    for seconds in (1, 600):
        assert collective_timeout(seconds).total_seconds() >= PATIENCE * seconds + 60


def test_heartbeats_tell_the_others_and_name_what_is_read(tmp_path: Path) -> None:
    progress.restart()
    progress.note("data", step=3, ids=("a",))
    hearts = heartbeat.Heartbeats(tmp_path, Awake())
    with progress.reading("x.flac (cut `x`)"):
        hearts.exchange()
    told = hearts.seen[0]
    assert (told.phase, told.step, told.ids, told.ended) == ("data", 3, ("a",), None)
    assert told.where == "phase `data` of step 3; last batch: a; reading x.flac (cut `x`) for 0 s"
    hearts.exchange("ValueError: it")
    assert (hearts.seen[0].reading, hearts.seen[0].ended) == ("", "ValueError: it")
    assert hearts.raise_alarm("first")
    assert not hearts.raise_alarm("second")
    hearts.exchange()
    assert hearts.alarm == "first"
    later = heartbeat.Heartbeats(tmp_path, Awake())
    later.exchange()
    assert later.alarm == "", "another start does not see it"


def test_a_forked_worker_tells_its_parent_what_it_reads() -> None:
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with progress.reading("y.flac (cut `y`)"):
            os.write(ready[1], b".")
            os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        assert [(item.what, item.done) for item in progress.readings() if item.process == child] == [
            ("y.flac (cut `y`)", False)
        ]
    finally:
        os.write(go[1], b".")
        os.waitpid(child, 0)
    assert [item.done for item in progress.readings() if item.process == child] == [True], "what it read last stays"
