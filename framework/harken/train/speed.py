"""How fast a run is: audio seconds a second, padding, time waiting for data, share of the device's peak."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from harken.core import distributed
from harken.core.batch import Batch

# dense bf16 peaks from NVIDIA's data sheets, TFLOP/s
_KNOWN_PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A6000": 155.0, "V100": 125.0, "T4": 65.0}
_MEASURED_SECONDS = 0.2


def peak_tflops(dtype: torch.dtype) -> float:
    """Return the peak of this process's device in TFLOP/s: a data sheet's for a known GPU, else measured.

    Measured means the best of many large matrix products in `dtype`, so utilisation is relative to what torch can
    reach here.
    """
    device = distributed.device()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peak in _KNOWN_PEAKS.items():
            if known in name:
                return peak
    return max(_measured(size, device, dtype) for size in ((4096, 8192) if device.type == "cuda" else (512, 1024)))


def _measured(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the rate of the fastest product of square matrices in TFLOP/s.

    Small ones and many, as one that takes longer than the system's slice of time is never seen whole where another
    program wants the cores.
    """
    a = torch.randn(size, size, device=device, dtype=dtype)
    begun = time.perf_counter()
    best, products = float("inf"), 0
    while products < 5 or time.perf_counter() - begun < _MEASURED_SECONDS:
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best, products = min(best, time.perf_counter() - start), products + 1
    return 2 * size**3 / best / 1e12


def memory_gib() -> float:
    """Return the largest memory so far in GiB: of the GPU's allocator, or of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts it in KiB


@dataclass
class Speedometer:
    """Sums of one log interval on this rank.

    measure: how to measure the peak again, when a run exceeds what was measured (as the machine was busy then).
    waited, updated, logged: seconds that the loop waited for data, that the optimiser and what follows it took
    (averages, teachers), and that the last log line took. These two are shown on CPUs alone: a GPU works on meanwhile.
    """

    sample_rate: int
    peak: float
    measure: Callable[[], float] | None = None
    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    updated: float = 0.0
    logged: float = 0.0
    excluded: float = 0.0
    flops: float = 0.0
    real: float = 0.0
    padded: float = 0.0

    def add(self, batch: Batch, flops: float) -> None:
        """Count a batch."""
        self.real += batch.real / self.sample_rate
        self.padded += batch.padded / self.sample_rate
        self.flops += flops

    def read(self) -> dict[str, float]:
        """Return the interval's figures over all ranks and start anew; validating and saving are not in them."""
        now = time.perf_counter()
        elapsed = max(now - self.started - self.excluded, 1e-9)
        spent = (self.waited, self.updated, self.logged)
        real, padded, flops, *spent_by_all = distributed.sum_over_ranks([self.real, self.padded, self.flops, *spent])
        world = distributed.world_size()
        waited, updated, logged = (100 * seconds / world / elapsed for seconds in spent_by_all)
        reached = flops / world / elapsed / 1e12
        if self.measure is not None and reached > self.peak:
            self.peak = max(self.peak, self.measure())
            now = time.perf_counter()  # the next interval starts behind it
        figures = {
            "audio_seconds_per_second": real / elapsed,
            "padding_percent": 100 * (1 - real / padded) if padded else 0.0,
            "data_wait_percent": waited,
            **({"update_percent": updated, "logging_percent": logged} if distributed.device().type == "cpu" else {}),
            "mfu_percent": 100 * reached / self.peak,
            "memory_gib": memory_gib(),
        }
        self.started, self.waited, self.updated, self.logged, self.excluded = now, 0.0, 0.0, 0.0, 0.0
        self.flops = self.real = self.padded = 0.0
        return figures
