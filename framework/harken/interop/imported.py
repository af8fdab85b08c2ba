"""What every importer gives, and the folder that it is written as."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from harken.config.saved import save_model
from harken.config.schema import RunConfig
from harken.core.files import atomic_folder, check_replaceable, sha256_file, write_json_atomic
from harken.data.tokens import Characters

TOKENS = "tokens.txt"


@dataclass(frozen=True)
class Imported:
    """A harken model that was read from a checkpoint.

    symbols: for each codebook, the unit that each class stands for (empty where the checkpoint has no dictionary).
    updates: how long it was trained, 0 where the checkpoint does not say. notes: options that are not carried over.
    targets: what it predicts, in words. characters: those of its tokenizer, of a model that learned transcripts.
    """

    config: RunConfig
    weights: dict[str, Tensor]
    symbols: tuple[tuple[str, ...], ...]
    updates: int
    notes: tuple[str, ...]
    targets: str
    characters: tuple[str, ...] = ()


def classes_line(classes: Sequence[int]) -> str:
    """Return in words how many classes each codebook has."""
    return f"classes: {', '.join(map(str, classes))}"


def import_one(read: Callable[[Path], Imported], kind: str, path: str | Path, folder: str | Path) -> Imported:
    """Read a checkpoint of a format and write it as a model folder; see `write_imported`."""
    path, folder = Path(path), Path(folder)
    check_replaceable(folder, kind="imported model")  # before the work
    imported = read(path)
    write_imported(folder, imported, {"format": kind, "checkpoint": path.name, "sha256": sha256_file(path)})
    return imported


def write_imported(folder: Path, imported: Imported, source: Mapping[str, Any]) -> None:
    """Write a model folder, which `load_objective` and `load_backbone` open; `source` says what it was read from.

    Raises HarkenError when the folder holds something already.
    """
    about = {
        **source,
        "updates": imported.updates,
        "not_carried_over": imported.notes,
        "symbols": imported.symbols,
    }
    config = imported.config
    if imported.characters:
        tokens = str(folder.resolve() / TOKENS)
        config = replace(config, objective=replace(config.objective, tokenizer=tokens))  # type: ignore[call-arg]
    with atomic_folder(folder, kind="imported model") as temporary:
        save_model(temporary, config, imported.weights)
        if imported.characters:
            Characters(imported.characters).save(temporary / TOKENS)
        write_json_atomic(temporary / "imported.json", about)
