"""One piece of work at a time beside the training: writing what was copied, while the next steps are taken."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Writer:
    """Runs work in a thread and keeps the error that ended it until it is asked for.

    The work must not talk to other ranks: their order of collectives is the training thread's.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin the work; `finish` must have ended the one before."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001  handed on, whatever it is
                self._error = error

        # no daemon: a run that ends by an error finishes the checkpoint that it had begun
        thread = threading.Thread(target=run, name="checkpoint")
        try:
            thread.start()
        except RuntimeError:  # no memory for a thread's stack: training waits this once
            run()
        else:
            self._thread = thread

    @property
    def failed(self) -> bool:
        """Whether the work has ended with an error that `finish` has not returned yet."""
        return self._error is not None

    def finish(self) -> Exception | None:
        """Wait for the end of the work and return the error that ended it, once."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        return error
