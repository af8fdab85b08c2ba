"""A training step of HuBERT Base in harken and in every toolkit that is installed, timed in turn on the same batches.

Each is a process of its own; only one computes at a time. See README.md. What is equal and what is each toolkit's own
stands in toolkit_peers.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hubert_peers import Options, configuration
from hubert_step import GIB, aligned, machine, take_steps
from lockstep import Worker, WorkerError
from step_options import DEVICES, add_step_options, options_of, parse_steps

from harken.core.files import write_json_atomic

HERE = Path(__file__).resolve().parent
PACKAGES = {
    "hugging_face": "transformers",
    "harken": "harken",
    "harken_fasthubert": "harken",
    "fairseq": "fairseq",
    "minimal_hubert": "minimal_hubert",
    "torchaudio": "torchaudio",
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Time a HuBERT training step in harken and in each other toolkit that is installed, in turn.",
        epilog="example: python tools/bench/train_step.py --steps 5 --compiled --json step.json",
    )
    parser.add_argument("--peers", nargs="+", choices=PACKAGES, default=list(PACKAGES), help="default: all")
    parser.add_argument("--compiled", action="store_true", help="each also with torch.compile")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    add_step_options(parser, steps=5)
    args = parse_steps(parser, arguments)
    if "harken" not in args.peers:
        parser.error("--peers must name harken, which the others are compared with")
    return args


def step_flops(options: Options, preset: str = "hubert_base") -> float:
    """Return the floating-point operations of a step, forward and backward, as `mfu_percent` of a run counts them."""
    from harken.encoders.backbone import build_backbone

    with torch.device("meta"):
        backbone = build_backbone(configuration(options, preset))
    samples = round(options.seconds * 16000)
    frames = int(backbone.spec.num_frames(samples))
    return 3.0 * options.batch * (backbone.frontend.flops(samples) + backbone.encoder.flops(frames))


def start(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Worker], dict[str, str]]:
    """Start the workers that can be started; return them, and why others cannot, by name."""
    workers: dict[str, Worker] = {}
    left_out: dict[str, str] = {}
    for compiled in (False, True)[: 1 + args.compiled]:
        for peer in args.peers:
            name = peer + " compiled" * compiled
            if importlib.util.find_spec(PACKAGES[peer]) is None:
                left_out[name] = f"{PACKAGES[peer]} is not installed"
                continue
            options = json.dumps(asdict(options_of(args, compiled=compiled)))
            command = [sys.executable, str(HERE / "toolkit_peers.py"), peer, options]
            worker = Worker(name, command, threads=args.threads, log=folder / f"{name}.log")
            try:
                count = worker.ask("build", folder=str(folder))["parameters"]
                worker.ask("step", step=args.warmup + args.steps)  # a step that cannot be taken shows now
            except WorkerError as error:
                worker.close()
                left_out[name] = str(error)
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
                continue
            print(f"{name}: {count / 1e6:.2f}M parameters", file=sys.stderr, flush=True)
            workers[name] = worker
    return workers, left_out


def summarise(
    taken: dict[str, dict[str, list[float]]],
    memory: dict[str, dict[str, int]],
    audio_seconds: float,
    shares: dict[str, float],
) -> dict[str, dict[str, float]]:
    """Return each one's figures, and how much faster and smaller than it harken's plain step is.

    shares: seconds that a step of each would take at the device's peak. Ratios of speed are medians over the same
    steps, by the clock and by the processor's time of a step, which other programs of a busy machine disturb less.
    """

    def faster(values: dict[str, list[float]], kind: str) -> float:
        return statistics.median(b / a for a, b in zip(taken["harken"][kind], values[kind], strict=True))

    used = {name: (memory[name]["peak"] - memory[name]["after_imports"]) / GIB for name in taken}
    return {
        name: {
            "audio_seconds_per_second": audio_seconds / statistics.median(values["seconds"]),
            "mfu_percent": 100 * shares[name] / statistics.median(values["seconds"]),
            "peak_gib": used[name],
            "harken_is_faster": faster(values, "seconds"),
            "harken_is_faster_cpu": faster(values, "cpu_seconds"),
            "harken_takes_memory": used["harken"] / used[name],
        }
        for name, values in taken.items()
    }


def table(summary: dict[str, dict[str, float]]) -> str:
    """Return the figures as a Markdown table."""
    rows = [["", "audio s/s", "MFU %", "peak GiB", "harken's speed / its", "by CPU time", "harken's memory / its"]]
    rows += [[name, *(f"{figure:.2f}" for figure in figures.values())] for name, figures in summary.items()]
    return aligned(rows)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the comparison; raises WorkerError when harken cannot take a step or a worker ends in between."""
    from harken.train.speed import peak_tflops

    about = machine(packages=())
    torch.set_num_threads(args.threads)
    peak = peak_tflops(torch.bfloat16 if args.precision == "bf16" else torch.float32)
    flops = step_flops(options_of(args))
    fast = step_flops(options_of(args), "fasthubert_base")
    with tempfile.TemporaryDirectory(prefix="train-step-") as name:
        workers, left_out = start(args, Path(name))
        try:
            if "harken" not in workers:
                raise WorkerError(left_out["harken"])
            taken = take_steps(workers, args.warmup, args.steps)
            memory = {peer: worker.ask("memory") for peer, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.close()
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    shares = {name: (fast if name.startswith("harken_fasthubert") else flops) / (peak * 1e12) for name in taken}
    summary = summarise(taken, memory, args.batch * args.seconds, shares)
    return {"settings": settings, "machine": {**about, "peak_tflops": peak}, "step_flops": flops,
            "left_out": left_out, "steps": taken, "figures": summary}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    args = parse(arguments)
    try:
        result = measure(args)
    except WorkerError as error:
        print(f"train_step.py: {error}", file=sys.stderr)
        return 1
    about = result["machine"]
    print(
        f"HuBERT Base, {args.layers} layers, {args.batch} x {args.seconds:g} s, {args.precision}, {args.device}, "
        f"{args.threads} threads; median of {args.steps} steps after {args.warmup}\n{about['processor']}, load before "
        f"{about['load_before']:.1f}, torch {about['torch']}, peak {about['peak_tflops']:.3f} TFLOP/s\n"
    )
    print(table(result["figures"]))
    for name, reason in result["left_out"].items():
        print(f"left out: {name}: {reason.splitlines()[-1]}")
    if args.json is not None:
        given = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["python", "tools/bench/train_step.py", *given])
        write_json_atomic(args.json, {"command": command, **result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
