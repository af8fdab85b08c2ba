"""Decoding by graphs: the lexicon's transducer read arc by arc, and the search against all sentences and alignments."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from harken.apps.graph import make_graph
from harken.apps.main import main
from harken.core.errors import HarkenError
from harken.data.tokens import Characters, Pieces
from harken.decode.arpa import arpa_words, load_arpa, save_arpa
from harken.decode.graph import PACKAGES, Graph, GraphOptions, graph_search
from harken.decode.kneser_ney import train_ngram
from harken.decode.lexicon import Lexicon, ctc_fst, lexicon_fst, read_lexicon, spell_words, told_apart

TEXTS = ["a cat", "cat a tab", "a cab", "cab a cat", "tab tab a"]
CHARACTERS = Characters(list(" abct"))
WORDS = ["a", "cab", "cat", "tab"]
INSTALLED = all(importlib.util.find_spec(name.replace("-", "_")) for name in PACKAGES)
needs_graphs = pytest.mark.skipif(not INSTALLED, reason=f"needs {', '.join(PACKAGES)}")


@pytest.fixture
def arpa(tmp_path: Path) -> Path:
    save_arpa(train_ngram([text.split() for text in TEXTS], order=2, vocabulary=WORDS), tmp_path / "words.arpa.gz")
    return tmp_path / "words.arpa.gz"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    CHARACTERS.save(tmp_path / "tokens.txt")
    return tmp_path / "tokens.txt"


def accepted(fst: str, labels: list[int], free: set[int]) -> set[tuple[int, ...]]:
    """Return the outputs of all paths that read labels; those in `free` may be read at any time."""
    arcs, finals = defaultdict(list), set()
    for fields in (list(map(int, line.split())) for line in fst.splitlines()):
        if len(fields) == 1:
            finals.add(fields[0])
        else:
            arcs[fields[0]].append(fields[1:])
    found, seen, waiting = set(), set(), [(0, 0, ())]
    while waiting:
        here = waiting.pop()
        if here in seen:
            continue
        seen.add(here)
        state, place, outputs = here
        if place == len(labels) and state in finals:
            found.add(outputs)
        for to, read, write in arcs[state]:
            written = (*outputs, write) if write else outputs
            if read in free:
                waiting.append((to, place, written))
            elif place < len(labels) and read == labels[place]:
                waiting.append((to, place + 1, written))
    return found


def test_a_lexicon_reads_words_with_spaces_between_and_nowhere_else() -> None:
    lexicon = spell_words(WORDS, CHARACTERS, "test")
    fst, marks = lexicon_fst(lexicon)
    assert marks == 0, "no word begins or equals another's spelling here but `a`, which begins none"
    free = {0}

    def read(text: str) -> set[tuple[int, ...]]:
        return accepted(fst, [token + 1 for token in CHARACTERS.encode(text)], free)

    assert read("a cat tab") == {(1, 3, 4)}
    assert read("") == {()}
    for wrong in (" a", "a ", "a  cat", "acat", "ca"):
        assert read(wrong) == set(), wrong


def test_words_that_a_deterministic_graph_could_not_tell_apart_get_marks() -> None:
    entries = [("to", (1, 2)), ("too", (1, 2)), ("tool", (1, 2, 3)), ("l", (3,))]
    assert told_apart(entries) == [1, 2, 0, 0]
    _, marks = lexicon_fst(Lexicon(tuple(entries), classes=4))
    assert marks == 2


def test_pieces_need_nothing_between_words(tmp_path: Path) -> None:
    tokenizer = Pieces.train(TEXTS * 4, tmp_path / "bpe.model", 14)
    lexicon = spell_words(WORDS, tokenizer, "test")
    fst, marks = lexicon_fst(lexicon)
    free = {0, *range(lexicon.classes + 2, lexicon.classes + 2 + marks)}
    for text in TEXTS:
        outputs = accepted(fst, [token + 1 for token in tokenizer.encode(text)], free)
        found = {tuple(number for number in one if number <= len(WORDS)) for one in outputs}
        assert tuple(WORDS.index(word) + 1 for word in text.split()) in found


def test_ctc_rules_collapse_as_best_path_decoding_does() -> None:
    fst, rng = ctc_fst(4, 0), np.random.default_rng(0)
    for path in rng.integers(0, 4, (200, 7)).tolist():
        collapsed = tuple(token + 1 for token, _ in itertools.groupby(path) if token)
        assert accepted(fst, [token + 1 for token in path], set()) == {collapsed}


def test_lexicons_are_read_and_what_cannot_be_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.txt"
    path.write_text("cat c a t\ncat t a c\n\ntab\nzoo\n<unk>\n")
    lexicon = read_lexicon(path, CHARACTERS)
    assert lexicon.entries == (("cat", (4, 2, 5)), ("cat", (5, 2, 4)), ("tab", (5, 2, 3)))
    assert (lexicon.words, lexicon.left_out, lexicon.space) == (["cat", "tab"], ("zoo",), 1)
    path.write_text("cat c a q\n")
    with pytest.raises(HarkenError, match=r"lexicon.txt, line 1: expected tokens of the model's tokenizer, found `q`"):
        read_lexicon(path, CHARACTERS)
    path.write_text("zoo\n")
    with pytest.raises(HarkenError, match="expected words that the tokenizer can spell, found 1 that it cannot"):
        read_lexicon(path, CHARACTERS)
    with pytest.raises(HarkenError, match="no lexicon at"):
        read_lexicon(tmp_path / "none.txt", CHARACTERS)


def test_words_of_an_arpa_file_are_those_of_the_model(arpa: Path) -> None:
    assert arpa_words(arpa) == list(load_arpa(arpa).words)
    with pytest.raises(HarkenError, match="no n-gram model at"):
        arpa_words(arpa.with_name("none.arpa"))


def test_without_the_packages_the_command_says_how_to_get_them(arpa, tokens, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "kaldifst", None)
    assert main(["graph", "--tokens", str(tokens), "--arpa", str(arpa), "--out", str(arpa.parent / "graph")]) == 2
    assert "`pip install kaldifst kaldi-decoder kaldilm` brings them" in capsys.readouterr().err


def viterbi(log_probs: np.ndarray, tokens: list[int]) -> float:
    """Return the log-probability of the best alignment of tokens."""
    places = [0, *itertools.chain.from_iterable((token, 0) for token in tokens)]
    scores = np.full(len(places), -np.inf)
    scores[:2] = log_probs[0, places[:2]]
    for frame in log_probs[1:]:
        before = scores.copy()
        for place, token in enumerate(places):
            skips = place > 1 and token and token != places[place - 2]
            scores[place] = max(before[max(0, place - 1) : place + 1].max(), before[place - 2] if skips else -np.inf)
            scores[place] += frame[token]
    return float(scores[-2:].max())


@needs_graphs
def test_the_search_finds_the_best_of_all_sentences(arpa: Path, tokens: Path) -> None:
    model, graph = load_arpa(arpa), make_graph(str(tokens), None, arpa)
    sentences = [words for count in range(5) for words in itertools.product(WORDS, repeat=count)]
    for scale, seed in itertools.product((1.0, 0.5), range(4)):
        generator = torch.Generator().manual_seed(seed)
        log_probs = (2 * torch.randn(2, 14, 6, generator=generator)).log_softmax(-1)
        lengths = torch.tensor([14, 9])
        options = GraphOptions(beam=1000.0, acoustic_scale=scale)
        for frames, end, found in zip(
            log_probs, lengths, graph_search(graph, options)(log_probs, lengths), strict=True
        ):
            array = frames[:end].double().numpy()
            scores = {
                words: scale * viterbi(array, CHARACTERS.encode(" ".join(words))) + model.log_prob(words)
                for words in sentences
            }
            assert tuple(graph.words[number - 1] for number in found) == max(scores, key=lambda words: scores[words])


@needs_graphs
def test_a_graph_is_written_and_read(arpa: Path, tokens: Path, tmp_path: Path, capsys) -> None:
    arguments = ["graph", "--tokens", str(tokens), "--arpa", str(arpa), "--out", str(tmp_path / "graph")]
    assert main(arguments) == 0
    assert main(arguments) == 0, "a graph may take the place of a graph"
    made, read = make_graph(str(tokens), None, arpa), Graph.load(tmp_path / "graph")
    assert (read.words, read.card) == (made.words, made.card)
    assert read.fst.to_str() == made.fst.to_str()
    with pytest.raises(HarkenError, match="no graph in"):
        Graph.load(tmp_path / "none")


@needs_graphs
def test_an_ngram_over_tokens_is_refused(tokens: Path, tmp_path: Path) -> None:
    save_arpa(train_ngram([list("cab")], order=2, vocabulary=list("abc")), tmp_path / "tokens.arpa")
    lexicon = tmp_path / "lexicon.txt"
    lexicon.write_text("tab\n")
    with pytest.raises(HarkenError, match=r"expected an n-gram over words of the lexicon .* found none of them"):
        make_graph(str(tokens), str(lexicon), tmp_path / "tokens.arpa")


@needs_graphs
def test_k2_finds_what_kaldi_finds(arpa: Path, tokens: Path) -> None:
    pytest.importorskip("k2")
    from harken.decode.k2_search import k2_graph_search

    graph, options = make_graph(str(tokens), None, arpa), GraphOptions(beam=50.0)
    log_probs = (2 * torch.randn(4, 14, 6, generator=torch.Generator().manual_seed(1))).log_softmax(-1)
    lengths = torch.tensor([9, 14, 12, 14])
    expected = graph_search(graph, options)(log_probs, lengths)
    assert k2_graph_search(graph, options)(log_probs, lengths) == expected
