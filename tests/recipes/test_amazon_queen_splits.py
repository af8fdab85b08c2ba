"""What the default corpus is split into and how its text is written, and the real package read with both."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import soundfile

from harken.core.errors import HarkenError


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("It's been FUN,  but...", "it's been fun but"),
        ("life-like/odd", "life like odd"),
        ("(sigh) Caf\u00e9 <gulp>", "cafe"),
        ("Stickin' to 'em, Mr. King", "stickin' to 'em mister king"),
        ("D.N.A.", "d n a"),
        ("A ' lone one", "a lone one"),
        ("@@ She's beautiful! @@", "she's beautiful"),
        ("Decoder Ring^_?", "decoder ring"),
    ],
)
def test_text_is_lower_case_letters(local, raw, expected):
    assert local.text.normalise(raw).text == expected


@pytest.mark.parametrize(
    ("raw", "reason"),
    [("(sigh)", "noise only"), ("<ahem>...", "noise only"), ("?!", "no letters"), ("24 hours", "digits")],
)
def test_text_that_cannot_be_used_says_why(local, raw, reason):
    found = local.text.normalise(raw)
    assert (found.text, found.reason) == ("", reason)


def corpus_of(local, count: int) -> list:
    """Utterances of four seen and two unseen characters, a tenth of the texts repeated."""
    draw = random.Random(3)
    speakers = ["JOE", "JOE", "BOB", "FAYE", "NARR", "NAOMI", "LOLA"]
    return [
        local.splits.Utterance(
            id=f"u{i:05d}",
            text=f"words {draw.randrange(count * 5)}" if i % 10 else f"common {i % 70}",
            speaker=draw.choice(speakers),
            scene=f"s{draw.randrange(count * 10)}",
            seconds=draw.uniform(0.5, 12.0),
        )
        for i in range(count)
    ]


def test_splits_share_nothing_and_do_not_depend_on_order(local):
    lines = corpus_of(local, 4000)
    found = local.splits.assign(lines)
    again = local.splits.assign(random.Random(1).sample(lines, len(lines)))
    assert found == again
    assert all(pair["texts"] == pair["utterances"] == 0 for pair in local.splits.overlaps(found.splits).values())
    placed = [u.id for part in found.splits.values() for u in part]
    assert sorted([*placed, *found.left_out]) == [u.id for u in lines]
    for name, minutes in (("dev", local.splits.DEV_MINUTES), ("test", local.splits.TEST_MINUTES)):
        assert local.splits.total_seconds(found.splits[name]) / 60 == pytest.approx(minutes, rel=0.25)
        assert not {u.speaker for u in found.splits[name]} & (local.splits.UNNAMED | local.splits.UNSEEN)
    assert {u.speaker for u in found.splits["test-unseen"]} == {"NAOMI", "LOLA"}
    assert not {u.speaker for u in found.splits["train"]} & local.splits.UNSEEN


def test_subsets_are_nested_and_spread(local, tmp_path):
    train = local.splits.assign(corpus_of(local, 6000)).splits["train"]
    subsets = local.splits.make_subsets(train)
    assert set(subsets[10]) < set(subsets[30]) < set(subsets[120])
    by_id = {u.id: u for u in train}
    for minutes, ids in subsets.items():
        part = [by_id[i] for i in ids]
        assert local.splits.total_seconds(part) / 60 == pytest.approx(minutes, rel=0.05)
        assert {u.speaker for u in part} == {"JOE", "BOB", "FAYE", "NARR"}
        assert all(1 <= u.seconds <= 10 for u in part)
    local.splits.write_subsets(tmp_path, subsets)
    assert local.splits.read_subsets(tmp_path, train) == subsets
    with pytest.raises(HarkenError, match=r"train-10min.txt: .* lines must be in train"):
        local.splits.read_subsets(tmp_path, train[: len(train) // 2])


def test_real_package_has_every_line(local, pairing):
    # 6,553 when the cut scenes C41A, C76B, C8A and CINTR are left where their records seem to end; 34 more beyond.
    assert local.queen.count_records(pairing.lines) == {"cut": 2040, "dog": 3983, "jas": 564}
    assert len(pairing.lines) == 6587
    assert len(pairing.speech_without_text) == 158
    assert pairing.inconsistent == []
    said = {line.key: (line.speaker, line.text) for line in pairing.lines}
    assert said["020006J1"][0] == "JOE"
    assert said["C76B_141"] == ("JOE", "Faye, what are you doing here?")
    assert said["C76B_151"] == ("FAYE", "I hitched a ride with Anderson in the airship.")
    assert said["CINTR561"] == ("RITA", "Will I ever see you again?")
    counts = {speaker: sum(line.speaker == speaker for line in pairing.lines) for speaker in ("BOB", "SPARKY", "TAM")}
    assert counts == {"BOB": 304, "SPARKY": 281, "TAM": 157}


def test_real_package_decodes_and_reads_alike_in_python(local, real, pairing, tmp_path):
    game = local.queen.open_queen(real.data)
    chosen = random.Random(5).sample(pairing.lines, 30)
    for line in chosen:
        offset, size = game.entries[f"{line.key}.SB"]
        job = local.audio.Job(id=local.audio.sound_id(line.key), offset=offset, size=size)
        sound = local.audio.extract(job, data_file=real.data, folder=tmp_path, force=False)
        assert sound.reason == ""
        assert 0.3 <= sound.samples / 16000 < 10
        wave, rate = soundfile.read(local.audio.flac_path(tmp_path, sound.id))
        assert rate == 16000
        assert 0.05 < np.abs(wave).max() < 1.0
        original, _ = soundfile.read(io.BytesIO(game.blob(f"{line.key}.SB")))
        assert sound.samples / 16000 == pytest.approx(len(original) / 11025, abs=1e-3)


def test_committed_subsets_are_what_the_seed_gives(local, real, pairing, tmp_path):
    """The lists in the recipe, made again from the package; nothing needs decoding for it."""
    game = local.queen.open_queen(real.data)
    identifiers = [local.audio.sound_id(name.removesuffix(".SB")) for name in game.names(".SB")]
    sounds = {identifier: local.audio.Sound(id=identifier, samples=16000) for identifier in identifiers}
    items, _ = local.prepare.select(game, pairing, sounds, tmp_path)
    found = local.splits.assign([item.utterance for item in items.values()])
    assert {name: len(part) for name, part in found.splits.items()} == {
        "train": 5268,
        "dev": 221,
        "test": 491,
        "test-unseen": 452,
    }
    assert all(pair["texts"] == pair["utterances"] == 0 for pair in local.splits.overlaps(found.splits).values())
    assert {u.speaker for u in found.splits["test-unseen"]} == local.splits.UNSEEN
    committed = local.splits.read_subsets(local.prepare.SUBSETS, found.splits["train"])
    assert committed == local.splits.make_subsets(found.splits["train"])
