"""A window of steps under torch.profiler: what the main process spends its time on, operator by operator."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from harken.core import distributed
from harken.core.files import atomic_path
from harken.train.log import say


class Profile:
    """Traces the steps of `log.profile` on the main process into `EXP/profile`; elsewhere it does nothing.

    window: the first step, from 1, and how many. Tracing costs time: the figures of these steps are not to be reported.
    """

    def __init__(self, folder: Path, window: tuple[int, ...]) -> None:
        self.folder, self.window = folder, window if distributed.is_main() else ()
        self._profiler: profile | None = None
        self._begun = 0

    def begin(self, step: int) -> None:
        """Start tracing when a step that is about to be taken is in the window; one that a restart fell into, too."""
        if not self.window or self._profiler is not None:
            return
        first, steps = self.window
        if first <= step < first + steps:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.start()
            self._begun = step

    def end(self, step: int) -> None:
        """Write the trace after the last step of the window."""
        if self._profiler is not None and step >= sum(self.window) - 1:
            self._write(step)

    def close(self) -> None:
        """Drop a trace that is not whole: a run that was stopped in the window traces what is left when it goes on."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, step: int) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        # the name by which TensorBoard's profile plugin knows a trace
        path = self.folder / "profile" / f"rank0.steps-{self._begun}-{step}.pt.trace.json"
        with atomic_path(path) as temporary:
            self._profiler.export_chrome_trace(str(temporary))
        self._profiler = None
        say(f"profile of steps {self._begun} to {step}: {path}; chrome://tracing and https://ui.perfetto.dev show it")
