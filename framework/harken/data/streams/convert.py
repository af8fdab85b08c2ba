"""`harken data shards`: indexed manifests, Lhotse Shar and WebDataset become each other.

Everything is written beside the output, in `.OUT.part/`, shard by shard; when it was interrupted, the same command goes
on with the shards that are missing. When all are there they are read again and compared with what was written, and only
then take the output's name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harken.core.draws import key
from harken.core.errors import HarkenError
from harken.core.files import atomic_path, check_replaceable, remove, sha256_file, sync, write_json_atomic
from harken.core.permutation import Permutation
from harken.data.index import build_index
from harken.data.manifest import Manifest
from harken.data.parallel import default_jobs, in_parallel
from harken.data.streams.pack import Digest, lines_of, write_part, written
from harken.data.streams.read import Lost, read_shard
from harken.data.streams.shards import Shard, find_shards, is_remote, is_stream

if TYPE_CHECKING:
    from lhotse.cut import Cut

SHARD_CUTS = 1000


@dataclass(frozen=True)
class Span:
    """Cuts of one part of a source, from `first` up to `last`. shard: None for a manifest."""

    shard: Shard | None
    first: int
    last: int


@dataclass(frozen=True)
class Job:
    """How parts are written. source: a manifest or a stream. shuffle: seed of the order, or None for the source's."""

    source: str
    kind: str
    folder: Path
    home: Path
    shuffle: int | None


@dataclass(frozen=True)
class Converted:
    """What is there now. resumed: shards that an earlier, interrupted run had written."""

    cuts: int
    seconds: float
    shards: int
    resumed: int


def convert(
    source: str,
    out: Path,
    kind: str,
    *,
    shard_cuts: int | None = None,
    shard_megabytes: float | None = None,
    shuffle: int | None = None,
    jobs: int | None = None,
) -> Converted:
    """Convert a manifest or a stream to another kind; a manifest `NAME.jsonl` gets its audio in `NAME.audio/`.

    kind: one of `harken.data.streams.pack.KINDS`. shard_cuts, shard_megabytes: the most that a shard gets, of cuts and
    of audio; `SHARD_CUTS` when neither is given. jobs: processes; None takes one for each core.
    Raises HarkenError when a cut cannot be had, or the output is not what was written; then there is no output.
    """
    home = out.with_suffix(".audio") if kind == "manifest" else out
    _check(source, out, kind, home, shard_cuts, shard_megabytes, shuffle)
    work = out.with_name(f".{out.name}.part")
    job = Job(source, kind, work / "shards", home, shuffle)
    jobs = jobs or default_jobs()
    options = {"kind": kind, "cuts": shard_cuts, "megabytes": shard_megabytes, "shuffle": shuffle}
    parts = _plan(job, work, {"source": _state_of(source), **options}, jobs)
    done = {number for number in range(len(parts)) if _record(work, number).is_file()}
    tasks = [(number, part) for number, part in enumerate(parts) if number not in done]
    for number, record in in_parallel(partial(_write, job), tasks, jobs=jobs, what="shards written"):
        write_json_atomic(_record(work, number), record)
    records = [json.loads(_record(work, number).read_text()) for number in range(len(parts))]
    found = in_parallel(partial(_read_again, job), range(len(parts)), jobs=jobs, what="shards checked")
    for number, (record, again) in enumerate(zip(records, found, strict=True)):
        expected = sum(span.last - span.first for span in parts[number])
        if record != again or record["cuts"] != expected:
            remove(_record(work, number))
            raise HarkenError(
                f"shard {number} of {out} must hold {expected} cuts as they were written, got {again['cuts']} of "
                f"{record['cuts']}: the same command writes it again"
            )
    _finish(job, out, work, len(parts))
    cuts, seconds = sum(record["cuts"] for record in records), sum(record["seconds"] for record in records)
    return Converted(cuts, seconds, len(parts), len(done))


def _check(
    source: str,
    out: Path,
    kind: str,
    home: Path,
    shard_cuts: int | None,
    shard_megabytes: float | None,
    shuffle: int | None,
) -> None:
    """Raise HarkenError for what cannot be meant, before anything is written."""
    if (kind == "manifest") != (out.suffix == ".jsonl"):
        raise HarkenError(f"--out must end in .jsonl for a manifest and be a folder for shards, got {out} for {kind}")
    if kind == "manifest" and not is_stream(source):
        raise HarkenError(f"{source} is a manifest already: give a stream, or --to shar or webdataset")
    if (shard_cuts is not None and shard_cuts < 1) or (shard_megabytes is not None and shard_megabytes <= 0):
        raise HarkenError(
            f"--shard-cuts and --shard-megabytes must be positive, got {shard_cuts} and {shard_megabytes}"
        )
    if shuffle is not None and is_stream(source):
        raise HarkenError("--shuffle takes cuts from all over the source, and a stream is only read in order")
    check_replaceable(home, kind="folder of shards")
    if kind == "manifest" and out.exists():
        raise HarkenError(f"{out} exists already; nothing was changed: name another file, or move this one away")


def _state_of(source: str) -> Any:
    """Return what tells whether a source changed between two runs."""
    if not is_stream(source):
        return [str(Path(source).absolute()), sha256_file(source)] if Path(source).is_file() else source
    names = [name for shard in find_shards(source) for name in (shard.cuts, shard.audio) if name]
    return [[name] if is_remote(name) else [name, Path(name).stat().st_size] for name in names]


def _plan(job: Job, work: Path, options: dict[str, Any], jobs: int) -> list[list[Span]]:
    """Return the spans of each shard that is to be written: those of an interrupted run, where it meant the same."""
    path = work / "plan.json"
    if path.is_file():
        saved = json.loads(path.read_text())
        if saved["options"] == json.loads(json.dumps(options)):
            return [[Span(shard and Shard(**shard), *ends) for shard, *ends in part] for part in saved["parts"]]
    remove(work)
    names: list[Shard | None] = [None]
    if is_stream(job.source):
        shards = find_shards(job.source)
        names = [*shards]
        sizes = list(in_parallel(_sizes, shards, jobs=jobs, what="shards counted"))
    else:
        sizes = [_manifest_sizes(Manifest.filled(job.source), weigh=options["megabytes"] is not None)]
    most = options["cuts"] or (SHARD_CUTS if options["megabytes"] is None else None)
    parts = divide(names, sizes, most, options["megabytes"])
    if not parts:
        raise HarkenError(f"{job.source} holds no cuts: there is nothing to convert")
    (work / "done").mkdir(parents=True)
    job.folder.mkdir()
    plain = [[[vars(span.shard) if span.shard else None, span.first, span.last] for span in part] for part in parts]
    write_json_atomic(path, {"options": options, "parts": plain})
    return parts


def divide(
    names: list[Shard | None], sizes: list[NDArray[np.int64]], cuts: int | None, megabytes: float | None
) -> list[list[Span]]:
    """Divide what is in the parts of a source among shards of at most so many cuts and megabytes of audio.

    sizes: for each part `(N,)`, the bytes of its cuts. A cut of more than a shard may hold has one for itself.
    """
    shards: list[list[Span]] = [[]]
    count, total, limit = 0, 0, np.inf if megabytes is None else megabytes * 1e6
    for name, part in zip(names, sizes, strict=True):
        first = 0
        for place, size in enumerate(part.tolist()):
            if count and (count == cuts or total + size > limit):
                if first < place:
                    shards[-1].append(Span(name, first, place))
                shards.append([])
                first, count, total = place, 0, 0
            count, total = count + 1, total + size
        if first < len(part):
            shards[-1].append(Span(name, first, len(part)))
    return [shard for shard in shards if shard]


def _sizes(shard: Shard) -> NDArray[np.int64]:
    return np.array([len(cut.recording.sources[0].source) for cut in _sound(read_shard(shard))], dtype=np.int64)


def _manifest_sizes(manifest: Manifest, *, weigh: bool) -> NDArray[np.int64]:
    """Return about what the audio of each cut takes in bytes: its share of its file. Zeros unless it is asked for."""
    sizes = np.zeros(len(manifest), dtype=np.int64)
    for place in range(len(manifest)) if weigh else []:
        data = manifest.line(place)
        recording = data["recording"]
        share = data["duration"] / max(recording["duration"], 1e-6)
        try:
            sizes[place] = int(share * sum(Path(source["source"]).stat().st_size for source in recording["sources"]))
        except OSError as error:
            raise HarkenError(f"the audio of cut `{data['id']}` cannot be packed: {error}") from error
    return sizes


def _record(work: Path, number: int) -> Path:
    return work / "done" / f"{number:06d}.json"


def _write(job: Job, task: tuple[int, list[Span]]) -> tuple[int, dict[str, Any]]:
    number, spans = task
    total = sum(span.last - span.first for span in spans)
    cuts = (cut for span in spans for cut in _cuts_of(job, span))
    return number, write_part(job.kind, job.folder, number, total, cuts, job.home)


def _cuts_of(job: Job, span: Span) -> Iterator[Cut]:
    if span.shard is not None:
        yield from islice(_sound(read_shard(span.shard)), span.first, span.last)
        return
    manifest = Manifest(job.source)
    places = np.arange(span.first, span.last)
    if job.shuffle is not None:
        places = Permutation(len(manifest), key(job.shuffle, "shards"))[places]
    for place in places.tolist():
        yield manifest[place]


def _sound(items: Iterator[Cut | Lost]) -> Iterator[Cut]:
    for item in items:
        if isinstance(item, Lost):
            raise HarkenError(
                f"`{item.id}` of the source cannot be had, and nothing is left out in silence: {item.reason}"
            )
        yield item


def _read_again(job: Job, number: int) -> dict[str, Any]:
    """Return the record of a shard as it is on the disk."""
    digest = Digest()
    if job.kind == "manifest":
        for line in lines_of(job.folder, number).read_text(encoding="utf-8").splitlines():
            data = json.loads(line)
            name = Path(data["recording"]["sources"][0]["source"])
            digest.add(_Named(data["id"], data["duration"]), (job.folder / name.parent.name / name.name).read_bytes())
        return digest.record()
    for item in read_shard(written(job.kind, job.folder, number)):
        if not isinstance(item, Lost):
            digest.add(item, item.recording.sources[0].source)
    return digest.record()


@dataclass(frozen=True)
class _Named:
    id: str
    duration: float


def _finish(job: Job, out: Path, work: Path, parts: int) -> None:
    """Give the shards their name; for a manifest, write it and its index, too."""
    for leftover in job.folder.glob(".*"):  # temporaries of a process that was killed
        remove(leftover)
    lines = work / "manifest.jsonl"
    if job.kind == "manifest":
        with lines.open("wb") as stream:
            for number in range(parts):
                with lines_of(job.folder, number).open("rb") as part:
                    shutil.copyfileobj(part, stream)
        build_index(lines)  # an id that occurs twice must show before anything has its name
        for number in range(parts):
            remove(lines_of(job.folder, number))
    sync(job.folder)
    if job.home.is_dir():
        job.home.rmdir()  # an empty one
    job.folder.rename(job.home)
    if job.kind == "manifest":
        with atomic_path(out) as temporary:
            shutil.copyfile(lines, temporary)
        build_index(out)
    remove(work)
