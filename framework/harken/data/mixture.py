"""Mixtures: several corpora in stated shares, dealt out without epochs.

A mixture is a YAML file, a tree as deep as one likes (language, corpus, ...):

    temperature: 0.5            # over the sources below: share proportional to weight * hours ** temperature
    max_repeats: 8              # of a source below that states none
    sources:
      english:
        temperature: 0.7
        sources:
          read: {manifest: read.jsonl}
          talks: {manifest: talks.jsonl, weight: 2}
      german: {manifest: german.jsonl, max_repeats: 20}

Temperature 1 mixes by hours, 0 gives every source of that level the same share. The exponent is alpha of XLM-R (arXiv
1911.02116) and XLS-R (arXiv 2111.09296, section 3), there 0.3 to 0.7.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harken.config.load import read_yaml
from harken.config.rules import check_numbers
from harken.config.structure import structure
from harken.core.errors import HarkenError
from harken.data.manifest import Manifest

if TYPE_CHECKING:
    from lhotse.cut import Cut

SUFFIXES = {".yaml", ".yml"}


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One node of the tree: a manifest, or more sources."""

    manifest: str | None = None
    """Indexed manifest, relative to the mixture's folder."""
    weight: float = 1.0
    """Factor on its share among its neighbours."""
    temperature: float = 1.0
    """Exponent of the hours of the sources below."""
    max_repeats: float | None = None
    """How often its cuts may be read; then its share goes to the others. None is the one of the level above."""
    sources: dict[str, Any] = field(default_factory=dict)
    """The sources below, by name."""

    def __post_init__(self) -> None:
        check_numbers(self, "a source", positive=("weight", "max_repeats"), not_negative=("temperature",))
        if (self.manifest is None) == (not self.sources):
            raise HarkenError("a source has either a `manifest` or `sources`, got both or none")


@dataclass(frozen=True)
class Leaf:
    """A corpus of a mixture: share of the seconds, passes over it that are allowed."""

    name: str
    manifest: Manifest
    share: float
    max_repeats: float


@dataclass(frozen=True)
class _Node:
    name: str
    config: SourceConfig
    below: list[_Node]
    manifest: Manifest | None
    seconds: float


def is_mixture(path: str | Path) -> bool:
    """Whether a path names a mixture and not a manifest."""
    return Path(path).suffix in SUFFIXES


def read_mixture(path: str | Path) -> list[Leaf]:
    """Read a mixture's file and open its manifests.

    Raises HarkenError naming the source that is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise HarkenError(f"no mixture at {path}: `data.train` names a manifest (.jsonl) or a mixture of them (.yaml)")
    root = _node("", read_yaml(path), path)
    leaves = list(_leaves(root, 1.0, float("inf")))
    files: dict[Path, str] = {}
    for leaf in leaves:
        other = files.setdefault(leaf.manifest.path.resolve(), leaf.name)
        if other != leaf.name:
            raise HarkenError(
                f"{path}: `{other}` and `{leaf.name}` are the same manifest {leaf.manifest.path}: "
                "name it once, with the weight it should have"
            )
    return leaves


def _node(name: str, data: Any, path: Path) -> _Node:
    where = f"{path}: source `{name}`" if name else str(path)
    if not isinstance(data, dict):
        raise HarkenError(f"{where} must be a group of keys, got {data!r}")
    try:
        config = structure(SourceConfig, data)
    except HarkenError as error:
        raise HarkenError(f"{where}: {error}") from error
    below = [_node(f"{name}/{child}" if name else str(child), value, path) for child, value in config.sources.items()]
    if config.manifest is None:
        return _Node(name, config, below, None, sum(node.seconds for node in below))
    manifest = Manifest.filled(path.parent / config.manifest)
    return _Node(name, config, [], manifest, float(np.asarray(manifest.seconds).sum(dtype=np.float64)))


def _leaves(node: _Node, share: float, repeats: float) -> Iterator[Leaf]:
    repeats = repeats if node.config.max_repeats is None else node.config.max_repeats
    if node.manifest is not None:
        yield Leaf(node.name or node.manifest.path.stem, node.manifest, share, repeats)
        return
    sizes = [other.config.weight * other.seconds**node.config.temperature for other in node.below]
    for other, size in zip(node.below, sizes, strict=True):
        yield from _leaves(other, share * size / sum(sizes), repeats)


class Joined:
    """Several manifests as one, end to end; what a loader needs of a manifest."""

    def __init__(self, path: Path, manifests: list[Manifest]) -> None:
        self.path, self.manifests = path, manifests
        self.starts = np.cumsum([0, *map(len, manifests)])

    @cached_property
    def seconds(self) -> NDArray[np.float32]:
        """Duration of each cut, `(N,)`."""
        return np.concatenate([np.asarray(manifest.seconds) for manifest in self.manifests])

    @cached_property
    def characters(self) -> NDArray[np.uint32]:
        """Characters of each cut's text, `(N,)`; 0 where it has none."""
        return np.concatenate([np.asarray(manifest.characters) for manifest in self.manifests])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _at(self, place: int) -> tuple[Manifest, int]:
        source = int(np.searchsorted(self.starts, place, side="right")) - 1
        return self.manifests[source], place - int(self.starts[source])

    def line(self, place: int) -> dict[str, Any]:
        """Return the plain data of the cut at a place."""
        manifest, own = self._at(place)
        return manifest.line(own)

    def __getitem__(self, place: int) -> Cut:
        """Return the Lhotse cut at a place."""
        manifest, own = self._at(place)
        return manifest[own]
