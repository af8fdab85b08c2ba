"""Viterbi beside all paths, and what `harken align` writes: Lhotse's alignments and a store of the same tokens."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse import CutSet

from harken.apps.main import main
from harken.config.saved import save_model
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec, Window
from harken.data.manifest import Manifest
from harken.data.tokens import Characters
from harken.decode.alignment import Span, forced_alignments, spread, word_numbers, word_spans
from harken.evaluate.align import Aligned, Found, Work, annotate
from harken.evaluate.ctc_model import CtcModel
from harken.objectives.saved import build_objective
from harken.units.store import LabelStore

TEXTS = [[], [1], [1, 2], [1, 1], [2, 1, 2], [1, 1, 1]]
PEAKS = [(2, 3), (6, 7), (7, 9)]
FILES_OF_ONE = ("cuts.jsonl", "card.json", "labels/labels.bin", "labels/ids.txt", "labels/card.json")


def best_of_all_paths(log_probs: np.ndarray, tokens: list[int]) -> list[Span] | None:
    """Score every path that spells the tokens; None where there is none."""

    def spells(path) -> list[int]:
        return [token for token, _ in itertools.groupby(path) if token]

    def score(path) -> float:
        return sum(float(log_probs[frame, token]) for frame, token in enumerate(path))

    frames, classes = log_probs.shape
    paths = [path for path in itertools.product(range(classes), repeat=frames) if spells(path) == tokens]
    if not paths or not frames:
        return None
    spans, frame = [], 0
    for token, group in itertools.groupby(max(paths, key=score)):
        length = len(list(group))
        if token:
            spans.append((frame, frame + length))
        frame += length
    return spans


def alone(log_probs: torch.Tensor, tokens: list[int]) -> list[Span] | None:
    return forced_alignments(log_probs[None], torch.tensor([len(log_probs)]), [tokens], blank=0)[0]


# The search


def test_each_of_a_batch_is_the_best_of_all_its_paths_whatever_pads_it() -> None:
    """Utterances of 0 to 6 outputs with every text, in one batch; behind their ends stands what would win."""
    cases = [(length, text) for length in range(7) for text in TEXTS]
    log_probs = torch.randn(len(cases), 6, 3, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    lengths = torch.tensor([length for length, _ in cases])
    padded = log_probs.clone()
    for row, (length, _) in enumerate(cases):
        padded[row, length:] = math.nan if row % 2 else 1e6
    found = forced_alignments(padded, lengths, [text for _, text in cases], blank=0)
    for row, (length, text) in enumerate(cases):
        expected = best_of_all_paths(log_probs[row, :length].numpy(), text)
        assert found[row] == expected, (length, text)
        assert alone(log_probs[row, :length], text) == expected
    assert sum(spans is None for spans in found) > 6, "texts that do not fit must be among them"


def test_a_text_too_long_for_the_outputs_has_no_alignment() -> None:
    log_probs = torch.full((3, 4), math.log(0.25))
    assert alone(log_probs, [1, 2, 3]) == [(0, 1), (1, 2), (2, 3)]
    assert alone(log_probs, [1, 2, 2]) is None
    assert alone(log_probs[:0], [1]) is None


def test_a_long_text_is_aligned() -> None:
    tokens = [1, 2] * 150
    log_probs = torch.full((600, 3), -5.0)
    log_probs[torch.arange(600), torch.tensor(tokens).repeat_interleave(2)] = -0.1
    assert alone(log_probs, tokens) == [(2 * place, 2 * place + 2) for place in range(300)]


# Blanks and words


def test_blanks_are_shared_by_the_tokens_around_them() -> None:
    assert spread(PEAKS, 12) == [(0, 5), (5, 7), (7, 9)], "three between the first two: the earlier has two of them"
    assert spread([(4, 5), (8, 9)], 20) == [(2, 7), (7, 10)], "outwards as far as inwards"
    assert spread([(1, 2), (8, 9)], 10) == [(0, 5), (5, 10)], "and no further than the audio"
    assert spread([(3, 4)], 10) == [(3, 4)]
    assert spread([], 10) == []


def test_labels_are_blank_where_no_token_reaches() -> None:
    assert Aligned.of([5, 6], [(2, 4), (4, 5)], 7).labels.tolist() == [0, 0, 5, 5, 6, 0, 0]


def test_words_end_at_spaces_and_where_pieces_begin_one() -> None:
    spans = [(0, 1), (2, 3), (4, 5), (6, 9)]
    assert word_spans(spans, ["a", "b", "<space>", "c"]) == [(0, 3), (6, 9)]
    assert word_spans(spans, ["▁a", "b", "▁c", "d"]) == [(0, 3), (4, 9)]
    assert word_spans(spans, ["▁", "b", "▁c", "▁d"]) == [(2, 3), (4, 5), (6, 9)]
    assert word_numbers(["<space>", "a", "<space>", "<space>", "b"]) == [None, 0, None, None, 1]


def test_each_text_of_a_cut_has_its_own_items_in_the_time_of_its_recording() -> None:
    """Two supervisions in a cut from second 10 on; an output is 0.1 s, the first has its middle at 0.05 s."""
    model = CtcModel(
        name="m",
        log_probs=lambda batch: (batch.inputs, batch.lengths),
        spec=FrameSpec((Window(101, 100),), 1000),
        tokenizer=Characters(["a", "b", " "]),
    )
    line = {"start": 10.0, "supervisions": [{"text": "ab a"}, {"start": 1.0}, {"text": "b", "alignment": {"x": []}}]}
    aligned = Aligned.of([1, 2, 3, 1, 3, 2], [(0, 1), (1, 3), (3, 4), (4, 5), (5, 8), (8, 9)], 12)
    annotate(line, aligned, model, model.tokenizer.symbols())
    first, silent, second = line["supervisions"]
    assert [(item[0], *np.round(item[1:3], 8)) for item in first["alignment"]["token"]] == [
        ("a", 10.0, 0.1),
        ("b", 10.1, 0.2),
        ("<space>", 10.3, 0.1),
        ("a", 10.4, 0.1),
        ("<space>", 10.5, 0.3),
    ]
    assert first["alignment"]["word"] == [["ab", 10.0, 0.3, None], ["a", 10.4, 0.1, None]]
    assert second["alignment"] == {"x": [], "token": [["b", 10.8, 0.1, None]], "word": [["b", 10.8, 0.1, None]]}
    assert silent == {"start": 1.0}


# The verb


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory) -> Path:
    """A CTC model with fresh weights and two outputs a frame, so that few texts are too long."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = corpus.config("ctc", "filterbank", "objective.head_upsampling=2")
    save_model(folder, config, build_objective(config).state_dict())
    return folder


@pytest.fixture
def lines(corpus) -> list[dict]:
    return [json.loads(line) for line in corpus.valid.read_text().splitlines()]


def align(model: Path, manifest: Path, out: Path, *more: str) -> int:
    return main(["align", str(model), str(manifest), "--out", str(out), "--jobs", "1", *more])


def written(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_lhotse_reads_tokens_and_words_and_the_store_has_the_same(model: Path, corpus, tmp_path: Path, lines) -> None:
    for line in lines:  # cuts that begin within their recording: Lhotse counts items from its beginning
        line["start"], line["duration"] = 0.1, line["duration"] - 0.1
    manifest = written(tmp_path / "later.jsonl", lines)
    assert align(model, manifest, tmp_path / "alignment") == 0
    cuts, store = list(CutSet.from_file(tmp_path / "alignment/cuts.jsonl")), LabelStore(tmp_path / "alignment/labels")
    card = json.loads((tmp_path / "alignment/card.json").read_text())
    assert [cut.id for cut in cuts] == [line["id"] for line in lines]
    assert (card["cuts"], card["aligned"]) == (8, 8)
    assert (tmp_path / "alignment/labels/unreadable.tsv").read_text() == ""
    for cut in cuts:
        (part,) = cut.supervisions
        tokens, words = part.alignment["token"], part.alignment["word"]
        assert [item.symbol.replace("<space>", " ") for item in tokens] == list(part.text)
        assert [item.symbol for item in words] == part.text.split()
        assert all(math.isclose(a.end, b.start, abs_tol=1e-6) for a, b in itertools.pairwise(tokens))
        assert tokens[0].start >= cut.start
        assert tokens[-1].end <= cut.start + cut.duration
        for place, label in enumerate(store[cut.id]):
            time = cut.start + (store.card.center + store.card.hop * place) / 16000
            names = [item.symbol for item in tokens if item.start <= time < item.end]
            assert names == ([card["symbols"][label]] if label else [])
    assert [piece.supervisions[0].text for piece in cuts[0].trim_to_alignments("word")] == (
        cuts[0].supervisions[0].text.split()
    )
    assert main(["units", "check", str(tmp_path / "alignment/labels")]) in (0, 1)


def test_batches_and_processes_change_nothing(model: Path, corpus, tmp_path: Path, monkeypatch) -> None:
    assert align(model, corpus.valid, tmp_path / "together") == 0
    monkeypatch.setattr("harken.evaluate.align.BLOCK", 3)
    assert align(model, corpus.valid, tmp_path / "one_by_one", "--max-seconds", "0.1", "--jobs", "2") == 0
    for name in FILES_OF_ONE:
        assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "one_by_one" / name).read_bytes(), name
    assert align(model, corpus.valid, tmp_path / "together") == 0, "an alignment may be replaced"


def test_pieces_and_long_work_that_was_stopped_write_the_bytes_of_one_call(
    model: Path, corpus, tmp_path: Path, monkeypatch, capsys
) -> None:
    assert align(model, corpus.valid, tmp_path / "together") == 0
    monkeypatch.setattr("harken.evaluate.align.BLOCK", 3)
    monkeypatch.setattr("harken.evaluate.align.BLOCKS_KEPT", 1)
    done: list[tuple[int, ...]] = []
    whole = Work.__call__

    def until_the_last(work: Work, places: tuple[int, ...]) -> Found:
        if 7 in places:
            raise HarkenError("stopped")
        done.append(places)
        return whole(work, places)

    monkeypatch.setattr(Work, "__call__", until_the_last)
    assert align(model, corpus.valid, tmp_path / "divided", "--piece", "2/3") == 0
    assert not (tmp_path / "divided").exists()
    assert done == [(3, 4, 5)]
    assert align(model, corpus.valid, tmp_path / "divided", "--max-seconds", "60") == 2
    assert "holds pieces of other work, its max_seconds differs" in capsys.readouterr().err
    for out in (tmp_path / "divided", tmp_path / "stopped"):
        assert align(model, corpus.valid, out) == 2
        assert not out.exists()
    assert done == [(3, 4, 5), (0, 1, 2), (0, 1, 2), (3, 4, 5)]
    monkeypatch.setattr(Work, "__call__", whole)
    for name in ("divided", "stopped"):
        assert align(model, corpus.valid, tmp_path / name) == 0
        assert not (tmp_path / f"{name}.pieces").exists()
        for file in FILES_OF_ONE:
            assert (tmp_path / "together" / file).read_bytes() == (tmp_path / name / file).read_bytes(), file


def test_what_cannot_be_aligned_is_named_and_written_as_it_was(
    model: Path, corpus, tmp_path: Path, lines, capsys
) -> None:
    lines[1]["supervisions"][0]["text"] = "ab" * 200
    lines[2]["supervisions"][0]["text"] = "Z"
    lines[3]["supervisions"] = []
    lines[4]["recording"]["sources"][0]["source"] = str(tmp_path / "gone.flac")
    assert align(model, written(tmp_path / "some.jsonl", lines), tmp_path / "alignment") == 0
    out = capsys.readouterr().out
    assert "4 of 8 cuts aligned" in out
    assert "WARNING 4 cuts have no alignment or one that lacks frames, among them:" in out
    reasons = dict(line.split("\t") for line in (tmp_path / "alignment/labels/unreadable.tsv").read_text().splitlines())
    assert sorted(reasons) == [line["id"] for line in lines[1:5]]
    names = [line["id"] for line in lines]
    assert reasons[names[1]].startswith(f"the transcript of cut `{names[1]}` has 400 tokens and needs 400 frames, the")
    assert reasons[names[2]] == f"the transcript of cut `{names[2]}` has 'Z', which the tokenizer lacks"
    assert reasons[names[3]] == f"cut `{names[3]}` has no transcript"
    assert "cannot be read" in reasons[names[4]]
    found = [json.loads(line) for line in (tmp_path / "alignment/cuts.jsonl").read_text().splitlines()]
    assert found[1:5] == lines[1:5]
    assert all(line["supervisions"][0]["alignment"]["token"] for line in [found[0], *found[5:]])
    store = LabelStore(tmp_path / "alignment/labels")
    assert [bool(store[name].any()) for name in names] == [True, False, False, False, False, True, True, True]


def test_one_error_each(model: Path, corpus, tmp_path: Path, lines, capsys) -> None:
    def refused(*arguments) -> str:
        assert align(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return str(line)

    (tmp_path / "hubert").mkdir()
    config = corpus.config("hubert", "filterbank")
    save_model(tmp_path / "hubert", config, build_objective(config).state_dict())
    line = refused(tmp_path / "hubert", corpus.valid, tmp_path / "out")
    assert line == f"harken align: {tmp_path}/hubert must be a CTC model, and it was trained with `hubert`"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("all of it")
    assert "mine exists already and holds `thesis.tex`" in refused(model, corpus.valid, tmp_path / "mine")
    for data in lines:
        data["supervisions"] = []
    line = refused(model, written(tmp_path / "bare.jsonl", lines), tmp_path / "out")
    assert f"none of the 8 cuts of {tmp_path}/bare.jsonl could be aligned; the first: cut `{lines[0]['id']}`" in line
    assert "must be positive, got 1 and 0.0" in refused(model, corpus.valid, tmp_path / "out", "--max-seconds", "0")
    assert not (tmp_path / "out").exists()


def test_outputs_between_samples_are_refused(corpus, tmp_path: Path, capsys) -> None:
    config = corpus.config("ctc", "filterbank", "objective.head_upsampling=3")
    save_model(tmp_path, config, build_objective(config).state_dict())
    assert align(tmp_path, corpus.valid, tmp_path / "out") == 2
    stride = build_objective(config).backbone.spec.stride
    assert (
        f"the {stride} samples of a frame must be divisible by `objective.head_upsampling`" in capsys.readouterr().err
    )


def test_cuts_without_an_alignment_count_for_no_purity(model: Path, corpus, tmp_path: Path, lines, capsys) -> None:
    """Their labels are a filling, which another alignment of the same cuts must not be held against."""
    assert align(model, corpus.valid, tmp_path / "all") == 0
    lines[2]["supervisions"][0]["text"] = "Z"
    assert align(model, written(tmp_path / "some.jsonl", lines), tmp_path / "some") == 0
    capsys.readouterr()
    assert main(["units", "purity", str(tmp_path / "some/labels"), str(tmp_path / "all/cuts.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "purity 1.0000" in out
    assert "of 7 cuts" in out
    assert "1 cuts left out" in out


@pytest.mark.parametrize("outputs", [1, 2, 4, 5])
def test_a_store_expects_as_many_labels_as_a_model_gives(corpus, tmp_path: Path, outputs: int) -> None:
    config = corpus.config("ctc", "filterbank", f"objective.head_upsampling={outputs}", "frontend.subsampling=4")
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", config, build_objective(config).state_dict())
    assert align(tmp_path / "model", corpus.valid, tmp_path / "out") == 0
    card, spec = LabelStore(tmp_path / "out/labels").card, build_objective(config).backbone.spec
    samples = np.random.default_rng(0).integers(0, 40000, 500)
    expected = [spec.num_frames(int(count)) * outputs for count in samples]
    assert card.labels_of(samples / 16000).tolist() == expected


def test_a_tokenizer_with_a_piece_for_the_unknown_refuses_what_it_cannot_write(corpus, tmp_path: Path, lines) -> None:
    bpe = ("--kind", "bpe", "--size", "9", "--out", str(tmp_path / "bpe.model"))
    assert main(["data", "tokens", str(corpus.train), *bpe]) == 0
    tokenizer = f"objective.tokenizer={tmp_path}/bpe.model"
    config = corpus.config("ctc", "filterbank", "objective.head_upsampling=4", tokenizer)
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", config, build_objective(config).state_dict())
    lines[0]["supervisions"][0]["text"] += "q"
    assert align(tmp_path / "model", written(tmp_path / "some.jsonl", lines), tmp_path / "out") == 0
    (reason,) = (tmp_path / "out/labels/unreadable.tsv").read_text().splitlines()
    assert reason == f"{lines[0]['id']}\tthe transcript of cut `{lines[0]['id']}` has 'q', which the tokenizer lacks"


def test_the_manifest_of_an_alignment_is_indexed(model: Path, corpus, tmp_path: Path) -> None:
    assert align(model, corpus.valid, tmp_path / "alignment") == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "alignment/cuts.jsonl.idx").iterdir()}
    assert len(Manifest(tmp_path / "alignment/cuts.jsonl")) == 8
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "alignment/cuts.jsonl.idx").iterdir()}
    assert after == before
