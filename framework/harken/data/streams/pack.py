"""Writing cuts with their audio: into a Lhotse Shar shard, a WebDataset tar, or files for a manifest.

Audio keeps its own coding: the bytes of its file go into the shard as they are, and out of it again. Only what is a
part of a file (a segment) or is changed while it is read (a Lhotse transform) is decoded and written as FLAC.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from harken.core.errors import HarkenError
from harken.core.files import atomic_path
from harken.data.streams.shards import Shard

if TYPE_CHECKING:
    from lhotse.cut import Cut

KINDS = ("shar", "webdataset", "manifest")
EXACT_IN_24_BITS = {"PCM_24", "PCM_32", "FLOAT", "DOUBLE"}


@dataclass(frozen=True)
class Packed:
    """A cut and the bytes of its recording, which it covers in whole. suffix: of the audio's file, without a dot."""

    cut: Any
    content: bytes
    suffix: str


def pack(cut: Cut) -> Packed:
    """Return a cut with the bytes of its audio.

    Raises HarkenError naming the cut whose audio cannot be had.
    """
    try:
        return _as_it_is(cut) if _is_whole(cut) else _encoded(cut)
    except Exception as error:
        again = "`harken data verify MANIFEST --clean CLEAN.jsonl` leaves such cuts out"
        raise HarkenError(f"the audio of cut `{cut.id}` cannot be packed: {error}; {again}") from error


def _is_whole(cut: Any) -> bool:
    recording = cut.recording
    return (
        len(recording.sources) == 1
        and recording.sources[0].type in {"file", "memory"}
        and not recording.transforms
        and cut.start == 0
        and abs(cut.duration - recording.duration) * recording.sampling_rate < 1
    )


def _as_it_is(cut: Any) -> Packed:
    source = cut.recording.sources[0]
    if source.type == "file":
        return Packed(cut, Path(source.source).read_bytes(), Path(source.source).suffix[1:].lower())
    return Packed(cut, source.source, _suffix(source.source))


def _suffix(content: bytes) -> str:
    """Return the suffix of audio by how it begins."""
    marks = {b"fLaC": "flac", b"RIFF": "wav", b"OggS": "ogg", b"NIST": "sph", b"FORM": "aiff", b".snd": "au"}
    return marks.get(content[:4], "m4a" if content[4:8] == b"ftyp" else "mp3")


def _encoded(cut: Any) -> Packed:
    """Return a part of a recording as FLAC: exact for integers of up to 24 bits; of lossy codings, 16 bits."""
    import soundfile
    from lhotse import Recording, fastcopy

    source = cut.recording.sources[0]
    name = source.source if source.type == "file" else io.BytesIO(source.source) if source.type == "memory" else None
    exact = name is not None and soundfile.info(name).subtype in EXACT_IN_24_BITS
    stream = io.BytesIO()
    samples = cut.load_audio()
    soundfile.write(stream, samples.T, cut.sampling_rate, "PCM_24" if exact else "PCM_16", format="FLAC")
    recording = Recording.from_bytes(stream.getvalue(), cut.id)
    words = [fastcopy(part, recording_id=cut.id, channel=0) for part in cut.supervisions]
    whole = fastcopy(cut, start=0.0, duration=recording.duration, channel=0, recording=recording, supervisions=words)
    return Packed(whole, stream.getvalue(), "flac")


def write_part(kind: str, folder: Path, number: int, total: int, cuts: Iterable[Cut], home: Path) -> dict[str, Any]:
    """Write a shard into a folder and return what is in it: `cuts`, `seconds` and a `digest` of ids and audio.

    number: of the shard. total: cuts that it gets. home: where the folder will be in the end.
    """
    digest = Digest()
    write = {"shar": _write_shar, "webdataset": _write_webdataset, "manifest": _write_files}[kind]
    write(folder, number, total, digest.each(map(pack, cuts)), home)
    return digest.record()


def written(kind: str, folder: Path, number: int) -> Shard:
    """Return the shard that `write_part` wrote."""
    if kind == "shar":
        return Shard(str(folder / f"recording.{number:06d}.tar"), str(folder / f"cuts.{number:06d}.jsonl.gz"))
    return Shard(str(folder / f"shard-{number:06d}.tar"))


def lines_of(folder: Path, number: int) -> Path:
    """Return the file with the lines of the manifest that a part gives."""
    return folder / f"{number:06d}.jsonl"


class Digest:
    """What goes by, in one hash that also tells the order."""

    def __init__(self) -> None:
        self._hash, self._cuts, self._seconds = hashlib.blake2b(digest_size=16), 0, 0.0

    def each(self, items: Iterable[Packed]) -> Iterator[Packed]:
        """Count cuts as they go by."""
        for item in items:
            self.add(item.cut, item.content)
            yield item

    def add(self, cut: Any, content: bytes) -> None:
        """Count a cut."""
        self._hash.update(f"{cut.id}\0{len(content)}\0".encode())
        self._hash.update(content)
        self._cuts, self._seconds = self._cuts + 1, self._seconds + float(cut.duration)

    def record(self) -> dict[str, Any]:
        """Return what was counted."""
        return {"cuts": self._cuts, "seconds": round(self._seconds, 6), "digest": self._hash.hexdigest()}


def _write_shar(folder: Path, number: int, total: int, items: Iterable[Packed], home: Path) -> None:
    """Write Shar by Lhotse's tar writer; its SharWriter would decode the audio and code it anew."""
    from lhotse.shar.utils import to_shar_placeholder
    from lhotse.shar.writers.tar import TarWriter

    shard = written("shar", folder, number)
    lines = []
    with atomic_path(shard.audio) as temporary, TarWriter(str(temporary), shard_size=None) as tar:
        for item in items:
            recording = to_shar_placeholder(item.cut.recording)
            tar.write(f"{item.cut.id}.{item.suffix}", io.BytesIO(item.content))
            about = json.dumps(recording.to_dict()) + "\n"
            tar.write(f"{item.cut.id}.json", io.BytesIO(about.encode()), count=False)
            lines.append(_line(item.cut, recording))
    assert shard.cuts is not None
    with atomic_path(shard.cuts) as temporary, temporary.open("wb") as stream:
        stream.write(gzip.compress("".join(lines).encode(), mtime=0))  # the same bytes every time


def _write_webdataset(folder: Path, number: int, total: int, items: Iterable[Packed], home: Path) -> None:
    """Write a tar of `PLACE.flac` (or what the coding is) and `PLACE.json`, by webdataset's writer."""
    from lhotse.shar.utils import to_shar_placeholder
    from webdataset import TarWriter

    path = written("webdataset", folder, number).audio
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as stream,
        TarWriter(stream, encoder=False, mtime=0) as tar,
    ):
        for place, item in enumerate(items):
            cut = item.cut
            about: dict[str, Any] = {"id": cut.id, "duration": cut.duration, "sample_rate": cut.sampling_rate}
            words = cut.supervisions[0] if len(cut.supervisions) == 1 else None
            about |= {name: getattr(words, name) for name in ("text", "speaker") if getattr(words, name, None)}
            # how many there are in all: a tar that was cut short does not tell
            about |= {"shard_cuts": total, "cut": json.loads(_line(cut, to_shar_placeholder(cut.recording)))}
            sample = {"__key__": f"{place:06d}", item.suffix: item.content, "json": json.dumps(about).encode()}
            tar.write(sample)


def _write_files(folder: Path, number: int, total: int, items: Iterable[Packed], home: Path) -> None:
    """Write a file for each cut, and the lines of a manifest that names them where they will be."""
    from lhotse import AudioSource, fastcopy

    part = folder / f"{number:06d}"
    part.mkdir(parents=True, exist_ok=True)
    lines = []
    for place, item in enumerate(items):
        name = f"{place:06d}.{item.suffix}"
        (part / name).write_bytes(item.content)
        channels = item.cut.recording.channel_ids
        source = AudioSource("file", channels, str((home / part.name / name).absolute()))
        lines.append(_line(item.cut, fastcopy(item.cut.recording, sources=[source])))
    with atomic_path(lines_of(folder, number)) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _line(cut: Any, recording: Any) -> str:
    from lhotse import fastcopy

    return json.dumps(cast("Any", fastcopy(cut, recording=recording)).to_dict(), ensure_ascii=False) + "\n"
