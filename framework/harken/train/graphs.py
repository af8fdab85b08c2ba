"""How many graphs `torch.compile` has made."""

from __future__ import annotations


class GraphCounter:
    """Counts the graphs that this process has compiled."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._before = self._made() if enabled else 0

    def read(self) -> dict[str, float]:
        """Return the graphs made since the last call as `compiled_graphs`; nothing where nothing is compiled."""
        if not self.enabled:
            return {}
        made = self._made()
        new, self._before = made - self._before, made
        return {"compiled_graphs": float(new)}

    @staticmethod
    def _made() -> int:
        from torch._dynamo.utils import counters

        return int(counters["stats"]["unique_graphs"])
