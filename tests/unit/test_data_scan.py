"""`harken data scan`: every layout of a corpus becomes cuts that can be read, and nothing is lost unnamed."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MonoCut, RecordingSet, SupervisionSegment
from lhotse.audio import Recording

from harken.apps.main import main
from harken.core.errors import HarkenError
from harken.data.index import index_folder
from harken.data.manifest import Manifest
from harken.data.parallel import in_parallel
from harken.data.read import read_cut
from harken.data.scan import Scanned, scan

RATE = 16000
SECONDS = {"ann/one": 0.5, "ann/two": 0.75, "bob/one": 1.0}


def sound(seconds: float, channels: int = 1, rate: int = RATE) -> np.ndarray:
    """A tone for each channel and a little noise, `(S, C)`."""
    rng = np.random.default_rng(round(1000 * seconds))
    time = np.arange(round(seconds * rate))[:, None] / rate
    tones = 0.3 * np.sin(2 * np.pi * 300 * (1 + np.arange(channels)) * time)
    return (tones + 0.01 * rng.standard_normal(tones.shape)).astype(np.float32)


def write_audio(path: Path, seconds: float, channels: int = 1, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".opus": {"format": "OGG", "subtype": "OPUS"}}.get(path.suffix.lower(), {})
    soundfile.write(path, sound(seconds, channels, rate), rate, **kind)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name, seconds in SECONDS.items():
        write_audio(tmp_path / "wav" / f"{name}.flac", seconds)
    return tmp_path / "wav"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "all.jsonl"


def lines(path: Path, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def json_lines(path: Path, *rows: dict) -> Path:
    return lines(path, *(json.dumps(row) for row in rows))


def cuts(out: Path) -> dict[str, MonoCut]:
    return {cut.id: cut for cut in Manifest(out)}


def quarantined(result: Scanned) -> list[list[str]]:
    header, *rows = result.quarantine.read_text("utf-8").splitlines()
    assert header == "id\tpath\treason"
    assert len(rows) == len(result.refused)
    return [row.split("\t") for row in rows]


def text_of(cut: MonoCut) -> str | None:
    return cut.supervisions[0].text if cut.supervisions else None


# Folders


def test_a_folder_becomes_cuts_that_lhotse_and_the_reader_read(corpus: Path, out: Path) -> None:
    result = scan(corpus, out)
    assert (result.cuts, result.refused, result.notes) == (3, [], [])
    assert result.seconds == pytest.approx(sum(SECONDS.values()))
    assert (index_folder(out) / "card.json").is_file()
    found = cuts(out)
    assert list(found) == ["ann-one", "ann-two", "bob-one"]
    assert all(type(cut) is MonoCut and not cut.supervisions for cut in found.values())
    assert Path(found["bob-one"].recording.sources[0].source) == corpus / "bob/one.flac"
    for (name, seconds), cut in zip(SECONDS.items(), found.values(), strict=True):
        assert (cut.start, cut.duration, cut.channel) == (0.0, seconds, 0)
        stored, _ = soundfile.read(corpus / f"{name}.flac", dtype="float32")
        assert np.array_equal(read_cut(cut, RATE), stored)
    assert [cut.id for cut in CutSet.from_file(out)] == list(found)


def test_every_audio_format_is_read(tmp_path: Path, out: Path) -> None:
    suffixes = [".wav", ".flac", ".mp3", ".ogg", ".opus", ".WAV"]
    for number, suffix in enumerate(suffixes):
        write_audio(tmp_path / "in" / f"{number}{suffix}", 0.5)
    lines(tmp_path / "in" / "notes.txt", "no audio")
    result = scan(tmp_path / "in", out)
    assert (result.cuts, result.refused) == (6, [])
    for cut in cuts(out).values():
        assert cut.duration == pytest.approx(0.5, abs=1e-4)
        assert len(read_cut(cut, RATE)) == RATE // 2


def test_processes_give_the_same_manifest(tmp_path: Path, out: Path) -> None:
    for number in range(12):
        write_audio(tmp_path / "in" / f"{number:02}.wav", 0.05 + 0.01 * number)
    (tmp_path / "in" / "05.wav").write_bytes(b"")
    one, two = scan(tmp_path / "in", out, jobs=1), scan(tmp_path / "in", out.with_name("two.jsonl"), jobs=2)
    assert out.read_bytes() == out.with_name("two.jsonl").read_bytes()
    assert one.refused == two.refused
    assert len(one.refused) == 1


def test_unreadable_files_are_counted_and_named(corpus: Path, out: Path, capsys) -> None:
    (corpus / "zero.flac").write_bytes(b"")
    (corpus / "words.wav").write_text("these are no samples " * 20)
    soundfile.write(corpus / "empty.wav", np.zeros(0, np.float32), RATE)
    (corpus / "gone.wav").symlink_to(corpus / "nowhere.wav")
    assert main(["data", "scan", str(corpus), "--out", str(out), "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "4 utterances were left out, all listed in" in printed
    assert f"{out}: 3 cuts, 0.04 min" in printed
    rows = out.with_name("all.jsonl.quarantine.tsv").read_text("utf-8").splitlines()
    assert rows == [
        "id\tpath\treason",
        f"empty\t{corpus}/empty.wav\tholds no samples",
        f"gone\t{corpus}/gone.wav\tno such file or directory",
        f"words\t{corpus}/words.wav\tFormat not recognised.",
        f"zero\t{corpus}/zero.flac\tempty file (0 bytes)",
    ]
    assert all(name in printed for name in ("empty [", "gone [", "words [", "zero ["))
    assert list(cuts(out)) == ["ann-one", "ann-two", "bob-one"]


def test_nothing_readable_is_an_error_and_leaves_the_old_manifest(corpus: Path, out: Path, capsys) -> None:
    scan(corpus, out)
    before = out.read_bytes()
    for path in corpus.rglob("*.flac"):
        path.write_bytes(b"")
    assert main(["data", "scan", str(corpus), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "none of the utterances" in message
    assert f"{corpus}/ann/one.flac: empty file (0 bytes)" in message
    assert out.read_bytes() == before
    assert len(Manifest(out)) == 3


def test_ids_that_meet_are_numbered_and_said(corpus: Path, out: Path) -> None:
    write_audio(corpus / "ann-one.wav", 0.5)
    write_audio(corpus / "ann" / "one.wav", 0.5)
    write_audio(corpus / "ann-one-2.wav", 0.5)
    result = scan(corpus, out)
    assert sorted(cuts(out)) == ["ann-one", "ann-one-2", "ann-one-3", "ann-one-4", "ann-two", "bob-one"]
    assert result.notes == ["2 ids were numbered because paths give the same id: ann-one-3, ann-one-4"]


def test_hidden_files_and_links_that_lead_back_are_passed_over(corpus: Path, out: Path) -> None:
    (corpus / "ann" / "._one.flac").write_bytes(b"\0\5\x16\7")  # what macOS leaves beside files
    (corpus / "bob" / "loop").symlink_to(corpus)
    result = scan(corpus, out)
    assert list(cuts(out)) == ["ann-one", "ann-two", "bob-one"]
    assert result.notes == ["1 hidden audio files (names beginning with a dot) were passed over"]


@pytest.mark.parametrize(("channels", "ids"), [("first", ["stereo"]), ("each", ["stereo-c0", "stereo-c1"])])
def test_channels_are_chosen_aloud(tmp_path: Path, out: Path, capsys, channels: str, ids: list[str]) -> None:
    path = write_audio(tmp_path / "in" / "stereo.wav", 0.5, channels=2)
    assert main(["data", "scan", str(path.parent), "--out", str(out), "--channels", channels]) == 0
    assert "1 files have several channels and" in capsys.readouterr().out
    found = cuts(out)
    assert list(found) == ids
    stored, _ = soundfile.read(path, dtype="float32")
    for number, cut in enumerate(found.values()):
        assert np.array_equal(read_cut(cut, RATE), stored[:, number])


# Texts


def test_texts_by_id_and_by_the_name_of_the_file(corpus: Path, out: Path, tmp_path: Path) -> None:
    table = lines(tmp_path / "text", "ann-one  HELLO  THERE", "two good day", "one which of the two", "zoe nobody")
    result = scan(corpus, out, text=str(table))
    # two files are named `one`: the name alone says nothing
    assert {name: text_of(cut) for name, cut in cuts(out).items()} == {
        "ann-one": "HELLO THERE",
        "ann-two": "good day",
        "bob-one": None,
    }
    assert f"2 lines of {table} match no audio, first `one`" in result.notes
    assert f"1 utterances have no text in {table}, first `bob-one`" in result.notes
    span = cuts(out)["ann-two"].supervisions[0]
    assert (span.id, span.recording_id, span.start, span.duration) == ("ann-two", "ann-two", 0.0, 0.75)


def test_texts_beside_the_audio(corpus: Path, out: Path) -> None:
    lines(corpus / "ann" / "one.txt", "hello", "there")
    scan(corpus, out, text=".txt")
    assert text_of(cuts(out)["ann-one"]) == "hello there"
    assert text_of(cuts(out)["ann-two"]) is None


def test_texts_that_fit_nothing_are_an_error(corpus: Path, out: Path, tmp_path: Path) -> None:
    with pytest.raises(HarkenError, match="has no text for any of 3 utterances; the first id is `ann-one`"):
        scan(corpus, out, text=str(lines(tmp_path / "text", "x y")))
    with pytest.raises(HarkenError, match=r"cannot read .*none: .*No such file"):
        scan(corpus, out, text=str(tmp_path / "none"))
    (tmp_path / "latin1").write_bytes("ann-one caf\xe9\n".encode("latin-1"))
    with pytest.raises(HarkenError, match=r"cannot read .*latin1: .*utf-8"):
        scan(corpus, out, text=str(tmp_path / "latin1"))


# TSV


def test_fairseq_tsv_with_words_or_letters(corpus: Path, out: Path, tmp_path: Path) -> None:
    tsv = lines(tmp_path / "t.tsv", str(corpus), "bob/one.flac\t16000", "ann/two.flac\t11111", "no/such.flac\t16000")
    words = lines(tmp_path / "t.wrd", "HELLO THERE", "YES", "NO")
    letters = lines(tmp_path / "t.ltr", "H E L L O | T H E R E |", "Y E S |", "N O |")
    for texts in (words, letters):
        result = scan(tsv, out, text=str(texts))
        assert {name: text_of(cut) for name, cut in cuts(out).items()} == {"bob-one": "HELLO THERE", "ann-two": "YES"}
    assert quarantined(result) == [["no-such", f"{corpus}/no/such.flac", "no such file or directory"]]
    (note,) = result.notes
    assert note.startswith("1 files have another length than the source states; their own was taken: ")
    assert note.endswith("`ann-two` (11111 samples stated, 12000 found)")
    assert cuts(out)["ann-two"].duration == 0.75
    with pytest.raises(HarkenError, match="must have one line for each of 3 utterances, got 2"):
        scan(tsv, out, text=str(lines(tmp_path / "short.wrd", "HELLO", "YES")))


def test_a_fairseq_corpus_that_has_moved_is_found_by_root(corpus: Path, out: Path, tmp_path: Path, capsys) -> None:
    tsv = lines(tmp_path / "t.tsv", "/where/it/was", "bob/one.flac\t16000")
    assert main(["data", "scan", str(tsv), "--out", str(out), "--root", str(corpus)]) == 0
    assert "1 cuts" in capsys.readouterr().out
    assert list(cuts(out)) == ["bob-one"]


def test_tsv_with_a_header(corpus: Path, out: Path, tmp_path: Path) -> None:
    tsv = lines(
        tmp_path / "t.tsv",
        "id\tpath\tspeaker\ttext\tmood",
        "u1\twav/ann/one.flac\tAnn\thello\tgay",
        "\twav/bob/one.flac\t\t\t",
    )
    result = scan(tsv, out)
    found = cuts(out)
    assert list(found) == ["u1", "wav-bob-one"]
    assert (text_of(found["u1"]), found["u1"].supervisions[0].speaker) == ("hello", "Ann")
    assert found["wav-bob-one"].supervisions == []
    assert result.notes[0].startswith("not read: mood (known: ")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["name\tlength", "a\t1"], "must begin with fairseq's root folder or with a header .*got `name\tlength`"),
        (["/root", "a.flac\tlong"], r"t\.tsv line 2 must be `RELATIVE_PATH<TAB>SAMPLES`, got `a\.flac\tlong`"),
        (["path\ttext", "a.flac\tx\ty"], r"t\.tsv line 2 must have the header's 2 columns, got 3"),
        (["path\toffset", "a.flac\tsoon"], r"t\.tsv line 2: `offset` must be a number of seconds, got 'soon'"),
        (["path\ttext", "\tx"], r"t\.tsv line 2 must name its audio file in one of audio, path, audio_filepath"),
    ],
)
def test_a_tsv_line_that_cannot_be_understood_is_named(tmp_path: Path, out: Path, rows, message) -> None:
    with pytest.raises(HarkenError, match=message):
        scan(lines(tmp_path / "t.tsv", *rows), out)
    assert not out.exists()


# JSONL


def test_json_lines_with_segments(corpus: Path, out: Path, tmp_path: Path) -> None:
    source = json_lines(
        tmp_path / "nemo.json",
        {"audio_filepath": "wav/bob/one.flac", "offset": 0.25, "duration": 0.5, "text": "hello", "speaker": 7},
        {"audio_filepath": "wav/bob/one.flac", "offset": 0.75, "duration": 0.26},  # ends 10 ms after the file
        {"audio_filepath": "wav/bob/one.flac", "offset": 0.75, "duration": 0.5},
        {"audio_filepath": "wav/bob/one.flac", "offset": 1.5},
        {"audio": str(corpus / "ann/one.flac"), "duration": 0.49, "text": "yes", "sampling_rate": 16000},
        {"path": "wav/ann/two.flac", "id": "mine", "duration": 0.5, "lang": "en"},
        {"path": "wav/ann/two.flac", "duration": 0.75, "channel": 1},
    )
    result = scan(source, out)
    found = cuts(out)
    assert {name: (cut.start, cut.duration) for name, cut in found.items()} == {
        "wav-bob-one-00000250": (0.25, 0.5),
        "wav-bob-one-00000750": (0.75, 0.25),
        "wav-ann-one": (0.0, 0.5),  # within the tolerance: the whole file
        "mine": (0.0, 0.5),
    }
    first = found["wav-bob-one-00000250"]
    assert (text_of(first), first.supervisions[0].speaker) == ("hello", "7")
    stored, _ = soundfile.read(corpus / "bob/one.flac", dtype="float32")
    assert np.array_equal(read_cut(first, RATE), stored[4000:12000])
    reasons = {row[0]: row[2] for row in quarantined(result)}
    assert reasons == {
        "wav-bob-one-00000750-2": "the source states 0.75 s + 0.5 s, the file has 1.000 s",
        "wav-bob-one-00001500": "the source states 1.5 s and a duration of None s, the file has 1.000 s",
        "wav-ann-two": "the source asks for channel 1, the file has 1 (counted from 0)",
    }
    assert result.notes[0].startswith("not read: lang (known: ")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"t\.jsonl line 2 must be one JSON object"),
        ("[1]", r"t\.jsonl line 2 must be one JSON object, got list"),
        ('{"text": "x"}', r"t\.jsonl line 2 must name its audio file"),
        ('{"audio": {"bytes": "x"}}', r"t\.jsonl line 2 must name its audio file"),
        ('{"audio": "a.wav", "text": ["x"]}', r"t\.jsonl line 2: `text` must be text, got \['x'\]"),
        ('{"audio": "a.wav", "duration": "x"}', r"t\.jsonl line 2: `duration` must be a number of seconds"),
        ('{"audio": "a.wav", "channel": -1}', r"t\.jsonl line 2: `channel` must be a number from 0, got -1"),
        ('{"audio": "a.wav", "id": "u1"}', r"id `u1` occurs twice, the second time for .*a\.wav"),
    ],
)
def test_a_json_line_that_cannot_be_understood_is_named(tmp_path: Path, out: Path, row: str, message: str) -> None:
    with pytest.raises(HarkenError, match=message):
        scan(lines(tmp_path / "t.jsonl", '{"audio": "a.wav", "id": "u1"}', row), out)


# Kaldi


@pytest.fixture
def kaldi(corpus: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "kaldi"
    lines(folder / "wav.scp", f"rec1 {corpus}/bob/one.flac", f"rec2 {corpus}/ann/two.flac")
    lines(folder / "text", "rec1 HELLO THERE", "rec2", "u1 GOOD DAY", "u2 YES")
    lines(folder / "utt2spk", "rec1 Bob", "rec2 Ann", "u1 Bob", "u2 Ann")
    return folder


def test_a_kaldi_directory_without_segments(kaldi: Path, out: Path) -> None:
    result = scan(kaldi, out)
    found = cuts(out)
    assert {name: (text_of(cut), cut.supervisions[0].speaker, cut.duration) for name, cut in found.items()} == {
        "rec1": ("HELLO THERE", "Bob", 1.0),
        "rec2": ("", "Ann", 0.75),
    }
    assert "2 lines of text belong to no utterance that is taken, first `u1`" in result.notes


def test_a_kaldi_directory_with_segments(kaldi: Path, out: Path) -> None:
    lines(kaldi / "segments", "u1 rec1 0.25 0.75", "u2 rec2 0.5 -1", "u3 rec9 0 1", "u4 rec1 0.5 0.5")
    result = scan(kaldi, out)
    found = cuts(out)
    assert {name: (cut.start, cut.duration, text_of(cut)) for name, cut in found.items()} == {
        "u1": (0.25, 0.5, "GOOD DAY"),
        "u2": (0.5, 0.25, "YES"),
    }
    assert found["u1"].recording.id == "rec1"
    assert [row[0] for row in quarantined(result)] == ["u3", "u4"]
    assert "its recording `rec9` is not in wav.scp" in result.refused[0][2]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "wav.scp",
            "rec3 sph2pipe -f wav x.sph |",
            r"wav\.scp line 3: `rec3` is the output of a command .*plain files",
        ),
        ("wav.scp", "rec1 /other.wav", r"wav\.scp line 3: `rec1` occurs twice"),
        ("wav.scp", "rec3", r"wav\.scp line 3 must be `ID VALUE`, got `rec3`"),
        ("segments", "u1 rec1 0.25", r"segments line 1 must be `UTTERANCE RECORDING START END \[CHANNEL\]`"),
        ("segments", "u1 rec1 a b", r"segments line 1: `start` must be a number of seconds, got 'a'"),
    ],
)
def test_a_kaldi_line_that_cannot_be_understood_is_named(kaldi: Path, out: Path, name, row, message) -> None:
    with (kaldi / name).open("a") as stream:
        stream.write(row + "\n")
    with pytest.raises(HarkenError, match=message):
        scan(kaldi, out)


def test_kaldi_paths_start_from_the_current_folder_or_root(
    corpus: Path, out: Path, tmp_path: Path, monkeypatch
) -> None:
    folder = lines(tmp_path / "kaldi" / "wav.scp", "rec1 wav/bob/one.flac").parent
    monkeypatch.chdir(corpus.parent)
    assert scan(folder, out).cuts == 1
    monkeypatch.chdir("/")
    with pytest.raises(HarkenError, match="none of the utterances"):
        scan(folder, out)
    assert scan(folder, out, root=corpus.parent).cuts == 1


# Lhotse


def lhotse_cut(corpus: Path, name: str, **changes) -> MonoCut:
    recording = Recording.from_file(corpus / f"{name}.flac", recording_id=name.replace("/", "-"))
    cut = MonoCut(recording.id, 0.0, recording.duration, 0, recording=recording)
    cut.supervisions = [SupervisionSegment("s", recording.id, 0.0, 0.25, text="hi", language="en", custom={"mood": 1})]
    for key, value in changes.items():
        setattr(cut, key, value)
    return cut


def test_lhotse_cuts_keep_what_they_hold(corpus: Path, out: Path, tmp_path: Path) -> None:
    one, two = lhotse_cut(corpus, "ann/one"), lhotse_cut(corpus, "bob/one", start=0.25, duration=0.5)
    wrong = lhotse_cut(corpus, "ann/two")
    wrong.recording.num_samples, wrong.recording.duration = 32000, 2.0
    piped = lhotse_cut(corpus, "ann/two", id="piped")
    piped.recording.sources[0].type = "command"
    mixed = one.append(two).with_id("mixed")
    CutSet.from_cuts([one, two, wrong, piped, mixed]).to_file(tmp_path / "cuts.jsonl.gz")
    result = scan(tmp_path / "cuts.jsonl.gz", out)
    assert result.kind == "Lhotse cuts"
    assert [cut.to_dict() for cut in Manifest(out)] == [one.to_dict(), two.to_dict()]
    assert {row[0]: row[2] for row in quarantined(result)} == {
        "ann-two": "the manifest states 16000 Hz and 2.000 s, the file has 16000 Hz and 0.750 s",
        "piped": "its audio is of type `command`, and only plain files are read",
        "mixed": "a MixedCut, and only MonoCuts are read: write its audio to files first",
    }


def test_lhotse_recordings_with_and_without_supervisions(corpus: Path, out: Path, tmp_path: Path, capsys) -> None:
    recordings = [lhotse_cut(corpus, name).recording for name in SECONDS]
    RecordingSet.from_recordings(recordings).to_file(tmp_path / "recordings.jsonl.gz")
    spans = [
        SupervisionSegment("u1", "bob-one", 0.25, 0.5, text="hello", speaker="Bob", custom={"mood": "gay"}),
        SupervisionSegment("u2", "ann-one", 0.0, 0.5, text="yes"),
        SupervisionSegment("u3", "nobody", 0.0, 0.5),
    ]
    spoken = json_lines(tmp_path / "supervisions.jsonl", *(span.to_dict() for span in spans))
    source = str(tmp_path / "recordings.jsonl.gz")
    assert scan(Path(source), out).cuts == 3
    assert list(cuts(out)) == ["ann-one", "ann-two", "bob-one"]
    assert main(["data", "scan", source, "--supervisions", str(spoken), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "1 recordings have no supervision and were passed over" in printed
    assert "u3 []: its recording `nobody` is not in recordings.jsonl.gz" in printed
    found = cuts(out)
    assert {name: (cut.start, cut.duration, text_of(cut)) for name, cut in found.items()} == {
        "u1": (0.25, 0.5, "hello"),
        "u2": (0.0, 0.5, "yes"),
    }
    span = found["u1"].supervisions[0]
    assert (span.start, span.speaker, span.custom) == (0.0, "Bob", {"mood": "gay"})
    with pytest.raises(HarkenError, match=r"holds Lhotse supervisions: scan its recordings, with `--supervisions"):
        scan(spoken, out)
    with pytest.raises(HarkenError, match=r"--supervisions goes with a Lhotse recordings manifest, and .* folder"):
        scan(corpus, out, supervisions=spoken)
    with pytest.raises(HarkenError, match="brings its own texts"):
        scan(Path(source), out, supervisions=spoken, text=".txt")


def test_a_lhotse_line_that_is_damaged_is_named(corpus: Path, out: Path, tmp_path: Path) -> None:
    good = lhotse_cut(corpus, "ann/one").to_dict()
    bad = {key: value for key, value in lhotse_cut(corpus, "bob/one").to_dict().items() if key != "start"}
    with pytest.raises(HarkenError, match=r"cuts\.jsonl line 2 is not what Lhotse wrote: .*start"):
        scan(json_lines(tmp_path / "cuts.jsonl", good, bad), out)
    half = gzip.compress((tmp_path / "cuts.jsonl").read_bytes())[:-20]
    (tmp_path / "half.jsonl.gz").write_bytes(half)
    with pytest.raises(HarkenError, match=r"cannot read .*half\.jsonl\.gz"):
        scan(tmp_path / "half.jsonl.gz", out)


# What cannot be scanned


def test_sources_and_outputs_that_make_no_sense(corpus: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    for source, message in [
        (tmp_path / "none", "no file or folder at"),
        (tmp_path / "nothing", r"no audio below .*looked for files ending in \.wav, \.flac"),
        (lines(tmp_path / "list.csv", "a,b"), "is none of what can be scanned: a folder of audio"),
        (lines(tmp_path / "empty.jsonl"), "is empty"),
    ]:
        with pytest.raises(HarkenError, match=message):
            scan(source, out)
    with pytest.raises(
        HarkenError, match=r"--out must be another file than the source and end in \.jsonl, got .*all\.json$"
    ):
        scan(corpus, out.with_suffix(".json"))
    manifest = json_lines(tmp_path / "t.jsonl", {"audio": "a.wav"})
    with pytest.raises(HarkenError, match="--out must be another file than the source"):
        scan(manifest, manifest)


def test_a_process_that_dies_is_an_error_and_no_hang() -> None:
    with pytest.raises(HarkenError, match=r"a process reading files ended at once .*--jobs 1"):
        list(in_parallel(os._exit, [3, 3, 3], jobs=2, what="files"))


def test_an_error_in_a_process_is_raised_in_order() -> None:
    results = in_parallel(int, ["1", "2", "x", "4"], jobs=2, what="numbers")
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(ValueError, match="invalid literal"):
        next(results)
