"""Measurements whose peak memory counts, each in a process of its own: the benchmark runs itself with `--only NAME`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from harken.core.files import write_json_atomic


def measured_apart(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield what this script prints for each name, a line of JSON behind whatever else it says."""
    for name in names:
        command = [sys.executable, sys.argv[0], *sys.argv[1:], "--only", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        yield json.loads(done.stdout.splitlines()[-1])


def write_figures(path: Path | None, args: argparse.Namespace, what: str, found: Sequence[dict[str, Any]]) -> None:
    """Write settings, version and figures as JSON, where a file is asked for."""
    if path is not None:
        settings = {key: value for key, value in vars(args).items() if key not in ("only", "json")}
        write_json_atomic(path, {"settings": settings, "torch": torch.__version__, what: list(found)})
