"""What a job does when Slurm answers its wish to be requeued in an unlucky order, or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ENDED_FIRST = (
    'kill -TERM "$PPID"; kill -KILL "$$"'  # accepted: Slurm ends the job's processes, scontrol before it answers
)
REFUSED = 'echo "Requested operation is presently disabled" >&2; exit 1'


@pytest.mark.parametrize(
    ("answer", "outcome", "status"), [(ENDED_FIRST, "requeued", 75), (REFUSED, "failed", 1)], ids=["ended", "refused"]
)
def test_a_requeue_that_ends_scontrol_too_is_one(tmp_path: Path, answer: str, outcome: str, status: int) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(f"#!/bin/bash\n{answer}\n")
    (programs / "scontrol").chmod(0o755)
    command = [sys.executable, "-m", "harken.apps.main", "job", "--exp", str(tmp_path / "exp"), "--name", "train"]
    done = subprocess.run(
        [*command, "--resumes", str(tmp_path / "exp"), "--", "false"],
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    (start,) = json.loads((tmp_path / "exp/jobs/train.starts.json").read_text())["starts"]
    assert start["outcome"] == outcome
    if outcome == "failed":
        assert "it cannot be requeued: `scontrol requeue 7` failed: Requested operation is presently" in start["reason"]
