"""What a stream is made of: shards named by a folder, a pattern, a list or commands.

A text names a stream by what it is, so that no second key can contradict it:

    data/shar/                                  a folder that `harken data shards` or Lhotse wrote
    data/wds/train-{000000..000099}.tar         WebDataset tars, by brace expansion
    https://host/cuts.{000000..000099}.jsonl.gz Lhotse Shar by its lists of cuts; `recording.*.tar` is beside each
    pipe:ssh host cat /data/{0..9}.tar          the output of commands
    a::b                                        several of these, one after the other
    shards.txt                                  a file with one of these a line
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from harken.core.errors import HarkenError

TAR = re.compile(r"\.(tar|tar\.gz|tgz)$")
SHAR_CUTS = re.compile(r"""(?<![^/\s'"])cuts\.(\d+)\.jsonl(\.gz)?(?=[\s'"]|$)""")
"""The list of a shard's cuts by its file's name, at the end of a path or inside a command."""
SHAR_FILE = re.compile(r"cuts(\.\w+)?\.jsonl(\.gz)?")


@dataclass(frozen=True)
class Shard:
    """A part of a stream. audio: its tar. cuts: Shar's list of cuts; None for WebDataset, whose tar holds all."""

    audio: str
    cuts: str | None = None

    @property
    def remote(self) -> bool:
        """Whether it comes through a command or a network, where a second try may succeed."""
        return is_remote(self.audio)

    def __str__(self) -> str:
        return self.audio


def is_remote(entry: str) -> bool:
    """Whether text is a command or a URL rather than a path."""
    return entry.startswith("pipe:") or (":" in entry and re.match(r"[a-z][a-z0-9+.-]+://", entry) is not None)


def is_stream(text: str) -> bool:
    """Whether text names a stream; otherwise it is an indexed manifest, or nothing."""
    return (
        "::" in text
        or is_remote(text)
        or TAR.search(text) is not None
        or SHAR_CUTS.search(text) is not None
        or text.endswith(".txt")
        or Path(text).is_dir()
    )


def find_shards(text: str) -> list[Shard]:
    """Return the shards of a stream, in the order of its names.

    Raises HarkenError for what is neither Shar nor WebDataset, for a file that is not there and for one named twice.
    """
    shards = [shard for entry in _entries(text) for shard in _shards_of(entry, text)]
    twice = [shard for shard, count in Counter(shards).items() if count > 1]
    if twice:
        raise HarkenError(f"`{twice[0]}` occurs twice in the stream `{text}`: every epoch would read it twice")
    _check_files(shards, text)
    return shards


def _entries(text: str) -> list[str]:
    """Return the single paths, URLs and commands that text stands for."""
    from webdataset.shardlists import expand_urls

    path = Path(text)
    if text.endswith(".txt") and not is_remote(text) and "::" not in text:
        if not path.is_file():
            raise HarkenError(f"no list of shards at {path}: it has one path, URL or `pipe:` command a line")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        texts = [line for line in lines if line and not line.startswith("#")]
        if not texts:
            raise HarkenError(f"{path} lists no shards: it has one path, URL or `pipe:` command a line")
    else:
        texts = [text]
    try:
        return [str(entry) for item in texts for entry in expand_urls(item)]
    except ValueError as error:
        raise HarkenError(f"the braces of `{text}` cannot be expanded: {error}") from error


def _shards_of(entry: str, text: str) -> Iterator[Shard]:
    path = Path(entry)
    if not is_remote(entry) and path.is_dir():
        yield from _folder(path)
    elif SHAR_CUTS.search(entry):
        yield Shard(SHAR_CUTS.sub(r"recording.\1.tar", entry), entry)
    elif TAR.search(entry) or entry.startswith("pipe:"):
        yield Shard(entry)
    else:
        where = f" of the stream `{text}`" if entry != text else ""
        raise HarkenError(
            f"`{entry}`{where} must be a tar (WebDataset), `cuts.NUMBER.jsonl.gz` (Lhotse Shar) or a folder of them; "
            "an indexed manifest stands alone, and several are a mixture"
        )


def _folder(path: Path) -> list[Shard]:
    """Return the shards of a folder: Shar where it has lists of cuts, else its tars."""
    names = sorted(entry.name for entry in path.iterdir())
    lists = [found for name in names if (found := SHAR_FILE.fullmatch(name))]
    if lists:
        return [Shard(str(path / f"recording{found[1] or ''}.tar"), str(path / found[0])) for found in lists]
    tars = [name for name in names if TAR.search(name) and not name.startswith(".")]
    if not tars:
        raise HarkenError(
            f"the folder {path} must hold Lhotse Shar (`cuts.000000.jsonl.gz` and `recording.000000.tar`) or "
            "WebDataset (`*.tar`), and holds neither; of audio files `harken data scan` makes a manifest"
        )
    return [Shard(str(path / name)) for name in tars]


def _check_files(shards: Iterable[Shard], text: str) -> None:
    """Raise HarkenError unless every local file is there; each folder is listed once, not each file looked up."""
    local = [Path(name) for shard in shards for name in (shard.cuts, shard.audio) if name and not is_remote(name)]
    found = {
        folder: {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        for folder in {path.parent for path in local}
    }
    missing = [path for path in local if path.name not in found[path.parent]]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise HarkenError(f"the stream `{text}` lacks {missing[0]}{more} of {len(local)} files: copy it again")
