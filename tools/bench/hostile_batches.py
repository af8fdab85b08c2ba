"""Trains on batches that do not fit: heavy tails, one cut of ten minutes, empty and over-long transcripts.

The memory of the process is limited for real (`batch.memory_gib`): `--extra-gib` above what it takes without a batch.
It prints one JSON object: how many batches were run, how often memory ran out, which cuts were left out, and that the
run came to its end. Run as `python tools/bench/hostile_batches.py --batches 2000`; it takes minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 16000
LONGEST = 600.0
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def main(arguments: list[str] | None = None) -> int:
    """Train until enough batches were run; end with status 0 when nothing broke off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=2000, help="batches to run at least (default: 2000)")
    parser.add_argument("--cuts", type=int, default=600, help="cuts of the corpus (default: 600)")
    parser.add_argument("--extra-gib", type=float, default=0.3, help="memory for batches (default: 0.3)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(train(Path(folder), options)))
    return 0


def train(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train step after step on the hostile corpus and count."""
    from harken.config.load import from_dict
    from harken.engine.deepspeed import start_processes
    from harken.objectives.saved import build_objective, preparers
    from harken.train.loop import advance, take_step
    from harken.train.run import build_run

    settings = hostile_settings(folder, options.cuts)
    start_processes(from_dict(settings).engine)
    import deepspeed  # noqa: F401  what it takes is no batch's

    settings["batch"]["memory_gib"] = resident_gib() + options.extra_gib
    config = from_dict(settings)
    prepare, spec = preparers(config)
    run = build_run(config, folder, build_objective, prepare, spec)
    batches = applied = 0
    for step in run.loader.steps(run.state.position):
        batches += len(step.batches)
        applied += take_step(run, step)
        advance(run, step)
        if batches >= options.batches:
            break
    run.log.close()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    noted = {kind: len(cuts) for kind, cuts in run.state.noted.items()}
    ran_out = sum(row["kind"] == "memory" for row in rows)
    steps = {"steps": run.state.step, "applied": applied, "epochs": run.state.position.epoch}
    return {"batches": batches, **steps, "memory_ran_out": ran_out, "noted": noted, "crashes": 0}


def hostile_settings(folder: Path, count: int) -> dict[str, Any]:
    """Write the corpus into a folder and return the plain data of a run over it."""
    from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

    from harken.data.tokens import Characters

    rng = np.random.default_rng(0)
    soundfile.write(folder / "noise.wav", 0.1 * rng.standard_normal(int(LONGEST * RATE)), RATE)
    recording = Recording.from_file(folder / "noise.wav")
    seconds = [*rng.lognormal(1.0, 1.2, count).clip(0.3, 90).round(2), *[2.0] * (count // 10), LONGEST]
    cuts = []
    for number, length in enumerate(seconds):
        size = 500 if length == 2.0 else int(rng.choice([0, 1, 4]) * 3 * length)
        text = "".join(rng.choice(list(LETTERS), size)) if size else ""
        start = float(rng.uniform(0, LONGEST - length)) if length < LONGEST else 0.0
        segment = SupervisionSegment(f"{number}", recording.id, 0.0, float(length), text=text)
        cuts.append(MonoCut(f"{number}", start, float(length), 0, recording=recording, supervisions=[segment]))
    CutSet.from_cuts(cuts).to_jsonl(folder / "hostile.jsonl")
    Characters.train([LETTERS]).save(folder / "tokens.txt")
    encoder = {"name": "transformer", "dim": 64, "layers": 2, "heads": 4, "ffn_dim": 128}
    return {
        "frontend": {"name": "filterbank", "bands": 40, "channels": 32, "subsampling": 2},
        "encoder": {**encoder, "position_kernel": 8, "position_groups": 4},
        "objective": {"name": "ctc", "tokenizer": str(folder / "tokens.txt"), "freeze_frontend": False},
        "optimizer": {"name": "adamw"},
        "schedule": {"name": "constant", "rate": 1e-4},
        "data": {
            "train": str(folder / "hostile.jsonl"),
            "max_seconds": LONGEST,
            "min_seconds": 0.1,
            "max_bad_share": 1.0,  # the check before the run would refuse such data
            "workers": 1,
        },
        # what one part may hold is far too much for the memory there is
        "batch": {"max_seconds": LONGEST, "seconds_per_step": LONGEST, "limits": [[LONGEST, 60.0]]},
        "train": {"steps": 1_000_000},
        "engine": {"threads": 1},
        "log": {"tensorboard": False, "peak_tflops": 1.0, "samples": False},
    }


def resident_gib() -> float:
    """Return what this process takes now, in GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**30


if __name__ == "__main__":
    sys.exit(main())
