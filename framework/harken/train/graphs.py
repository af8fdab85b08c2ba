"""How many graphs `torch.compile` has made."""

from __future__ import annotations


class GraphCounter:
    """Counts the graphs that this process has compiled."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._before = 0

    def read(self) -> dict[str, float]:
        """Return the graphs made since the last call as `compiled_graphs`; nothing where nothing is compiled."""
        if not self.enabled:
            return {}
        from torch._dynamo.utils import counters

        made = counters["stats"]["unique_graphs"]
        new, self._before = made - self._before, made
        return {"compiled_graphs": float(new)}
