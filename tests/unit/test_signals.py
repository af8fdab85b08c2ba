"""A process knows the launchers that started it, and when one of them has gone. The launchers are stand-ins by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harken.train import signals
from harken.train.signals import StopRequest

RANK = """
import time
from harken.train.signals import StopRequest
stop = StopRequest()
print("watches", len(stop._launched) - 1, stop.deserted(), flush=True)
for _ in range(1200):
    if stop.deserted():
        print("deserted", flush=True)
        break
    time.sleep(0.1)
"""
# starts what its arguments say, tells its own process, and waits
START = "import os, subprocess, sys\nprint(os.getpid(), flush=True)\nsubprocess.run([sys.executable, *sys.argv[1:]])\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rank.py").write_text(RANK)
    package = tmp_path / "deepspeed/launcher"
    package.mkdir(parents=True)
    for part in (package, package.parent):  # a regular package, as the one that is installed
        (part / "__init__.py").touch()
    for path in (tmp_path / "torchrun", tmp_path / "bin/deepspeed", package / "launch.py", tmp_path / "other.py"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(START)
    return tmp_path


@pytest.mark.parametrize(
    ("chain", "watched", "killed"),
    [
        (["torchrun"], 1, 0),
        (["bin/deepspeed", "-m deepspeed.launcher.launch"], 2, 0),
        (["bin/deepspeed", "-m deepspeed.launcher.launch"], 2, 1),
        (["other.py", "torchrun"], 1, 1),
    ],
    ids=["torchrun", "deepspeed", "its launch", "below another program"],
)
def test_a_process_sees_that_its_launcher_is_gone(folder: Path, chain: list[str], watched: int, killed: int) -> None:
    words = [part if part.startswith(("-m", "deepspeed.")) else str(folder / part) for part in " ".join(chain).split()]
    process = subprocess.Popen(
        [sys.executable, *words, str(folder / "rank.py")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2] / 'framework'}", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in chain]
        assert process.stdout.readline() == f"watches {watched} False\n"
        os.kill(pids[killed], signal.SIGKILL)
        assert process.stdout.readline() == "deserted\n"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python -m torch.distributed.run --nproc-per-node 2 x.py", "torch.distributed.run"),
        ("python3.11 -W ignore -X dev -u -m deepspeed.launcher.launch x.py", "deepspeed.launcher.launch"),
        ("/venv/bin/python /venv/bin/ds x.py", "ds"),
        ("/venv/bin/python -X dev /venv/bin/torchrun x.py", "torchrun"),
        ("bash run.sh", ""),
        ("python", ""),
    ],
)
def test_a_launcher_is_known_by_what_python_was_told_to_run(command: str, name: str) -> None:
    assert signals._program(command.split()) == name
    assert name in (*signals.LAUNCHERS, "")


def test_launchers_are_looked_up_before_a_run_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """What dies while a model is built is missed too: launchers are those of when the module was imported."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert StopRequest()._launched is signals._LAUNCHED


def test_a_process_of_its_own_watches_nobody(folder: Path) -> None:
    command = [sys.executable, folder / "other.py", folder / "rank.py"]
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2] / 'framework'}"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert process.stdout.readline() == "watches 0 False\n"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
