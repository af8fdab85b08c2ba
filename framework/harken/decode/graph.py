"""Graphs for CTC models: a lexicon and an n-gram over words in one transducer, and the search through it.

Built by kaldifst and kaldilm, searched by kaldi-decoder (the extra `graph`): no CUDA and no PyTorch of their own. On
GPUs `harken.decode.k2_search` reads the same graphs.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from harken.core.errors import HarkenError
from harken.core.files import atomic_folder, write_json_atomic
from harken.decode.arpa import arpa_words, open_arpa
from harken.decode.lexicon import Lexicon, ctc_fst, lexicon_fst
from harken.decode.ngram import BEGIN, END

Search = Callable[[Tensor, Tensor], list[list[int]]]
"""(B, T, X) of a batch, and its utterances' lengths (B,) in T -> B lists of numbers: tokens, or words of a graph."""
PACKAGES = ("kaldifst", "kaldi-decoder", "kaldilm")
FILES = ("HLG.fst", "words.txt", "graph.json")


@dataclass(frozen=True)
class Graph:
    """The transducer HLG from frames' outputs (token + 1, 0 is the epsilon) to words, which are numbered from 1.

    fst: a `kaldifst.StdVectorFst`. card: what it was made of.
    """

    fst: Any
    words: tuple[str, ...]
    card: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write `HLG.fst`, `words.txt` and `graph.json` into a new folder."""
        with atomic_folder(folder, kind="a graph", files=FILES) as temporary:
            self.fst.write(str(temporary / "HLG.fst"))
            (temporary / "words.txt").write_text("".join(f"{word}\n" for word in self.words), encoding="utf-8")
            write_json_atomic(temporary / "graph.json", self.card)

    @classmethod
    def load(cls, folder: Path) -> Graph:
        """Read what `save` wrote. Raises HarkenError when it is not there."""
        if not (folder / "graph.json").is_file():
            raise HarkenError(f"no graph in {folder}; `harken graph --out {folder}` makes one")
        fst = load_package("kaldifst").StdVectorFst.read(str(folder / "HLG.fst"))
        words = (folder / "words.txt").read_text(encoding="utf-8").splitlines()
        return cls(fst, tuple(words), json.loads((folder / "graph.json").read_text(encoding="utf-8")))


def load_package(name: str) -> Any:
    """Import kaldifst, kaldi-decoder or kaldilm. Raises HarkenError with the command that installs them."""
    try:
        return importlib.import_module(name.replace("-", "_"))
    except ImportError as error:
        raise HarkenError(
            f"decoding by graphs needs {', '.join(PACKAGES)}, and {name} does not import ({error}); "
            f"`pip install {' '.join(PACKAGES)}` brings them"
        ) from error


def build_graph(lexicon: Lexicon, arpa: Path, card: dict[str, Any] | None = None) -> Graph:
    """Compose CTC's rules, a lexicon and an n-gram over its words, and make the result small.

    card: what else to note in it. Raises HarkenError when the n-gram has none of the words, or is no ARPA file.
    """
    kaldifst = load_package("kaldifst")
    shared = set(arpa_words(arpa)).intersection(lexicon.words)
    if not shared:
        raise HarkenError(
            f"{arpa}: expected an n-gram over words of the lexicon ({' '.join(lexicon.words[:5])} ...), found none of "
            "them; an n-gram over tokens is for `--method prefix_beam`"
        )
    text, marks = lexicon_fst(lexicon)
    spelled = kaldifst.compile(text)
    kaldifst.arcsort(spelled, sort_type="olabel")
    model = word_fst(lexicon.words, arpa)
    kaldifst.arcsort(model, sort_type="ilabel")
    graph = _small(kaldifst, kaldifst.compose(spelled, model))
    kaldifst.minimize_encoded(graph)
    kaldifst.arcsort(graph, sort_type="ilabel")
    rules = kaldifst.compile(ctc_fst(lexicon.classes, marks))
    kaldifst.arcsort(rules, sort_type="olabel")
    whole = kaldifst.compose(rules, graph)
    card = {**(card or {}), "classes": lexicon.classes, "words": len(lexicon.words), "words_in_ngram": len(shared)}
    return Graph(kaldifst.StdVectorFst(whole), tuple(lexicon.words), card)


def _small(kaldifst: Any, fst: Any) -> Any:
    """Return it without epsilons and deterministic."""
    found = kaldifst.StdVectorFst(fst)
    kaldifst.determinize_star(found)
    return found


def word_fst(words: Sequence[str], arpa: Path) -> Any:
    """Return an ARPA file as the acceptor G of the numbered words, whose back-off arcs read `#0`.

    What has other words in it is left out.
    """
    kaldilm, kaldifst = load_package("kaldilm"), load_package("kaldifst")
    table = ["<eps>", *words, "#0", BEGIN, END]
    with tempfile.TemporaryDirectory() as folder:
        numbers, plain = Path(folder, "words.txt"), Path(folder, "plain.arpa")
        numbers.write_text("".join(f"{word} {place}\n" for place, word in enumerate(table)), encoding="utf-8")
        with open_arpa(arpa) as source, plain.open("w", encoding="utf-8") as copy:
            shutil.copyfileobj(source, copy)  # kaldilm reads no gzip
        try:
            text = kaldilm.arpa2fst(
                str(plain), disambig_symbol="#0", read_symbol_table=str(numbers), max_arpa_warnings=0
            )
        except RuntimeError as error:
            raise HarkenError(f"{arpa} cannot be made a graph: {error}; expected an ARPA file") from error
    return kaldifst.compile(text)


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """beam: nats by which a path may be worse than the best. max_active: states kept after a frame.

    acoustic_scale: factor on the model's log-probabilities.
    """

    beam: float = 16.0
    max_active: int = 7000
    acoustic_scale: float = 1.0


def graph_search(graph: Graph, options: GraphOptions) -> Search:
    """Return the search: (log_probs (B, T, V) natural-log, lengths (B,) in frames) -> B lists of word numbers, from 1.

    It ends where the n-gram allows an end, or, where no path does, at the best state.
    """
    decoder_of, kaldifst = load_package("kaldi-decoder"), load_package("kaldifst")
    settings = decoder_of.FasterDecoderOptions(beam=options.beam, max_active=options.max_active)

    def search(log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
        scaled = (log_probs.detach().float().cpu() * options.acoustic_scale).numpy()
        found = []
        for frames, end in zip(scaled, lengths.tolist(), strict=True):
            decoder = decoder_of.FasterDecoder(graph.fst, settings)
            decoder.decode(decoder_of.DecodableCtc(np.ascontiguousarray(frames[:end])))
            reached, path = decoder.get_best_path()
            words = kaldifst.get_linear_symbol_sequence(path)[2] if reached else []
            found.append([int(word) for word in words])
        return found

    return search
