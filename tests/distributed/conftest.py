"""Starting processes of a test's own, none of which outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

# far above what is needed, for machines that do other things too
LIMIT_SECONDS = 900


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Run this Python with arguments and return what was printed; it must end with status 0."""

    def run(*arguments: str | Path) -> str:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=LIMIT_SECONDS)
        finally:
            with suppress(ProcessLookupError):  # its whole group, whatever it forked
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0, output[-8000:]
        return output

    return run
