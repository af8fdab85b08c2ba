"""Reading a shard from its beginning to its end: its cuts with their audio, as bytes in memory."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from harken.core.errors import HarkenError
from harken.data.streams.shards import Shard

if TYPE_CHECKING:
    from lhotse.cut import Cut

AUDIO = frozenset({"wav", "flac", "mp3", "ogg", "opus", "m4a", "aac", "sph", "aiff", "au"})
GZIP = b"\x1f\x8b"
TRIES = 3
"""How often a command or a URL is asked before what it gives counts as broken."""


@dataclass(frozen=True)
class Lost:
    """A cut of a shard that cannot be had. id: its own, or `SHARD#PLACE` where that is unknown."""

    id: str
    reason: str


class _BreakError(Exception):
    """A shard ends before its time. lost: ids of the cuts that are known to be missing."""

    def __init__(self, reason: str, lost: list[str]) -> None:
        super().__init__(reason)
        self.lost = lost


def read_shard(shard: Shard) -> Iterator[Cut | Lost]:
    """Yield the cuts of a shard in its order, their audio in memory and not yet decoded.

    A shard that breaks off is read on after what it gave, where it comes through a network; otherwise, and after
    `TRIES`, the cuts that it lacks are given as `Lost`: each where their number is known, one for all where it is not.
    Raises HarkenError when a command or URL gives nothing at all, and for a shard that is not what it must be.
    """
    given = 0
    for attempt in range(1, TRIES + 1):
        try:
            for number, item in enumerate(_webdataset(shard) if shard.cuts is None else _shar(shard)):
                if number >= given:
                    given += 1
                    yield item
            return
        except _BreakError as error:
            if shard.remote and attempt < TRIES:
                time.sleep(attempt)
                continue
            if shard.remote and not given:
                raise HarkenError(f"nothing comes from the shard {shard} in {TRIES} tries: {error}") from error
            reason = f"shard {shard} breaks off after {given} cuts: {error}"
            for name in error.lost or [f"{shard}#{given}"]:
                yield Lost(name, reason)
            return


def _webdataset(shard: Shard) -> Generator[Cut | Lost, None, None]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    place, total = 0, None
    try:
        with closing(_Whole(shard.audio)) as stream:
            for sample in group_by_keys(tar_file_expander([{"url": shard.audio, "stream": stream}])):
                data = _description(sample, shard)
                total = data.get("shard_cuts", total)
                yield _sample(sample, data, shard)
                place += 1
            stream.finish(tar=True)
    except (HarkenError, GeneratorExit):
        raise
    except Exception as error:  # tarfile, zlib, the command, the network: each has its own kinds
        if place != total:  # else all were had, and what comes after them does not matter
            raise _BreakError(_words(error), _missing(shard, place, total)) from error
        return
    if total is not None and place < total:
        raise _BreakError(f"it ends before its {total} cuts", _missing(shard, place, total))


def _missing(shard: Shard, place: int, total: int | None) -> list[str]:
    return [f"{shard}#{number}" for number in range(place, total or 0)]


def _description(sample: dict[str, Any], shard: Shard) -> dict[str, Any]:
    """Return what a sample's JSON says, or nothing where it has none."""
    if "json" not in sample:
        return {}
    try:
        data = json.loads(sample["json"])
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise HarkenError(f"`{sample['__key__']}.json` of {shard} must be one JSON object")
    return data


def _sample(sample: dict[str, Any], data: dict[str, Any], shard: Shard) -> Cut | Lost:
    """Return the cut of a WebDataset sample: audio, and JSON or text about it."""
    from lhotse import Recording
    from lhotse.serialization import deserialize_item

    key = str(data.get("id", sample["__key__"]))
    audio = [name for name in sample if name.rsplit(".", 1)[-1] in AUDIO]
    if len(audio) != 1:
        pickled = "; Lhotse's pickled cuts are not read, for a pickle can run anything" if "data" in sample else ""
        found = ", ".join(f"`.{name}`" for name in sorted(sample) if not name.startswith("__"))
        raise HarkenError(
            f"sample `{sample['__key__']}` of {shard} must have one file of audio "
            f"({', '.join(sorted(AUDIO))}), got {found}{pickled}"
        )
    content = sample[audio[0]]
    if "cut" in data:
        cut = cast("Cut", deserialize_item(data["cut"]))
        _fill(cut.recording, content)
        return cut
    try:
        recording = Recording.from_bytes(content, key)
    except Exception as error:  # noqa: BLE001  each backend of Lhotse raises its own kinds
        return Lost(key, f"cut `{key}` of {shard} cannot be read: {_words(error)}")
    text = data.get("text", sample["txt"].decode("utf-8").strip() if "txt" in sample else None)
    return _with_words(recording, key, text, data)


def _with_words(recording: Any, key: str, text: str | None, data: dict[str, Any]) -> Cut:
    """Return a whole recording as a cut, its first channel, with its text and speaker where there are any."""
    from lhotse import MonoCut, SupervisionSegment

    cut = MonoCut(key, 0.0, recording.duration, recording.channel_ids[0], recording=recording)
    known = {name: data[name] for name in ("speaker", "language", "gender") if name in data}
    if text is not None or known:
        words = SupervisionSegment(key, key, 0.0, recording.duration, cut.channel, text=text, **known)
        cut.supervisions = [words]
    return cast("Cut", cut)


def _fill(recording: Any, content: bytes) -> None:
    recording.sources[0].type, recording.sources[0].source = "memory", content


def _shar(shard: Shard) -> Generator[Cut | Lost, None, None]:
    """Yield the cuts of a Shar shard.

    Lhotse's own iterator ends in silence where its tar is shorter than the list of cuts: this one knows what is lost.
    """
    from lhotse.serialization import deserialize_item
    from lhotse.shar.readers.tar import iterate_tarfile_pairwise

    assert shard.cuts is not None
    lines = _lines(shard.cuts)
    place = 0
    try:
        with closing(_Whole(shard.audio)) as stream, tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|*") as tar:
            pairs = iter(iterate_tarfile_pairwise(tar))
            for line in lines:
                cut = deserialize_item(json.loads(line))
                (content, path), (about, _) = next(pairs, ((None, None), (None, None)))
                if path is None:
                    raise EOFError("unexpected end of data")
                if str(Path(path).parent / Path(path).stem) != cut.id:
                    raise HarkenError(
                        f"{shard.audio} must hold the audio of {shard.cuts} in its order, got `{path}` for `{cut.id}`"
                    )
                yield _with_audio(cut, content, about, shard)
                place += 1
                cast("Any", tar).members = []  # or every header that was read stays in memory
            stream.finish(tar=True)
    except (HarkenError, GeneratorExit):
        raise
    except Exception as error:
        lost = [json.loads(line)["id"] for line in lines[place:]]
        if not lost:  # all were had, and what comes after them does not matter
            return
        raise _BreakError(_words(error), lost) from error


def _with_audio(cut: Any, content: bytes | None, about: bytes | None, shard: Shard) -> Cut | Lost:
    from lhotse.serialization import deserialize_item

    if content is None or about is None:
        return Lost(cut.id, f"cut `{cut.id}` of {shard} has no audio")
    cut.recording = deserialize_item(json.loads(about))
    _fill(cut.recording, content)
    return cast("Cut", cut)


def _lines(path: str) -> list[bytes]:
    """Return the lines of a list of cuts, compressed or not, however it is reached."""
    try:
        with closing(_Whole(path)) as stream:
            content = stream.read()
            stream.finish(tar=False)
        return (gzip.decompress(content) if content[:2] == GZIP else content).splitlines()
    except Exception as error:
        raise _BreakError(f"{path}: {_words(error)}", []) from error


class _Whole(io.RawIOBase):
    """Bytes of a file, URL or command, that knows whether it was given all of them.

    What webdataset and Lhotse open is closed without a look at how a command ended, and a tar that was cut between two
    of its members looks whole to Python.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._stream, self._head, self._tail, self._size = _open(name), b"", b"", 0
        self._ended = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Return as many bytes as are asked for, fewer only at the end.

        Raises what the stream raises when its command failed: before a reader sees that something is missing.
        """
        parts, wanted = [], size
        while wanted and (part := self._next(wanted)):
            parts.append(part)
            wanted = wanted if size < 0 else wanted - len(part)
        content = b"".join(parts)
        self._head, self._tail = self._head or content[:2], (self._tail + content[-512:])[-512:]
        self._size += len(content)
        return content

    def _next(self, size: int) -> bytes:
        if self._ended:
            return b""
        part = self._stream.read(size)
        if not part:
            self._ended = True
            self._stream.close()  # waits for a command that has closed its output and not ended yet
        return part

    def finish(self, *, tar: bool) -> None:
        """Read to the end and close.

        tar: a plain one ends with empty blocks.
        Raises OSError when they are missing, and what the stream raises when its command failed.
        """
        while self.read(1 << 16):
            pass
        if tar and self._head != GZIP and (self._size % 512 or any(self._tail)):
            raise OSError("unexpected end of data")

    def close(self) -> None:
        """Close without a word: left before its end, a command may complain."""
        with suppress(Exception):
            self._stream.close()
        super().close()


def _open(name: str) -> IO[bytes]:
    """Open a path, a command or a URL: by webdataset, and by Lhotse (smart_open) where that knows no such URL."""
    from lhotse.serialization import open_best
    from webdataset.gopen import gopen, gopen_schemes

    scheme = name.split(":", 1)[0] if re.match(r"[a-z][a-z0-9+.-]+:", name) else ""
    return cast("IO[bytes]", gopen(name, "rb") if not scheme or scheme in gopen_schemes else open_best(name, "rb"))


def _words(error: Exception) -> str:
    text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    if (status := re.search(r"exit (\d+) \(read\)", text)) is not None:
        return f"its command ended with status {status[1]}"
    return " ".join(text.split(" @ <", maxsplit=1)[0].split())[:300] or repr(error)  # webdataset adds its own object
