"""Before several nodes train: is each there, does it see the folder, agree about time and versions, send fast enough.

One process a node, which srun starts. What can fail on one node alone is checked before any collective, and each node
leaves word of itself in the shared folder, so that a node that does not come, or cannot be reached, is named.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import harken
from harken.cluster.settings import PreflightConfig
from harken.cluster.slurm import node_names
from harken.cluster.spread import Allocation, srun
from harken.core.errors import HarkenError
from harken.core.files import remove, write_json_atomic

UNFIT = 69  # EX_UNAVAILABLE of sysexits.h: the same command may go on elsewhere
BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
ROUNDS = 5


@dataclass(frozen=True)
class Node:
    """A node of the job. number: from 0. names: of all nodes, by number. job: Slurm's id of the job and its step."""

    number: int
    names: list[str]
    job: str

    @property
    def name(self) -> str:
        """Slurm's name of this node."""
        return self.names[self.number]

    @staticmethod
    def here() -> Node:
        """Return the node that this process runs on.

        Raises HarkenError outside of a step of a Slurm job.
        """
        environment = os.environ
        if "SLURM_PROCID" not in environment:
            raise HarkenError("`harken preflight` must be started by srun, found no SLURM_PROCID")
        names = node_names(environment["SLURM_STEP_NODELIST"])
        return Node(
            int(environment["SLURM_PROCID"]), names, f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}"
        )


@dataclass(frozen=True)
class Word:
    """What a node says about itself when it comes. time: its clock, seconds since 1970."""

    node: str
    host: str
    versions: str
    gpus: int
    time: float


def preflight_command(job: Allocation, folder: Path, expected: PreflightConfig) -> list[str]:
    """Return the command that checks the nodes of a job."""
    words = ["--folder", str(folder), "--address", job.address, "--port", str(job.port), "--gpus", str(job.gpus)]
    words += ["--wait-seconds", str(expected.wait_seconds)]
    words += ["--max-clock-skew-seconds", str(expected.max_clock_skew_seconds)]
    if expected.gigabytes_per_second is not None:
        words += ["--gigabytes-per-second", str(expected.gigabytes_per_second)]
    return [*srun(job), sys.executable, "-m", "harken.apps.main", "preflight", *words]


class Preflight:
    """The checks of one node; the first node judges."""

    def __init__(self, node: Node, folder: Path, address: str, port: int, gpus: int, expected: PreflightConfig) -> None:
        self.node, self.folder, self.expected, self.gpus = node, folder, expected, gpus
        self.address, self.port = address, port
        self.words = folder / ".preflight" / node.job

    def run(self) -> int:
        """Check this node, then all of them together; return 0, or UNFIT after naming what is wrong."""
        try:
            self._come()
            words = self._gather()
            complaint = judge(words, self.gpus) if self.node.number == 0 else ""
            complaint = self._together(complaint)
        except HarkenError as error:
            complaint = str(error)
        if complaint and (self.node.number == 0 or self.node.name in complaint):
            print(f"harken preflight: {complaint}", file=sys.stderr, flush=True)
        if self.node.number == 0:
            remove(self.words)
        return UNFIT if complaint else 0

    def _come(self) -> None:
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}, harken {harken.__version__}"
        word = Word(self.node.name, socket.gethostname(), versions, gpus, time.time())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self.words / f"{self.node.number}.json", asdict(word))
        except (OSError, HarkenError) as error:
            raise HarkenError(
                f"node {self.node.name} cannot write into {self.folder}, which every node must see: {error}"
            ) from error

    def _gather(self) -> list[Word]:
        """Wait until every node has left its word, and return them by number; each node waits for all."""
        paths = [self.words / f"{number}.json" for number in range(len(self.node.names))]
        until = time.monotonic() + self.expected.wait_seconds
        while not all(path.exists() for path in paths):
            if time.monotonic() > until:
                lost = [name for name, path in zip(self.node.names, paths, strict=True) if not path.exists()]
                raise HarkenError(
                    f"node {', '.join(lost)} has not come within {self.expected.wait_seconds} s, or does not see "
                    f"{self.folder}, which every node must: look at it with `scontrol show node {lost[0]}`, or leave "
                    f"it out with `--exclude={','.join(lost)}` in `options` of cluster.yaml"
                )
            time.sleep(0.2)
            list(self.words.iterdir())  # makes network file systems look again
        return [Word(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]

    def _together(self, complaint: str) -> str:
        """Share the first node's judgement, then measure; return what is wrong on every node."""
        import torch
        import torch.distributed as dist

        device = "cuda" if self.gpus else "cpu"
        try:
            dist.init_process_group(
                "nccl" if self.gpus else "gloo",
                init_method=f"tcp://{self.address}:{self.port}",
                rank=self.node.number,
                world_size=len(self.node.names),
                timeout=timedelta(seconds=self.expected.wait_seconds),
            )
            if self.gpus:
                torch.cuda.set_device(0)
            box = [complaint]
            dist.broadcast_object_list(box, src=0, device=torch.device(device))
            if box[0]:
                return box[0]
            skews, speeds = self._skews(device), self._speeds(device)
            box = [self._judge_measured(skews, speeds) if self.node.number == 0 else ""]
            dist.broadcast_object_list(box, src=0, device=torch.device(device))
        except (RuntimeError, ValueError) as error:
            raise HarkenError(
                f"node {self.node.name} cannot talk to {self.address}:{self.port}, the first node "
                f"({self.node.names[0]}), or to another: {error}. Is there a firewall, or a wrong network interface "
                "(`export NCCL_SOCKET_IFNAME=...` or GLOO_SOCKET_IFNAME in `setup` of cluster.yaml)?"
            ) from error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return box[0]

    def _skews(self, device: str) -> list[float]:
        """Return how far the clock of each node is from the first's, in seconds: the least of some rounds."""
        import torch
        import torch.distributed as dist

        least = [float("inf")] * len(self.node.names)
        for _ in range(ROUNDS):
            dist.barrier()
            own = torch.tensor([time.time()], dtype=torch.float64, device=device)
            all_times = [torch.zeros_like(own) for _ in least]
            dist.all_gather(all_times, own)
            differences = [float(moment - all_times[0]) for moment in all_times]
            least = [min(old, new, key=abs) for old, new in zip(least, differences, strict=True)]
        return least

    def _speeds(self, device: str) -> list[float]:
        """Return the bus bandwidth, in GB/s, of an all-reduce of the first node with each: of all, at place 0.

        Source: nccl-tests, doc/PERFORMANCE.md: 2 (n - 1) / n times size over time.
        """
        import torch
        import torch.distributed as dist

        count = len(self.node.names)
        groups = [list(range(count)), *([0, other] for other in range(1, count))]
        tensor = torch.ones(BYTES[device] // 4, device=device)
        speeds = []
        for ranks in groups:
            group = dist.new_group(ranks)
            seconds = float("inf")
            if self.node.number in ranks:
                for _ in range(ROUNDS):
                    began = time.perf_counter()
                    dist.all_reduce(tensor, group=group)
                    if device == "cuda":
                        torch.cuda.synchronize()
                    seconds = min(seconds, time.perf_counter() - began)
            speeds.append(2 * (len(ranks) - 1) / len(ranks) * BYTES[device] / seconds / 1e9)
        return speeds

    def _judge_measured(self, skews: Sequence[float], speeds: Sequence[float]) -> str:
        complaint = judge_measured(self.node.names, skews, speeds, self.expected)
        if not complaint:
            print(
                f"harken preflight: {len(self.node.names)} nodes see {self.folder}; clocks within "
                f"{max(map(abs, skews)):.2f} s; all-reduce of all {speeds[0]:.2f} GB/s, slowest with "
                f"{self.node.names[0]}: {min(speeds[1:]):.2f} GB/s",
                flush=True,
            )
        return complaint


def judge(words: Sequence[Word], gpus: int) -> str:
    """Return what is wrong with what nodes say about themselves; the first is what others are compared with."""
    for word in words:
        if word.gpus < gpus:
            return f"node {word.node} must have {gpus} GPUs, torch sees {word.gpus}: look at `nvidia-smi` there"
        if word.versions != words[0].versions:
            return (
                f"node {word.node} runs {word.versions}, node {words[0].node} {words[0].versions}: all must run the "
                "same environment"
            )
    return ""


def judge_measured(
    names: Sequence[str], skews: Sequence[float], speeds: Sequence[float], expected: PreflightConfig
) -> str:
    """Return what is wrong with the clocks and the network; see `Preflight._skews` and `_speeds` for the values."""
    worst = max(range(len(names)), key=lambda number: abs(skews[number]))
    if abs(skews[worst]) > expected.max_clock_skew_seconds:
        return (
            f"the clock of node {names[worst]} is {skews[worst]:+.1f} s from that of node {names[0]}, at most "
            f"{expected.max_clock_skew_seconds} s is allowed: is time synchronised there (chrony, ntpd)?"
        )
    wanted = expected.gigabytes_per_second
    slow = [number for number in range(1, len(names)) if wanted and speeds[number] < wanted / 2]
    if not slow:
        return ""
    pairs = ", ".join(f"{names[number]} {speeds[number]:.2f}" for number in slow)
    who = (
        f"node {names[0]} is slow with every other"
        if len(slow) == len(names) - 1 > 1
        else f"node {names[slow[0]]} is slow"
    )
    return (
        f"{who}: an all-reduce with {names[0]} has, in GB/s, {pairs}; expected are {wanted} "
        "(`preflight.gigabytes_per_second` of cluster.yaml, half of it is let pass)"
    )
