"""Train, dev, test and test-unseen, and the labelled subsets of train: fixed by a seeded hash of what is said.

A line's place depends on its text, its character and the lengths of that character's lines, never on the order of files
or on a random generator's state, so that a second run, or another machine, makes the same lists. Lengths come from the
sizes of the MP3 entries, since decoders differ by some samples at the ends.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harken.core.errors import HarkenError
from harken.core.files import write_text_atomic

SEED = "amazon-queen-1"
SPLITS = ("train", "dev", "test", "test-unseen")
DEV_MINUTES = 10.0
TEST_MINUTES = 22.5
MAX_SHARE = 0.1  # of a character's speech in either of dev and test, for corpora much smaller than the package's
# Mid-size characters that no other split may hold. Names that stand for several voices are not among them.
UNSEEN = frozenset(
    {
        "NAOMI",
        "LARIS",
        "JOHN",
        "ANDERSON",
        "IAN",
        "CHEF",
        "GUARDIAN",
        "LOLA",
        "FERRYMAN",
        "BEDRAGGLED PRISONER",
    }
)
# Lines the game gives to nobody on screen, or to a thing that stands in for a voice: anyone may be speaking.
UNNAMED = frozenset({"NARR", "DOOR", "ROCK", "TORCH", "LILY PAD", "BUTTONS", "TELEPHONE"})
SUBSET_MINUTES = (10, 30, 120)
SUBSET_SECONDS = (1.0, 10.0)  # shorter and longer lines are left out of the labelled subsets
SHARED_TEXT = "text also said by a character of train"
UNNAMED_VOICE = "unnamed voice in a scene of an unseen character"


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One line that can be used: its identifier, what is said, by which character, where, for how long."""

    id: str
    text: str
    speaker: str
    scene: str  # cut scene or conversation
    seconds: float  # nominal, from the size of the entry


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Identifiers of every split, and why some lines are in none."""

    splits: dict[str, list[Utterance]]
    left_out: dict[str, str]  # identifier -> reason


def rank(utterance: Utterance, purpose: str) -> str:
    """Return the seeded hash that orders lines: of the text, and of the identifier where a text is said twice."""
    return hashlib.sha256(f"{SEED}\0{purpose}\0{utterance.text}\0{utterance.id}".encode()).hexdigest()


def assign(utterances: Sequence[Utterance]) -> Assignment:
    """Place every line. No text and no recording is in two splits, and no unseen character outside test-unseen.

    A text that is said more than once by seen characters is in train, so that test texts are new. Nameless voices are
    in train alone, so that the characters of dev and test are known ones. An unseen character's line with a text of a
    seen character is left out, as is a nameless voice in a scene where an unseen character speaks.
    """
    left_out: dict[str, str] = {}
    scenes = {u.scene for u in utterances if u.speaker in UNSEEN}
    for u in utterances:
        if u.speaker in UNNAMED and u.scene in scenes:
            left_out[u.id] = UNNAMED_VOICE
    seen = [u for u in utterances if u.speaker not in UNSEEN and u.id not in left_out]
    times = Counter(u.text for u in seen)
    unseen = []
    for u in utterances:
        if u.speaker in UNSEEN:
            if u.text in times:
                left_out[u.id] = SHARED_TEXT
            else:
                unseen.append(u)
    seconds = max(total_seconds(seen), 1.0)
    once = [u for u in seen if times[u.text] == 1 and u.speaker not in UNNAMED]
    test = by_share(once, seen, min(MAX_SHARE, TEST_MINUTES * 60 / seconds), "test")
    taken = {u.id for u in test}
    rest = [u for u in once if u.id not in taken]
    dev = by_share(rest, seen, min(MAX_SHARE, DEV_MINUTES * 60 / seconds), "dev")
    taken |= {u.id for u in dev}
    train = [u for u in seen if u.id not in taken]
    splits = {"train": train, "dev": dev, "test": test, "test-unseen": unseen}
    return Assignment(
        splits={name: sorted(part, key=lambda u: u.id) for name, part in splits.items()}, left_out=left_out
    )


def by_share(
    candidates: Sequence[Utterance], everything: Sequence[Utterance], share: float, purpose: str
) -> list[Utterance]:
    """Take, of each character, the first lines in hash order until they fill `share` of all the character's seconds."""
    all_seconds: dict[str, float] = defaultdict(float)
    for u in sorted(everything, key=lambda u: u.id):
        all_seconds[u.speaker] += u.seconds
    by_speaker: dict[str, list[Utterance]] = defaultdict(list)
    for u in candidates:
        by_speaker[u.speaker].append(u)
    taken: list[Utterance] = []
    for speaker in sorted(by_speaker):
        filled = 0.0
        for u in sorted(by_speaker[speaker], key=lambda u: rank(u, purpose)):
            if filled + u.seconds / 2 > share * all_seconds[speaker]:
                break  # stopping, not skipping, makes a smaller share a part of a larger one
            filled += u.seconds
            taken.append(u)
    return taken


def make_subsets(train: Sequence[Utterance]) -> dict[int, list[str]]:
    """Return sorted identifiers of 10, 30 and 120 minutes of train, each inside the next, spread over characters."""
    low, high = SUBSET_SECONDS
    suitable = [u for u in train if low <= u.seconds <= high]
    seconds = total_seconds(suitable)
    if seconds < max(SUBSET_MINUTES) * 60:
        raise HarkenError(f"subsets need {max(SUBSET_MINUTES)} minutes of train, found {seconds / 60:.1f}")
    return {
        minutes: sorted(u.id for u in by_share(suitable, suitable, minutes * 60 / seconds, "subset"))
        for minutes in SUBSET_MINUTES
    }


def total_seconds(utterances: Iterable[Utterance]) -> float:
    """Return the sum of the lengths, added in the order of identifiers so that the order given does not matter."""
    return sum(u.seconds for u in sorted(utterances, key=lambda u: u.id))


def subset_name(minutes: int) -> str:
    """Return the name of a labelled subset."""
    return f"train-{minutes}min"


def write_subsets(folder: Path, subsets: dict[int, list[str]]) -> None:
    """Write one list for each subset, an identifier a line."""
    for minutes, ids in subsets.items():
        write_text_atomic(folder / f"{subset_name(minutes)}.txt", "".join(f"{i}\n" for i in ids))


def read_subsets(folder: Path, train: Sequence[Utterance]) -> dict[int, list[str]]:
    """Read the fixed lists. Raises HarkenError when one is missing or names a line that is not in train."""
    known = {u.id for u in train}
    subsets: dict[int, list[str]] = {}
    for minutes in SUBSET_MINUTES:
        path = folder / f"{subset_name(minutes)}.txt"
        if not path.exists():
            raise HarkenError(f"{path} must list the labelled subset; make it again with `--write-subsets`")
        ids = path.read_text(encoding="utf-8").split()
        missing = [i for i in ids if i not in known]
        if missing:
            raise HarkenError(
                f"{path}: all {len(ids)} lines must be in train, {len(missing)} are not: {', '.join(missing[:5])}; "
                "is this the package's own queen.1c? After a change of the splits make the lists with `--write-subsets`"
            )
        subsets[minutes] = ids
    return subsets


def overlaps(splits: dict[str, list[Utterance]]) -> dict[str, dict[str, int]]:
    """Count what pairs of splits share: identifiers, texts, characters. The first two must be 0 everywhere."""
    counts: dict[str, dict[str, int]] = {}
    for i, a in enumerate(SPLITS):
        for b in SPLITS[i + 1 :]:
            counts[f"{a} / {b}"] = {
                "utterances": len({u.id for u in splits[a]} & {u.id for u in splits[b]}),
                "texts": len({u.text for u in splits[a]} & {u.text for u in splits[b]}),
                "characters": len({u.speaker for u in splits[a]} & {u.speaker for u in splits[b]}),
            }
    return counts
