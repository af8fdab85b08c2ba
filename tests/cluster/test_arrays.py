"""Job arrays on a real Slurm: pieces, one of which dies and is started again, and the job that puts them together."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def repeated(manifest: Path, out: Path, times: int) -> Path:
    """The cuts of a manifest several times, each time under new ids."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines = [json.dumps({**row, "id": f"{row['id']}-{turn}"}) for turn in range(times) for row in rows]
    out.write_text("\n".join(lines) + "\n")
    return out


def kill(words: str) -> bool:
    """Kill -9 the process on whose command line the words stand, not the job that watches over it."""
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if words in line and "harken.apps.main job" not in line and "harken.apps.main data" in line:
            with suppress(psutil.NoSuchProcess):
                process.kill()
                return True
    return False


def test_a_piece_that_dies_is_started_again_and_the_merge_waits_for_all(slurm, corpus, wait, tmp_path: Path) -> None:
    manifest, exp = repeated(corpus.train, tmp_path / "many.jsonl", 12), tmp_path / "exp"
    slurm.harken("data", "index", manifest)
    verify = ["--", "data", "verify", manifest, "--jobs", "1"]
    options = ["--exp", exp, "--name", "verify", "--cluster", slurm.cluster]
    said = slurm.harken("launch", *options, "--pieces", "3", *verify)
    found = {name: job for job, name in re.findall(r"submitted job (\d+) \((verify-pieces|verify)\)", said)}
    pieces, merge = found["verify-pieces"], found["verify"]
    wait(lambda: kill(f"{manifest} --jobs 1 --piece 2/3"), 120, lambda: slurm.harken("status", exp))
    waiting = slurm.harken("status", exp)
    assert re.search(rf"^verify +job {merge} +pending: Dependency$", waiting, re.MULTILINE), waiting
    assert re.search(rf"^verify-pieces +job {pieces} +(running|pending): \d of 3 pieces", waiting, re.MULTILINE), (
        waiting
    )
    refused = slurm.harken("launch", *options, "--pieces", "3", *verify, code=2)
    assert f"job {pieces} (verify-pieces) of {exp} is still" in refused
    assert slurm.wait(merge, "COMPLETED", "FAILED", "CANCELLED", seconds=500) == "COMPLETED"
    told = slurm.harken("status", exp)
    assert re.search(r"^verify-pieces +job \d+ +finished: 3 of 3 pieces$", told, re.MULTILINE), told
    starts = {
        piece: [
            start["outcome"]
            for start in json.loads((exp / f"jobs/verify-pieces-{piece}.starts.json").read_text())["starts"]
        ]
        for piece in (1, 2, 3)
    }
    assert starts == {1: ["finished"], 2: ["requeued", "finished"], 3: ["finished"]}
    log = (exp / "logs/verify.slurm.log").read_text()
    assert f"{manifest}: {12 * 64} cuts" in log
    for piece in (1, 2, 3):
        text = (exp / f"logs/verify-pieces-{piece}.slurm.log").read_text()
        assert f"piece {piece}/3: 1 chunks of up to 256 items done now" in text
    assert not list(tmp_path.glob("*.pieces")), "what was put together is removed"
