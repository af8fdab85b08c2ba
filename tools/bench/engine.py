"""What DeepSpeed costs: a step of one model under each ZeRO stage beside one in plain torch. See README.md."""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from hubert_peers import Harken, Options, PlainLoop, answer_for, configuration
from hubert_step import aligned, machine
from lockstep import Answer, Worker, WorkerError, serve
from step_options import DEVICES, add_step_options, options_of, parse_steps
from torch import Tensor, nn

from harken.core.batch import Batch
from harken.core.files import write_json_atomic
from harken.engine.memory import keep_what_is_free

STAGES = ("plain", "0", "1", "2", "3")
WAITS = 900.0  # seconds for the ranks of a loop to take a step


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Measure a training step under DeepSpeed, at each ZeRO stage, beside one in plain torch.",
        epilog="example: python tools/bench/engine.py --nproc 2 --threads 1 --json engine.json",
    )
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="plain is torch's DDP (default: all)"
    )
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes of each (default: 1)")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    add_step_options(parser, steps=8)
    parser.add_argument("--worker", choices=STAGES, help=argparse.SUPPRESS)
    args = parse_steps(parser)
    if "plain" not in args.stages:
        parser.error("--stages must name plain, which the others are compared with")
    return args


class Objective(nn.Module):
    """harken's HuBERT as a module that returns a mean loss: what plain torch trains."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        from harken.config.registry import build
        from harken.encoders.backbone import build_backbone

        config = configuration(options)
        self.objective = build("objective", config.objective, run=config, backbone=build_backbone(config))

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of a batch over its number of targets."""
        return cast(Tensor, self.objective(batch).total / batch.num_targets)


def plain(options: Options) -> nn.Module:
    """Return a model in plain torch that keeps memory as harken does, under DDP where there are several processes."""
    if options.device == "cpu":
        keep_what_is_free()  # it is no part of what DeepSpeed costs
    model = Objective(options).to(options.device)
    if int(os.environ["WORLD_SIZE"]) == 1:
        return model
    torch.distributed.init_process_group("nccl" if options.device == "cuda" else "gloo")
    return nn.parallel.DistributedDataParallel(model)


class StagedHarken(Harken):
    """harken's engine at one ZeRO stage."""

    def __init__(self, options: Options, stage: int) -> None:
        super().__init__(options)
        engine = replace(self.config.engine, zero_stage=cast(Any, stage))
        self.config = replace(self.config, engine=engine)


def begin(args: argparse.Namespace) -> Answer:
    """Return what answers for one rank of one loop."""
    options = options_of(args)
    options = replace(options, seed=options.seed + int(os.environ["RANK"]))
    if args.worker == "plain":
        return answer_for(PlainLoop(options, plain), options)
    return answer_for(StagedHarken(options, int(args.worker)), options)


class Ranks:
    """The processes of one loop, which answer together."""

    def __init__(self, stage: str, args: argparse.Namespace, folder: Path) -> None:
        """Start them; they meet at a free port of this machine."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.workers = []
        for rank in range(args.nproc):
            meet = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(args.nproc)}
            meet |= {"LOCAL_WORLD_SIZE": str(args.nproc), "MASTER_ADDR": "127.0.0.1"}
            meet |= {"MASTER_PORT": str(port)} if args.nproc > 1 else {}
            words = ["env", *(f"{name}={value}" for name, value in meet.items())]
            words += [sys.executable, __file__, *sys.argv[1:], "--worker", stage]
            log = folder / f"{stage}-{rank}.log"
            self.workers.append(Worker(f"{stage} rank {rank}", words, threads=args.threads, log=log))
        self.pool = ThreadPoolExecutor(args.nproc)

    def ask(self, request: str, **arguments: Any) -> list[dict[str, Any]]:
        """Ask every rank at once; raises WorkerError as soon as one has ended."""
        waiting = [self.pool.submit(worker.ask, request, **arguments) for worker in self.workers]
        return [future.result(WAITS) for future in waiting]

    def close(self) -> None:
        """End them."""
        for worker in self.workers:
            worker.close()
        self.pool.shutdown()


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Let the loops take steps in turn; a step takes as long as its slowest rank."""
    loops = {stage: Ranks(stage, args, folder) for stage in args.stages}
    taken: dict[str, list[dict[str, float]]] = {stage: [] for stage in loops}
    try:
        for ranks in loops.values():
            ranks.ask("build", folder=str(folder))
        for step in range(args.warmup + args.steps):
            for stage, ranks in loops.items():
                answers = ranks.ask("step", step=step)
                found = {name: max(answer[name] for answer in answers) for name in ("seconds", "cpu_seconds")}
                taken[stage].append(found)
            print(
                ", ".join(f"{stage} {taken[stage][-1]['seconds']:.2f} s" for stage in loops),
                file=sys.stderr,
                flush=True,
            )
        memory = {stage: ranks.ask("memory") for stage, ranks in loops.items()}
    finally:
        for ranks in loops.values():
            ranks.close()
    return [row(stage, taken, memory, args) for stage in loops]


def row(
    stage: str,
    taken: dict[str, list[dict[str, float]]],
    memory: dict[str, list[dict[str, int]]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Return the figures of a loop: medians over steps of what it takes more than plain torch."""
    own, base = (taken[name][args.warmup :] for name in (stage, "plain"))
    more = {
        name: 100 * statistics.median(a[name] / b[name] - 1 for a, b in zip(own, base, strict=True))
        for name in ("seconds", "cpu_seconds")
    }
    audio = args.nproc * args.batch * args.seconds
    return {
        "stage": stage,
        "audio_seconds_per_second": audio / statistics.median(step["seconds"] for step in own),
        "more_seconds_percent": more["seconds"],
        "more_cpu_percent": more["cpu_seconds"],
        "peak_mib": max(rank["peak"] - rank["after_imports"] for rank in memory[stage]) / 2**20,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the figures as a Markdown table."""
    cells = [["", "audio s/s", "more time than plain, %", "more CPU time, %", "peak MiB of a process"]]
    for found in rows:
        name = "plain torch" if found["stage"] == "plain" else f"ZeRO {found['stage']}"
        cells.append(
            [
                name,
                f"{found['audio_seconds_per_second']:.2f}",
                f"{found['more_seconds_percent']:.1f}",
                f"{found['more_cpu_percent']:.1f}",
                f"{found['peak_mib']:.0f}",
            ]
        )
    return aligned(cells)


def main() -> int:
    """Measure, print the table, write the JSON."""
    args = parse()
    if args.worker:
        serve(lambda: begin(args))
        return 0
    about = machine(packages=())
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        try:
            rows = measure(args, Path(folder))
        except WorkerError as error:
            print(f"engine.py: {error}", file=sys.stderr)
            return 1
    print(
        f"HuBERT Base, {args.layers} layers, {args.batch} x {args.seconds:g} s a process, {args.precision}, "
        f"{args.device}, {args.nproc} processes of {args.threads} threads; {about['processor']}, load before "
        f"{about['load_before']:.1f}, torch {about['torch']}, DeepSpeed {about['deepspeed']}\n"
    )
    print(table(rows))
    if args.json is not None:
        settings = {name: value for name, value in vars(args).items() if name not in ("json", "worker")}
        write_json_atomic(args.json, {"settings": settings, "machine": about, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
