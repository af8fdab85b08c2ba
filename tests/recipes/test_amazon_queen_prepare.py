"""The default corpus: its reader, where it comes from, and the whole command, on bytes made here."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet

from harken.core.errors import HarkenError

LOCAL = Path(__file__).parents[2] / "egs" / "amazon_queen" / "local"


def pstr(text: str, at: int, align: int) -> bytes:
    raw = bytes([len(text)]) + text.encode("cp437")
    return raw + b"\0" * (-(at + len(raw)) % align if text else 0)


def strings(texts: list[str], at: int, align: int = 2) -> bytes:
    out = b""
    for text in texts:
        out += pstr(text, at + len(out), align)
    return out


def make_dog() -> bytes:
    """Talk 7: Joe's opening and one choice, one answer by the file's character, words to part."""
    hero = struct.pack(">hh", 0, 0) + strings(["Hi!*01 Bye."], 36, 4)  # id 0: an opening line too
    hero += struct.pack(">hh", 0, 0x2B) + strings(["A*FRquestion"], 36 + len(hero), 4)
    person_at = 32 + len(hero)
    person = struct.pack(">hh", 0, 0x2B)
    person += strings(["*02Yes*XY00(237,112)No"], person_at + 4, 4)
    end_at = person_at + len(person)
    end = strings(["So long.", ""], end_at)
    head = struct.pack(">hhhhhh", 0, 0, 7, 2, 1, 0).ljust(22, b"\0")
    head += struct.pack(">HHH", person_at, 0, end_at)
    return b"\0" * 20 + head.ljust(32, b"\0") + hero + person + end


def record(number: int, executes: int = 0, people: int = 0) -> bytes:
    return struct.pack(">17h", number, 0, 0, 0, executes, executes, *[0] * 11) + struct.pack(
        f">h{people}h", people, *[5] * people
    )


def make_cut(*, promised: int = 4) -> bytes:
    """Joe speaks, an animation with frames moves, thing 1 speaks, nobody speaks."""
    frames = (struct.pack(">h", 606) + bytes(18)) * 2 + struct.pack(">h", -2)
    records = record(0, people=2) + record(-1, executes=1, people=1) + frames + record(1) + record(-4)
    end = 12 + len(records)
    head = struct.pack(">hhHHHH", 0, -promised, 0, end + 2, end + 4, 0)
    words = strings(["", "*FLHello", "*", "Grr!*03Go", "...later"], end + 4)
    return bytes(20) + head + records + bytes(4) + words


def make_jas() -> tuple[bytes, bytes]:
    """One room, two names, one object called by the second name, one description."""
    counts = struct.pack(">4H", 1, 2, 1, 1)
    objects = struct.pack(">8h", -2, 0, 0, 0, 0, 0, 0, 0)
    rows = ["It is a rock.*02Nice", "Stone", "Trader Bob", "Cave", *["verb"] * 12]
    rows += [f"Answer {i}" for i in range(1, 41)]
    return bytes(20) + counts + objects, "\r\n".join(rows).encode("cp437")


def mp3(seconds: float, level: float, seed: int) -> bytes:
    noise = np.random.default_rng(seed).normal(0, 1, int(11025 * seconds)).clip(-3, 3) / 3 * level
    out = io.BytesIO()
    soundfile.write(out, noise, 11025, format="MP3", subtype="MPEG_LAYER_III")
    return out.getvalue()


def make_queen(entries: dict[str, bytes]) -> bytes:
    at = 15 + 21 * len(entries)
    table, body = b"", b""
    for name, blob in entries.items():
        table += struct.pack(">12sBII", name.encode(), 1, at + len(body), len(blob))
        body += blob
    return b"QTBLCEM10\0\0\0\1" + struct.pack(">H", len(entries)) + table + body


def texts(**more: bytes) -> dict[str, bytes]:
    """Every kind of text of a small game."""
    jas, jas2 = make_jas()
    dog = {"BOB2.DOG": make_dog(), "C1.CUT": make_cut(), "QUEEN.JAS": jas, "QUEEN2.JAS": jas2}
    return dog | {name.replace("_SB", ".SB"): blob for name, blob in more.items()}


SPOKEN = ["070000J1", "070000J2", "07SSSSJ1", "07002BJ1", "07002BJ2", "07002BP2", "07002BP3", "07XXXXP1"]
SPOKEN += ["C1___011", "C1___012", "C1___031", "C1___032", "C1___041", "JOE00011", "JOE00401", "JOE00412"]


@pytest.fixture
def small(local, tmp_path) -> Path:
    """A game with noise for speech, one entry silent, one short, one broken, one without a text."""
    sound = {key: mp3(0.8, 0.5, seed) for seed, key in enumerate(SPOKEN)}
    sound |= {"JOE00021": mp3(0.8, 0.0, 0), "JOE00031": mp3(0.1, 0.5, 1), "JOE00041": b"no MP3 at all"}
    sound |= {"JOE00051": sound["JOE00011"], "99SSSSP1": mp3(0.5, 0.5, 2)}
    entries = texts() | {f"{key}.SB": blob for key, blob in sound.items()}
    path = tmp_path / "queen.1c"
    path.write_bytes(make_queen(entries))
    return path


def test_reader_pairs_every_kind_of_record(local, small):
    found = local.queen.pair(local.queen.open_queen(small))
    said = {line.key: (line.speaker, line.text, line.record) for line in found.lines}
    assert said["070000J2"] == ("JOE", "Bye.", "dog")
    assert said["07SSSSJ1"] == ("JOE", "Hi!", "dog")
    assert said["07002BJ1"] == ("JOE", "A", "dog")
    assert said["07002BJ2"] == ("JOE", "question", "dog")
    assert said["07002BP2"] == ("BOB", "Yes", "dog")
    assert said["07002BP3"] == ("BOB", "No", "dog")
    assert said["07XXXXP1"] == ("BOB", "So long.", "dog")
    assert said["C1___012"] == ("JOE", "Hello", "cut")
    assert said["C1___031"] == ("BOB", "Grr!", "cut")
    assert said["C1___032"] == ("BOB", "Go", "cut")
    assert said["C1___041"] == ("NARR", "...later", "cut")
    assert said["JOE00401"] == ("JOE", "Answer 40", "jas")
    assert said["JOE00412"] == ("JOE", "Nice", "jas")
    assert found.speech_without_text == ["99SSSSP1", "C1___011"]
    assert found.inconsistent == []


def test_cut_scene_that_ends_early_is_kept_and_named(local, tmp_path):
    path = tmp_path / "queen.1c"
    path.write_bytes(make_queen(texts(C1___031_SB=b"x") | {"C1.CUT": make_cut(promised=40)}))
    found = local.queen.pair(local.queen.open_queen(path))
    assert [line.text for line in found.lines] == ["Grr!"]
    assert found.inconsistent == ["C1.CUT"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"RIFF" + data[4:], "starts with `QTBL`"),
        (lambda data: data[:12] + b"\0" + data[13:], "compression must be 1"),
        (lambda data: data[:100], "must fit the file"),
        (lambda data: data[:-10], "cut short"),
    ],
)
def test_reader_refuses_what_is_not_the_game(local, small, change, words):
    small.write_bytes(change(small.read_bytes()))
    with pytest.raises(HarkenError, match=words):
        local.queen.open_queen(small)


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(Path(__file__).parents[2] / "framework"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, LOCAL / "prepare.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )


def empty_subsets(folder: Path) -> Path:
    folder.mkdir()
    for minutes in (10, 30, 120):
        (folder / f"train-{minutes}min.txt").write_text("c1___012\n")
    return folder


def test_command_writes_manifests_and_names_what_it_drops(small, tmp_path):
    out, lists = tmp_path / "out", empty_subsets(tmp_path / "subsets")
    first = run("--out", out, "--corpus", small, "--subsets", lists, "--jobs", "1")
    assert first.returncode == 0, first.stderr
    dropped = dict(line.split("\t") for line in (out / "dropped.tsv").read_text().splitlines()[1:])
    assert dropped["joe00011"] == "digits"  # "Answer 1"
    assert dropped["joe00021"] == "silent"
    assert dropped["joe00031"] == "shorter than 0.3 s"
    assert dropped["joe00041"].startswith("unreadable: ")
    assert dropped["99ssssp1"] == "no text"
    cuts = {cut.id: cut for cut in CutSet.from_file(out / "train.jsonl")}
    cut = cuts["c1___031"]
    assert (cut.supervisions[0].text, cut.supervisions[0].speaker) == ("grr", "BOB")
    assert cut.supervisions[0].custom == {"raw_text": "Grr!", "record": "cut"}
    wave = cut.load_audio()
    assert wave.shape == (1, cut.num_samples)
    assert cut.sampling_rate == 16000
    assert cut.duration == pytest.approx(0.8, abs=0.15)
    assert [c.id for c in CutSet.from_file(out / "train-10min.jsonl")] == ["c1___012"]
    assert "No copyright file lay beside" in (out / "COPYRIGHT").read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["dropped"]["no text"] == 2
    stamp = (out / "flac" / "c1" / "c1___031.flac").stat().st_mtime_ns
    (out / "flac" / "c1" / "c1___012.flac").write_bytes(b"half")
    killed = out / "flac" / "c1" / ".c1___041.flac.1.tmp"
    killed.write_bytes(b"half")
    second = run("--out", out, "--corpus", small, "--subsets", lists, "--jobs", "1")
    assert second.returncode == 0, second.stderr
    assert not killed.exists()
    assert (out / "flac" / "c1" / "c1___031.flac").stat().st_mtime_ns == stamp
    assert soundfile.info(out / "flac" / "c1" / "c1___012.flac").samplerate == 16000


def test_bad_audio_is_named_not_raised(local, small, tmp_path):
    game = local.queen.open_queen(small)
    for name, reason in {
        "JOE00021": "silent",
        "JOE00031": "shorter",
        "JOE00041": "unreadable",
        "JOE00011": "",
    }.items():
        offset, size = game.entries[f"{name}.SB"]
        job = local.audio.Job(id=local.audio.sound_id(name), offset=offset, size=size)
        sound = local.audio.extract(job, data_file=small, folder=tmp_path / "flac", force=False)
        assert sound.reason.startswith(reason), name
        assert bool(sound.samples) == (reason == "")


def test_same_recording_is_kept_once(local, tmp_path):
    jas, jas2 = make_jas()
    sound = mp3(0.8, 0.5, 1)
    entries = {
        "C1.CUT": make_cut(),
        "QUEEN.JAS": jas,
        "QUEEN2.JAS": jas2,
        "C1___012.SB": sound,
        "C1___031.SB": sound,
    }
    path = tmp_path / "queen.1c"
    path.write_bytes(make_queen(entries))
    game = local.queen.open_queen(path)
    sounds = {i: local.audio.Sound(id=i, samples=16000) for i in ("c1___012", "c1___031")}
    items, dropped = local.prepare.select(game, local.queen.pair(game), sounds, tmp_path)
    assert list(items) == ["c1___012"]
    assert dropped == {"c1___031": "same recording: as c1___012"}


def make_deb(files: dict[str, bytes]) -> bytes:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    deb = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", tar.getvalue())):
        deb += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        deb += b"\n" * (len(content) % 2)
    return deb


def test_package_unpacks_without_debian_tools(local, tmp_path):
    place = "./usr/share/scummvm/flight-of-the-amazon-queen/queen.1c"
    notice = "./usr/share/doc/flight-of-the-amazon-queen/copyright"
    deb = tmp_path / "x.deb"
    deb.write_bytes(make_deb({place: b"data", notice: b"free", "./usr/games/queen": b"no"}))
    local.fetch.unpack_in_python(deb, tmp_path / "out")
    found = local.fetch.from_folder(tmp_path / "out", "x.deb")
    assert found.data.read_bytes() == b"data"
    assert found.copyright is not None
    assert found.copyright.read_bytes() == b"free"
    assert not (tmp_path / "out" / "usr" / "games").exists()
    deb.write_bytes(deb.read_bytes()[:-40])
    with pytest.raises(HarkenError, match="whole Debian package"):
        local.fetch.unpack_in_python(deb, tmp_path / "again")
    with pytest.raises(HarkenError, match="whole Debian package"):
        local.fetch.unpack(deb, tmp_path / "unpacked")
    assert not list((tmp_path / "unpacked").iterdir())


@pytest.mark.parametrize("given", [["--corpus", "nowhere"], ["--corpus", "."], []])
def test_no_corpus_is_one_error_that_names_both_ways(tmp_path, given, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run("--out", tmp_path / "out", *given, PATH=str(tmp_path))  # no apt-get on this path
    assert found.returncode == 1
    assert found.stderr.count("error:") == 1
    assert "Traceback" not in found.stderr
    for way in ("apt-get download flight-of-the-amazon-queen", "apt-get update", "--corpus"):
        assert way in found.stderr


def test_apt_that_does_not_know_the_package_is_explained(tmp_path):
    apt = tmp_path / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    apt.chmod(0o755)
    found = run("--out", tmp_path / "out", PATH=f"{apt.parent}{os.pathsep}{os.environ['PATH']}")
    assert found.returncode == 1
    assert "Unable to locate package" in found.stderr
    assert "`apt-get update`" in found.stderr
    assert not list((tmp_path / "out" / "download").iterdir())


def test_help_shows_examples():
    found = run("--help")
    assert found.returncode == 0
    assert "python local/prepare.py --out data" in found.stdout
