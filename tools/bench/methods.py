"""A step of each pretraining method beside HuBERT's on the same encoder, in turn, on the default corpus. See README."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hubert_step import machine
from lockstep import Answer, Worker, WorkerError, serve

from harken.core.files import write_json_atomic

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "egs/amazon_queen"
METHODS = RECIPE / "conf/methods"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Measure a pretraining step of each method beside HuBERT's on the same frontend and encoder.",
        epilog="example: python tools/bench/methods.py --units exp/amazon_queen/units1/labels --json speed.json",
    )
    everything = sorted(path.stem for path in METHODS.glob("*.yaml"))
    parser.add_argument("--methods", nargs="+", choices=everything, default=everything, metavar="NAME", help="all")
    parser.add_argument("--data", type=Path, default=RECIPE / "data", metavar="DIR", help="the recipe's (default)")
    parser.add_argument("--units", type=Path, required=True, metavar="DIR", help="units1/labels of run.sh")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="of a turn (default: 4)")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="timed, after one that is not (default: 5)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--worker", nargs="+", metavar="WORD", help=argparse.SUPPRESS)
    return parser.parse_args()


def training(arguments: list[str], folder: Path) -> Answer:
    """Build a run and return what takes its steps."""
    import resource

    from harken.apps.train import split_arguments
    from harken.config.load import load
    from harken.engine.deepspeed import start_processes
    from harken.engine.precision import resolved
    from harken.objectives.saved import build_objective, preparers
    from harken.train.loop import take_step
    from harken.train.run import build_run

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = load(*split_arguments(arguments)).config
    start_processes(config.engine)
    config = replace(config, engine=resolved(config.engine))
    prepare, spec = preparers(config)
    run = build_run(config, folder, build_objective, prepare, spec)
    reader = run.loader.steps(run.state.position)
    run.engine.model.train()

    def answer(request: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if request == "describe":
            count = sum(parameter.numel() for parameter in run.engine.model.parameters())
            return {"parameters": count, "labels": bool(config.data.labels)}
        samples, begin, spent = 0, time.perf_counter(), time.process_time()
        for _ in range(arguments["steps"]):
            step = next(reader)
            take_step(run, step)
            run.state.step += 1
            samples += sum(batch.real for batch in step.batches)
        return {
            "audio": samples / config.data.sample_rate,
            "seconds": time.perf_counter() - begin,
            "cpu": time.process_time() - spent,
            "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - imported) / 1024,
        }

    return answer


def arguments_of(args: argparse.Namespace, method: str, *, as_hubert: bool, folder: Path) -> list[str]:
    """Return what `harken train` would be given for a method, or for HuBERT on that method's frontend and encoder."""
    import yaml

    from harken.config.load import load, to_yaml

    common = [f"data.train={args.data}/train.jsonl", f"engine.threads={args.threads}", "log.tensorboard=false"]
    common.append("data.workers=0")  # views and mixing are part of what a method costs
    path = METHODS / f"{method}.yaml"
    resolved = yaml.safe_load(to_yaml(load([path], common).config))
    if not as_hubert:
        classes = resolved["objective"].get("classes", ())
        stores = ",".join([str(args.units)] * (len(classes) if isinstance(classes, list) else 0))
        return [str(path), *common, *([f"data.labels=[{stores}]"] if stores else [])]
    model = folder / f"{method}.yaml"
    model.write_text(yaml.safe_dump({part: resolved[part] for part in ("frontend", "encoder")}), encoding="utf-8")
    return [str(METHODS / "hubert.yaml"), str(model), *common, f"data.labels=[{args.units}]"]


def measure(args: argparse.Namespace, method: str, folder: Path) -> dict[str, Any]:
    """Return the figures of a method: speed and memory, and their ratios to HuBERT's.

    Raises WorkerError when one of the two cannot take a step.
    """
    workers = []
    for name, as_hubert in ((method, False), ("hubert", True)):
        own = folder / f"{method}-{name}-{as_hubert}"
        own.mkdir()
        words = arguments_of(args, method, as_hubert=as_hubert, folder=folder)
        command = [sys.executable, __file__, "--units", str(args.units), "--worker", str(own), *words]
        workers.append(Worker(name, command, threads=args.threads, log=own / "log"))
    try:
        described = workers[0].ask("describe")
        turns = [[worker.ask("steps", steps=args.steps) for worker in workers] for _ in range(args.turns + 1)]
    finally:
        for worker in workers:
            worker.close()
    timed = turns[1:]
    speeds = [[turn["audio"] / turn["cpu"] for turn in pair] for pair in timed]
    return {
        "method": method,
        **described,
        "audio_seconds_per_cpu_second": statistics.median(own for own, _ in speeds),
        "audio_seconds_per_second": statistics.median(own["audio"] / own["seconds"] for own, _ in timed),
        "speed_over_hubert": statistics.median(own / other for own, other in speeds),
        "peak_mib": timed[-1][0]["peak_mib"],
        "memory_over_hubert": timed[-1][0]["peak_mib"] / timed[-1][1]["peak_mib"],
    }


def _shown(value: Any) -> str:
    """Write a setting; a path below the project as one from there, as others have it elsewhere."""
    path = value.resolve() if isinstance(value, Path) else None
    return str(path.relative_to(ROOT) if path is not None and path.is_relative_to(ROOT) else value)


def main() -> None:
    """Print a line a method."""
    args = parse()
    if args.worker:
        serve(lambda: training(args.worker[1:], Path(args.worker[0])))
        return
    found: list[dict[str, Any]] = []
    print(f"{'method':16} {'parameters':>11} {'audio s/s':>9} {'/ HuBERT':>9} {'peak MiB':>9} {'/ HuBERT':>9}")
    for method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = measure(args, method, Path(folder))
            except WorkerError as error:
                print(f"{method:16} left out: {str(error).strip().splitlines()[-1]}", flush=True)
                continue
        found.append(row)
        print(
            "{method:16} {parameters:>11,} {audio_seconds_per_second:>9.1f} {speed_over_hubert:>9.2f} {peak_mib:>9.0f} "
            "{memory_over_hubert:>9.2f}".format(**row),
            flush=True,
        )
    if args.json:
        settings = {key: _shown(value) for key, value in vars(args).items() if key not in ("json", "worker")}
        write_json_atomic(args.json, {"settings": settings, "machine": machine(), "methods": found})


if __name__ == "__main__":
    main()
