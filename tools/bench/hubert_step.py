"""A training step of HuBERT Base in harken and in Hugging Face's transformers, timed side by side.

Both models begin with the same weights and see the same waveforms, masks and labels; dropout, AdamW and clipping are
the same. First their outputs are compared. Then they take steps in turn, each in a process of its own. See README.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lockstep import Worker, WorkerError
from step_options import add_step_options, parse_steps

from harken.core.errors import HarkenError
from harken.core.files import write_json_atomic

HERE = Path(__file__).resolve().parent
TITLES = {"harken": "harken", "hugging_face": "Hugging Face"}
MODEL_OPTIONS = ("layers", "seconds", "batch", "threads", "precision", "attention", "layer_drop", "seed")
LOSS_TOLERANCE = 1e-4  # relative; the head's, which the hidden states do not show
PAUSE_SECONDS = 0.25  # OpenMP's threads spin for a while after their last work, which would slow the other's first
GIB = 1 << 30


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Time a HuBERT training step in harken and in Hugging Face's transformers, in turn.",
        epilog="example: python tools/bench/hubert_step.py --steps 10 --threads 2 --json step.json\n"
        "         python tools/bench/hubert_step.py --layers 2 --seconds 2 --steps 3  # a quick look",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_step_options(parser, steps=10)
    parser.add_argument(
        "--attention", choices=("sdpa", "eager"), default="sdpa", help="of Hugging Face (default: sdpa)"
    )
    parser.add_argument(
        "--layer-drop",
        type=float,
        default=0.0,
        metavar="P",
        help="HuBERT has 0.05; the default is 0, for the two would skip different layers and so do different work",
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="largest difference of hidden states (default: 1e-3)"
    )
    return parse_steps(parser, arguments)


def compare(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any], tolerance: float) -> float:
    """Return the largest absolute difference of two arrays; raises HarkenError when it is above the tolerance."""
    if ours.shape != theirs.shape:
        raise HarkenError(
            f"hidden states must have one shape, harken's are {ours.shape}, Hugging Face's {theirs.shape}"
        )
    difference = float(np.abs(ours - theirs).max())
    if not difference <= tolerance:
        raise HarkenError(
            f"final hidden states must differ by at most {tolerance:g}, found {difference:.2e}: nothing was timed"
        )
    return difference


def check_outputs(workers: dict[str, Worker], folder: Path, tolerance: float) -> dict[str, Any]:
    """Compare final hidden states and the loss of the masked frames, without dropout; HarkenError if they differ."""
    losses = {}
    for name, worker in workers.items():
        losses[name] = float(worker.ask("encode", out=str(folder / f"{name}.npy"))["loss"])
    arrays = [np.load(folder / f"{name}.npy") for name in ("harken", "hugging_face")]
    difference = compare(arrays[0], arrays[1], tolerance)
    if not abs(losses["harken"] / losses["hugging_face"] - 1) <= LOSS_TOLERANCE:
        raise HarkenError(f"losses must agree to {LOSS_TOLERANCE:g}, found {losses}: nothing was timed")
    return {"hidden_difference": difference, "size": float(np.abs(arrays[1]).max()), "losses": losses}


def take_steps(workers: dict[str, Worker], warmup: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Let the workers take steps in turn; return the seconds and losses of those after the warm-up."""
    taken: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "cpu_seconds": [], "losses": []} for name in workers
    }
    for step in range(warmup + steps):
        answers = {}
        for name, worker in workers.items():
            time.sleep(PAUSE_SECONDS)
            answers[name] = worker.ask("step", step=step)
        if len({answer["batch"] for answer in answers.values()}) != 1:
            raise HarkenError(f"all models must see the same batch in step {step}, found {answers}")
        kind = f"warm-up {step + 1} of {warmup}" if step < warmup else f"step {step - warmup + 1} of {steps}"
        shown = ", ".join(f"{workers[name].name} {answer['seconds']:.3f} s" for name, answer in answers.items())
        print(f"{kind}: {shown}", file=sys.stderr, flush=True)
        if step >= warmup:
            for name, answer in answers.items():
                taken[name]["seconds"].append(answer["seconds"])
                taken[name]["cpu_seconds"].append(answer["cpu_seconds"])
                taken[name]["losses"].append(answer["loss"])
    return taken


def summarise(
    taken: dict[str, dict[str, list[float]]], memory: dict[str, dict[str, int]], audio_seconds: float
) -> dict[str, dict[str, float]]:
    """Return each one's figures. Speed beside Hugging Face is the median over pairs of neighbouring steps."""
    reference = taken["hugging_face"]["seconds"]
    reference_memory = memory["hugging_face"]["peak"] - memory["hugging_face"]["after_imports"]
    summary = {}
    for name, values in taken.items():
        seconds = values["seconds"]
        used = memory[name]["peak"] - memory[name]["after_imports"]
        summary[name] = {
            "audio_seconds_per_second": audio_seconds / statistics.median(seconds),
            "milliseconds": 1000 * statistics.median(seconds),
            "milliseconds_min": 1000 * min(seconds),
            "milliseconds_max": 1000 * max(seconds),
            "peak_gib": used / GIB,
            "speed_ratio": statistics.median(b / a for a, b in zip(seconds, reference, strict=True)),
            "memory_ratio": used / reference_memory,
        }
    return summary


def table(summary: dict[str, dict[str, float]]) -> str:
    """Return the figures as a Markdown table."""
    rows = [["", "audio s/s", "ms a step", "min to max", "peak GiB", "speed / HF", "memory / HF"]]
    for name, figures in summary.items():
        rows.append(
            [
                TITLES[name],
                f"{figures['audio_seconds_per_second']:.2f}",
                f"{figures['milliseconds']:.0f}",
                f"{figures['milliseconds_min']:.0f} to {figures['milliseconds_max']:.0f}",
                f"{figures['peak_gib']:.2f}",
                f"{figures['speed_ratio']:.3f}",
                f"{figures['memory_ratio']:.3f}",
            ]
        )
    return aligned(rows)


def aligned(rows: list[list[str]]) -> str:
    """Return rows, the first of them titles, as a Markdown table whose columns are of one width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * (width - 1) + (":" if column else "-") for column, width in enumerate(widths)])
    lines = []
    for row in rows:
        cells = [
            f"{row[0]:<{widths[0]}}",
            *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(packages: Sequence[str] = ("transformers",)) -> dict[str, Any]:
    """Return what the figures depend on: processor, its load before the run, and versions."""
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8") if information.is_file() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", *packages)}
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        **versions,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the whole comparison and return it; raises HarkenError or WorkerError."""
    options = json.dumps({name: getattr(args, name) for name in MODEL_OPTIONS})
    about = machine()
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory(prefix="hubert-step-") as name:
        folder = Path(name)
        try:
            for peer in ("hugging_face", "harken"):  # its weights come first
                command = [sys.executable, str(HERE / "hubert_peers.py"), peer, options]
                worker = Worker(TITLES[peer], command, threads=args.threads, log=folder / f"{peer}.log")
                workers = {peer: worker, **workers}  # harken takes the first turn
                parameters = worker.ask("build", folder=str(folder))["parameters"]
                print(f"{TITLES[peer]}: {parameters / 1e6:.2f}M parameters", file=sys.stderr, flush=True)
            outputs = check_outputs(workers, folder, args.tolerance)
            print(
                f"final hidden states of up to {outputs['size']:.1f} differ by at most "
                f"{outputs['hidden_difference']:.1e}; losses {outputs['losses']}",
                file=sys.stderr,
                flush=True,
            )
            taken = take_steps(workers, args.warmup, args.steps)
            memory = {peer: worker.ask("memory") for peer, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.close()
    summary = summarise(taken, memory, args.batch * args.seconds)
    settings = {name: getattr(args, name) for name in (*MODEL_OPTIONS, "steps", "warmup")}
    return {"settings": settings, "machine": about, "outputs": outputs, "steps": taken, "memory": memory, **summary}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    args = parse(arguments)
    if importlib.util.find_spec("transformers") is None:
        print("transformers is missing: install it with `pip install -e .[bench]`", file=sys.stderr)
        return 2
    try:
        result = measure(args)
    except (HarkenError, WorkerError) as error:
        print(f"hubert_step.py: {error}", file=sys.stderr)
        return 1
    about = result["machine"]
    print(
        f"HuBERT Base, {args.layers} layers, {args.batch} x {args.seconds:g} s, {args.precision}, "
        f"{args.threads} threads, {args.attention}; median of {args.steps} steps after {args.warmup}\n"
        f"{about['processor']}, {about['cores']} cores, load before {about['load_before']:.1f}; "
        f"torch {about['torch']}, transformers {about['transformers']}\n"
    )
    print(table({name: result[name] for name in TITLES}))
    if args.json is not None:
        command = shlex.join(
            ["python", "tools/bench/hubert_step.py", *(sys.argv[1:] if arguments is None else arguments)]
        )
        write_json_atomic(args.json, {"command": command, **result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
