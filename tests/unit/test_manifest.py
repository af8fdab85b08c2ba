"""Indexed manifests: seeking, what is refused, and many processes at one file."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest

from harken.core.errors import HarkenError
from harken.data.index import build_index, index_folder
from harken.data.manifest import Manifest

FORK = multiprocessing.get_context("fork")  # as the workers of a torch DataLoader begin


def cut(number: int, **changes) -> dict:
    recording = {
        "id": f"r{number}",
        "sources": [{"type": "file", "channels": [0], "source": f"/audio/{number}.flac"}],
        "sampling_rate": 16000,
        "num_samples": 16000 * (number + 1),
        "duration": float(number + 1),
        "channel_ids": [0],
    }
    # texts of several bytes a character and of different lengths: offsets are bytes, not characters
    supervision = {
        "id": f"u{number}",
        "recording_id": f"r{number}",
        "start": 0.0,
        "duration": number + 1.0,
        "text": "hé€" * (number % 7),
    }
    plain = {"id": f"u{number}", "start": 0.0, "duration": number + 1.0, "channel": 0}
    return {**plain, "supervisions": [supervision], "recording": recording, "type": "MonoCut", **changes}


def write(path: Path, cuts: list[dict]) -> Path:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in cuts), encoding="utf-8")
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write(tmp_path / "train.jsonl", [cut(number) for number in range(9)])


def test_every_line_is_found_in_any_order(manifest: Path) -> None:
    assert build_index(manifest) == 9
    opened = Manifest(manifest)
    assert len(opened) == 9
    assert opened.seconds.tolist() == [number + 1.0 for number in range(9)]
    assert opened.card["hours"] == pytest.approx(45 / 3600)
    for place in (8, 0, 5, 5, 1):
        assert opened.line(place) == cut(place)
        assert opened[place].supervisions[0].text == "hé€" * (place % 7)
    assert [item.id for item in opened] == [f"u{number}" for number in range(9)]


def test_the_last_line_may_lack_its_end(manifest: Path) -> None:
    manifest.write_bytes(manifest.read_bytes().rstrip(b"\n"))
    assert Manifest(manifest).line(8) == cut(8)


def test_a_missing_index_is_made_on_opening(manifest: Path) -> None:
    assert len(Manifest(manifest)) == 9
    assert (index_folder(manifest) / "card.json").is_file()
    assert sorted(path.name for path in manifest.parent.iterdir()) == ["train.jsonl", "train.jsonl.idx"]


def test_a_manifest_that_grew_is_refused_until_it_is_indexed_again(manifest: Path) -> None:
    build_index(manifest)
    with manifest.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(cut(9)) + "\n")
    with pytest.raises(HarkenError, match=r"changed after it was indexed \(\d+ bytes then.*harken data index"):
        Manifest(manifest)
    build_index(manifest)
    assert len(Manifest(manifest)) == 10


def test_a_manifest_edited_to_the_same_size_is_refused(manifest: Path) -> None:
    build_index(manifest)
    manifest.write_text(manifest.read_text("utf-8").replace('"duration": 3.0', '"duration": 8.0'), "utf-8")
    with pytest.raises(HarkenError, match="same size, other content"):
        Manifest(manifest)


def test_a_copy_with_its_index_is_accepted_in_whatever_order_it_was_copied(manifest: Path) -> None:
    build_index(manifest)
    copy = manifest.parent / "copy" / manifest.name
    shutil.copytree(index_folder(manifest), index_folder(copy))
    shutil.copyfile(manifest, copy)
    later = index_folder(copy).joinpath("card.json").stat().st_mtime + 5
    os.utime(copy, (later, later))
    assert Manifest(copy).line(3) == cut(3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "is not a Lhotse cut"),
        ("", "is not a Lhotse cut"),
        ("[1, 2]", "is not a Lhotse cut"),
        ('{"duration": 1.0}', "is not a Lhotse cut with `id` and `duration`: KeyError"),
        ('{"id": "x"}', "is not a Lhotse cut"),
        ('{"id": "x", "duration": "long"}', "is not a Lhotse cut"),
        ('{"id": "x", "duration": NaN}', "must be positive seconds, got nan"),
        ('{"id": "x", "duration": -1}', "must be positive seconds, got -1"),
        ('{"id": "u1", "duration": 1.0}', "cut id `u1` occurs twice"),
    ],
)
def test_a_bad_line_is_named_and_the_old_index_stays(manifest: Path, line: str, message: str) -> None:
    build_index(manifest)
    before = (index_folder(manifest) / "card.json").read_bytes()
    lines = manifest.read_text("utf-8").split("\n")
    manifest.write_text("\n".join([*lines[:4], line, *lines[5:]]), "utf-8")
    with pytest.raises(HarkenError) as caught:
        build_index(manifest)
    assert f"{manifest} line 5" in str(caught.value)
    assert message in str(caught.value)
    assert (index_folder(manifest) / "card.json").read_bytes() == before


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HarkenError, match="plain JSONL"):
        build_index(tmp_path / "cuts.jsonl.gz")
    with pytest.raises(HarkenError, match=r"cannot index .*none\.jsonl.*No such file"):
        build_index(tmp_path / "none.jsonl")
    with pytest.raises(HarkenError, match=r"no manifest at .*harken data scan"):
        Manifest(tmp_path / "none.jsonl")


def test_something_else_in_the_place_of_the_index_is_named(manifest: Path) -> None:
    index_folder(manifest).write_text("mine")
    with pytest.raises(HarkenError, match="cannot index"):
        Manifest(manifest)
    with pytest.raises(HarkenError, match=r"is a file where a folder \(index of a manifest\) is to be written"):
        build_index(manifest)
    assert index_folder(manifest).read_text() == "mine"


def test_an_open_manifest_can_be_sent_to_another_process(manifest: Path) -> None:
    opened = Manifest(manifest)
    opened.line(0)
    assert pickle.loads(pickle.dumps(opened)).line(4) == cut(4)


def read_at_random(manifest: Manifest, seed: int, failures) -> None:
    rng = random.Random(seed)
    wrong = 0
    for _ in range(2000):
        place = rng.randrange(len(manifest))
        try:
            wrong += manifest.line(place)["id"] != f"u{place}"
        except (ValueError, KeyError):
            wrong += 1
    failures.put(wrong)


def test_forked_workers_do_not_move_each_others_place(tmp_path: Path) -> None:
    opened = Manifest(write(tmp_path / "many.jsonl", [cut(number) for number in range(2000)]))
    opened.line(0)  # the file is open before the fork
    failures = FORK.Queue()
    workers = [FORK.Process(target=read_at_random, args=(opened, seed, failures)) for seed in range(4)]
    for worker in workers:
        worker.start()
    wrong = [failures.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert wrong == [0, 0, 0, 0]


def open_together(path: Path, barrier, answers) -> None:
    barrier.wait(timeout=60)
    try:
        answers.put(len(Manifest(path)))
    except Exception as error:  # noqa: BLE001  whatever it is, the test names it
        answers.put(repr(error))


def test_processes_that_miss_the_index_together_all_get_it(tmp_path: Path) -> None:
    path = write(tmp_path / "many.jsonl", [cut(number) for number in range(500)])
    for _ in range(5):
        shutil.rmtree(index_folder(path), ignore_errors=True)
        barrier, answers = FORK.Barrier(6), FORK.Queue()
        workers = [FORK.Process(target=open_together, args=(path, barrier, answers)) for _ in range(6)]
        for worker in workers:
            worker.start()
        assert [answers.get(timeout=60) for _ in workers] == [500] * 6
        for worker in workers:
            worker.join()
        assert sorted(item.name for item in tmp_path.iterdir()) == ["many.jsonl", "many.jsonl.idx"]
