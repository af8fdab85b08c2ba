"""Files that are either whole or absent: every write goes to a temporary name and is renamed when it is on the disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harken.core.errors import HarkenError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield the name of a temporary file beside `path`; on success it is synced and takes the name `path`.

    On an exception the temporary is removed and `path` is left as it was.
    Raises HarkenError when `path` is a folder: a file never takes the place of one.
    """
    path = Path(path)
    if path.is_dir():
        raise HarkenError(f"{path} is a folder and cannot be written as a file: name a file in it")
    with _temporary(path) as temporary:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        _sync_one(path.parent)


@contextmanager
def atomic_folder(path: str | Path, *, kind: str, files: Collection[str] = ()) -> Iterator[Path]:
    """Yield a new, empty temporary folder beside `path`; on success it is synced and takes the name `path`.

    kind, files: see `check_replaceable`, which is asked before and after; on an exception `path` is left as it was.
    """
    path = Path(path)
    check_replaceable(path, kind=kind, files=files)
    with _temporary(path) as temporary:
        temporary.mkdir()
        yield temporary
        sync(temporary)
        check_replaceable(path, kind=kind, files=files)  # something may have been put there meanwhile
        old = path.with_name(f"{temporary.name}.old")
        if path.is_dir():
            path.replace(old)
        temporary.replace(path)
        remove(old)
        _sync_one(path.parent)


def check_replaceable(path: str | Path, *, kind: str, files: Collection[str] = ()) -> None:
    """Raise HarkenError unless a folder of `kind` may be written at `path` without losing anything of the user's.

    It may where nothing is, where an empty folder is, and where a folder holds all of `files` and nothing else: those
    are the names of what harken itself writes into a folder of this kind. Without `files` none is ever replaced.
    """
    path = Path(path)
    if path.is_dir():
        found = {entry.name for entry in path.iterdir()}
        if found and found != set(files):
            strange, lacking = sorted(found - set(files)), sorted(set(files) - found)
            why = f"holds {_some(strange)}" if strange else f"lacks {_some(lacking)}"
            raise HarkenError(
                f"{path} exists already and {why}, so it is no {kind} that may be replaced; nothing was changed: "
                "name another folder, or move this one away"
            )
    elif path.exists():
        raise HarkenError(f"{path} is a file where a folder ({kind}) is to be written: name another folder")


def _some(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` at which nothing is, and remove what is there when an exception passes."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
    except OSError as error:
        raise HarkenError(f"cannot write {path}: {error.strerror or error}: {error.filename}") from error
    try:
        yield temporary
    except BaseException:
        remove(temporary)
        raise


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 so that a reader sees the old file or the new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n")


def sha256_file(path: str | Path) -> str:
    """Return the hex SHA-256 of a file's bytes, read in blocks."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or every file below a folder and the folders themselves, to the disk."""
    if path.is_dir():
        for entry in sorted(path.rglob("*")):
            _sync_one(entry)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
