"""Corpora prepared for other toolkits: Kaldi directories and Lhotse manifests become entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from harken.core.errors import HarkenError
from harken.data.entries import Entry, Listing, objects, read_table, seconds_of


def read_kaldi(folder: Path, root: Path | None) -> Listing:
    """List the utterances of wav.scp, or of segments where it is there, with text and utt2spk.

    Raises HarkenError for a command in wav.scp and for lines that cannot be understood.
    """
    listing, files = Listing(kind="Kaldi directory"), {}
    for number, (recording, value) in read_table(folder / "wav.scp"):
        if value.rstrip().endswith("|"):
            raise HarkenError(
                f"{folder}/wav.scp line {number}: `{recording}` is the output of a command (`{value.strip()}`); "
                "only plain files are read: write the commands' output to files and name those"
            )
        if recording in files:
            raise HarkenError(f"{folder}/wav.scp line {number}: `{recording}` occurs twice")
        files[recording] = (root or Path.cwd()) / value.strip()
    tables = {name: folder / name for name in ("text", "utt2spk")}
    known = {
        name: {key: value for _, (key, value) in read_table(path, 1)} if path.is_file() else {}
        for name, path in tables.items()
    }

    def entry(utterance: str, recording: str, **place: Any) -> Entry:
        text, speaker = known["text"].get(utterance), known["utt2spk"].get(utterance)
        path = files[recording].absolute()
        return Entry(id=utterance, path=path, named=True, recording=recording, text=text, speaker=speaker, **place)

    if not (folder / "segments").is_file():
        listing.entries = [entry(recording, recording) for recording in files]
    segments = read_table(folder / "segments") if (folder / "segments").is_file() else iter(())
    for number, (utterance, rest) in segments:
        where = f"{folder}/segments line {number}"
        fields = rest.split()
        if len(fields) not in {3, 4} or not "".join(fields[3:] or "0").isdecimal():
            raise HarkenError(f"{where} must be `UTTERANCE RECORDING START END [CHANNEL]`, got `{utterance} {rest}`")
        place = dict(zip(("start", "end"), fields[1:3], strict=True))
        start, end = (seconds_of(place, key, where) or 0.0 for key in ("start", "end"))
        if fields[0] not in files:
            listing.refused.append((utterance, "", f"its recording `{fields[0]}` is not in wav.scp"))
            continue
        # Kaldi writes -1 for the end of the recording
        duration = None if end == -1 else end - start
        channel = int(fields[3]) if len(fields) == 4 else None
        listing.entries.append(entry(utterance, fields[0], offset=start, duration=duration, channel=channel))
    for name, table in known.items():
        lost = sorted(set(table) - {item.id for item in listing.entries})
        if lost:
            listing.notes.append(f"{len(lost)} lines of {name} belong to no utterance that is taken, first `{lost[0]}`")
    return listing


def read_lhotse(path: Path, first: Mapping[str, Any], root: Path | None, supervisions: Path | None) -> Listing:
    """List cuts, or recordings with or without supervisions, through Lhotse's classes."""
    from lhotse import MonoCut, Recording, SupervisionSegment
    from lhotse.serialization import deserialize_item

    if "type" not in first and "sources" not in first:
        raise HarkenError(f"{path} holds Lhotse supervisions: scan its recordings, with `--supervisions {path}`")
    listing = Listing(kind="Lhotse cuts" if "type" in first else "Lhotse recordings")
    if "type" in first:
        for cut in _deserialized(path, deserialize_item):
            _add_cut(listing, cut, root)
        return listing
    recordings = {item.id: item for item in _deserialized(path, Recording.from_dict)}
    items = [SupervisionSegment(item.id, item.id, 0.0, item.duration) for item in recordings.values()]
    if supervisions is not None:
        items = list(_deserialized(supervisions, SupervisionSegment.from_dict))
    for item in items:
        if item.recording_id not in recordings:
            listing.refused.append((item.id, "", f"its recording `{item.recording_id}` is not in {path.name}"))
            continue
        channel = item.channel if isinstance(item.channel, int) else item.channel[0]
        span = replace(item, start=0.0, channel=channel)
        cut = MonoCut(item.id, item.start, item.duration, channel, recording=recordings[item.recording_id])
        cut.supervisions = [span] if supervisions is not None else []
        _add_cut(listing, cut, root)
    if supervisions is None:  # whole files: which channels to take is said to the scan
        listing.entries = [_whole(item) for item in listing.entries]
    silent = len(recordings) - len({item.recording_id for item in items} & set(recordings))
    if silent:
        listing.notes.append(f"{silent} recordings have no supervision and were passed over")
    return listing


def _whole(entry: Entry) -> Entry:
    recording = entry.cut.recording if entry.cut is not None else None
    if recording is None or recording.transforms:
        return entry
    return replace(entry, cut=None, recording=recording.id, samples=recording.num_samples)


def _add_cut(listing: Listing, cut: Any, root: Path | None) -> None:
    """Add a cut of one channel of one plain file, its path made absolute; refuse any other with the reason."""
    kind = type(cut).__name__
    sources = getattr(getattr(cut, "recording", None), "sources", [])
    if kind != "MonoCut":
        reason = f"a {kind}, and only MonoCuts are read: write its audio to files first"
    elif len(sources) != 1:
        reason = f"its recording has {len(sources)} sources, and exactly one file is read"
    elif sources[0].type != "file":
        reason = f"its audio is of type `{sources[0].type}`, and only plain files are read"
    else:
        path = ((root or Path.cwd()) / sources[0].source).absolute()
        recording = replace(cut.recording, sources=[replace(sources[0], source=str(path))])
        listing.entries.append(Entry(id=cut.id, path=path, named=True, cut=replace(cut, recording=recording)))
        return
    listing.refused.append((cut.id, str(sources[0].source) if sources else "", reason))


def _deserialized(path: Path, build: Callable[[dict[str, Any]], Any]) -> Iterator[Any]:
    for number, row in objects(path):
        try:
            item = build(row)
        except (TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
            raise HarkenError(f"{path} line {number} is not what Lhotse wrote: {error!r}") from error
        yield item
