"""Whether the transcripts of cuts can be learned: characters, lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from harken.core.errors import HarkenError
from harken.data.check import Cuts, Doubt
from harken.data.lines import text_of
from harken.data.tokens import Tokenizer


def check_transcripts(
    cuts: Cuts, tokenizer: Tokenizer, room: Callable[[int], int], needed: Callable[[Sequence[int]], int]
) -> Iterator[Doubt]:
    """Yield what is wrong with the transcripts of cuts.

    room: outputs that the model gives for a number of samples. needed: outputs that the loss needs for tokens.
    """
    of, allowed = len(cuts.places), cuts.config.max_bad_share
    empty = np.flatnonzero(np.asarray(cuts.manifest.characters)[cuts.places] == 0)
    if len(empty):
        yield Doubt(
            "wrong" if len(empty) > allowed * of else "warning",
            f"{len(empty)} of {of} cuts of {cuts.key} have no transcript, the first "
            f"`{cuts.id_at(int(cuts.places[empty[0]]))}`, and `data.max_bad_share` allows {100 * allowed:g}%: nothing "
            "is learned from them; leave them out, or give texts with `harken data scan --text`",
        )
    unknown: Counter[str] = Counter()
    strange, long, looked, refused = [], [], 0, False
    for line in cuts.lines():
        text = text_of(line)
        if not text:
            continue
        looked += 1
        if found := tokenizer.unknown(text):
            unknown.update(found)
            strange.append(str(line["id"]))
        try:
            tokens = tokenizer.encode(text)
        except HarkenError:
            refused = True
            continue
        have = room(round(float(line["duration"]) * cuts.config.sample_rate))
        if needed(tokens) > have:
            long.append(f"`{line['id']}` ({len(tokens)} tokens need {needed(tokens)} frames, the model gives {have})")
    if strange:
        symbols = ", ".join(f"'{symbol}'" for symbol, _ in unknown.most_common(10))
        yield Doubt(
            "wrong" if refused or len(strange) > allowed * looked else "warning",
            f"{len(strange)} of {looked} transcripts looked at in {cuts.key} hold characters that the tokenizer does "
            f"not know, the first `{strange[0]}`: {symbols}; normalise the texts, or make the tokenizer of these",
        )
    if long:
        yield Doubt(
            "wrong" if len(long) > allowed * looked else "warning",
            f"{len(long)} of {looked} transcripts looked at in {cuts.key} are longer than their frames allow, the "
            f"first {long[0]}, and `data.max_bad_share` allows {100 * allowed:g}%: they are left out of the loss; look "
            "for texts of other audio, use larger pieces, or give the model more frames",
        )
