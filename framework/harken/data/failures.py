"""Errors of an objective's `Prepare`, which runs in the loader's workers: told with the cuts that they arose from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harken.core.batch import Batch
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.data.dataset import Prepare


@dataclass(frozen=True)
class NamingFailures:
    """A `Prepare` of which every error reaches the main process.

    Exceptions are pickled on their way there, and one whose class cannot be (it is defined in a function, say) would be
    lost, and the run would wait for its batch for ever.
    """

    prepare: Prepare

    def __call__(self, batch: Batch, draws: Sequence[Draws]) -> Batch:
        """Prepare a batch; HarkenErrors pass, any other error becomes a RuntimeError that names the cuts."""
        try:
            return self.prepare(batch, draws)
        except HarkenError:
            raise
        except Exception as error:
            cuts = ", ".join(batch.ids)
            raise RuntimeError(f"preparing cuts {cuts} failed with {type(error).__name__}: {error}") from error
