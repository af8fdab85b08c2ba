"""`harken job`: what the sbatch files of `harken launch` run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

HELP = "Run a command inside a Slurm job: have it save when Slurm warns, requeue it, stop a crash loop, keep a record."
EXAMPLE = (
    "harken job --exp exp/base --name train --resumes exp/base -- harken parallel -- train hubert_base --exp exp/base"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--exp", type=Path, required=True, help="folder of the experiment")
    parser.add_argument("--name", required=True, help="of the job")
    parser.add_argument("--resumes", type=Path, help="folder of the run whose checkpoints show progress")
    parser.add_argument(
        "--max-starts-without-progress", type=int, default=3, help="before the job is given up (default: 3)"
    )
    parser.add_argument("--retry", action="store_true", help="start again after a failure though it does not train")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after `--`: the program and its arguments")


def run(args: argparse.Namespace) -> int:
    """Run the command; the status is 0 only when it finished."""
    from harken.cluster.job import Job
    from harken.core.errors import HarkenError

    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise HarkenError("a command must follow after `--`, found none")
    if "SLURM_JOB_ID" not in os.environ:
        raise HarkenError("`harken job` must run in a job of Slurm, found no SLURM_JOB_ID: use `harken launch`")
    task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    # by its own id, the last task of an array would stand for all of them
    job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}" if task else os.environ["SLURM_JOB_ID"]
    return Job(
        args.exp,
        f"{args.name}-{task}" if task else args.name,
        command,
        args.resumes,
        id=job,
        nodes=os.environ.get("SLURM_JOB_NODELIST", ""),
        most=args.max_starts_without_progress,
        retry=args.retry,
    ).run()
