"""Processes that compute in turn, so that two programs are timed side by side on one machine and never at once.

The parent asks one worker at a time and waits for its answer; requests and answers are lines of JSON on pipes. Each
worker is a process of its own, so its peak memory is its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Answer = Callable[[str, dict[str, Any]], dict[str, Any]]
LOG_TAIL = 4000


class WorkerError(Exception):
    """A worker ended, or said nothing that can be read."""


class Worker:
    """A process that answers one request at a time and waits in between."""

    def __init__(self, name: str, command: Sequence[str], *, threads: int, log: Path) -> None:
        """Start it. log: a file for what it prints."""
        self.name, self.log = name, log
        numbers = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env={**os.environ, **numbers},
            )

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises WorkerError with the end of the worker's output when it ended instead of answering.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps([request, arguments]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            printed = self.log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:]
            raise WorkerError(f"{self.name} ended (exit {code}) when asked to {request}:\n{printed}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):  # a request that never reached it
                if pipe is not None:
                    pipe.close()


def serve(begin: Callable[[], Answer]) -> None:
    """Answer requests from standard input until it closes.

    begin: imports what is needed and returns what answers. What it and libraries print goes to standard error.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        answer = begin()
        for line in sys.stdin:
            request, arguments = json.loads(line)
            replies.write(json.dumps(answer(request, arguments)) + "\n")
            replies.flush()
