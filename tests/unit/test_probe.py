"""Purities beside plain counting and scikit-learn's mutual information; `harken probe` beside the units verbs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import homogeneity_score

from harken.apps.main import main
from harken.config.saved import save_model
from harken.data.alignments import Alignment, items_of, places_in
from harken.data.dataset import read_whole
from harken.data.manifest import Manifest
from harken.encoders.backbone import hidden_rows
from harken.encoders.saved import load_backbone
from harken.evaluate import purity
from harken.evaluate.purity import Joint, store_purity
from harken.objectives.saved import build_objective
from harken.units.store import Card, LabelStore, begin_store

CHANGES = {
    "ids": (lambda line: line.update(id="x" + line["id"]), "the alignment is of other cuts"),
    "audio": (lambda line: line.update(duration=line["duration"] / 2), "the alignment is of other audio"),
    "tiers": (
        lambda line: line["supervisions"][0].pop("alignment"),
        "has an alignment `token`, and at least one is needed; found none of any name: `harken align` makes",
    ),
}


@pytest.fixture(scope="module")
def models(corpus, tmp_path_factory) -> Path:
    """Folders of a `ctc` and a `hubert` model with fresh weights."""
    root = tmp_path_factory.mktemp("models")
    for objective in ("ctc", "hubert"):
        torch.manual_seed(0)
        config = corpus.config(objective, "filterbank")
        (root / objective).mkdir()
        save_model(root / objective, config, build_objective(config).state_dict())
    return root


@pytest.fixture(scope="module")
def aligned(corpus, tmp_path_factory) -> Path:
    """The validation set with the characters where the tones are, equal shares of each cut with gaps between them."""
    lines = [json.loads(line) for line in corpus.valid.read_text().splitlines()]
    for line in lines:
        text = line["supervisions"][0]["text"]
        share = line["duration"] / len(text)
        items = [[name, round(place * share, 8), round(0.9 * share, 8), None] for place, name in enumerate(text)]
        words, start = [], 0
        for word in text.split():
            words.append([word, round(start * share, 8), round((len(word) - 0.1) * share, 8), None])
            start += len(word) + 1
        line["supervisions"][0]["alignment"] = {"token": items, "word": words}
    path = tmp_path_factory.mktemp("aligned") / "cuts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def changed(aligned: Path, path: Path, change) -> Path:
    lines = [json.loads(line) for line in aligned.read_text().splitlines()]
    for line in lines:
        change(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def pairs_of(labels: LabelStore, manifest: Path, tier: str) -> list[tuple[str, int]]:
    """Return the symbol at the middle of each label, the empty one outside of all, frame by frame in plain Python."""
    pairs = []
    for text in manifest.read_text().splitlines():
        line = json.loads(text)
        items = line["supervisions"][0]["alignment"][tier]
        for place, unit in enumerate(labels[line["id"]]):
            time = (labels.card.center + place * labels.card.hop) / labels.card.sample_rate
            inside = [name for name, start, duration, _ in items if start <= time < start + duration]
            pairs.append((inside[0] if inside else "", int(unit)))
    return pairs


def plain_figures(pairs: list[tuple[str, int]]) -> dict[str, float]:
    """Count as section IV-E of the paper defines it, by dictionaries."""
    joint, symbols, units = Counter(pairs), Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    total = len(pairs)
    best_symbol = {unit: max(joint[name, unit] for name in symbols) for unit in units}
    best_unit = {name: max(joint[name, unit] for unit in units) for name in symbols}
    return {
        "purity": sum(best_symbol.values()) / total,
        "cluster_purity": sum(best_unit.values()) / total,
        "pnmi": float(homogeneity_score([a for a, _ in pairs], [b for _, b in pairs])),
        "largest_symbol": max(symbols.values()) / total,
        "outside": symbols[""] / total,
        "symbols": len(symbols),
        "units": len(units),
        "frames": total,
    }


def figures(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# Counting


@pytest.mark.parametrize("tier", ["token", "word"])
def test_purities_are_those_of_plain_counting(corpus, aligned: Path, tmp_path: Path, capsys, tier: str) -> None:
    """MFCC units at 100 Hz: the corpus's tones make characters audible, so the units follow them."""
    out = tmp_path / "purity.json"
    assert main(["units", "purity", str(corpus.labels), str(aligned), "--tier", tier, "--out", str(out)]) == 0
    expected = plain_figures(pairs_of(LabelStore(corpus.labels), aligned, tier))
    found = figures(out)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert (found["cuts"], found["left_out"]) == (8, 0)
    assert 0.02 < found["outside"] < 0.4
    said = capsys.readouterr().out
    assert f"against `{tier}` of {aligned}: purity {expected['purity']:.4f} (a single unit: " in said
    assert f"PNMI {expected['pnmi']:.4f}; {expected['symbols']} symbols, {expected['units']} units, " in said
    if tier == "token":
        assert found["purity"] > found["largest_symbol"] + 0.2
        assert found["pnmi"] > 0.4


def test_merging_now_and_then_changes_nothing(corpus, aligned: Path, monkeypatch) -> None:
    store, alignment = LabelStore(corpus.labels), Alignment(aligned, "token")
    whole = store_purity(store, alignment)
    monkeypatch.setattr(purity, "WAITING", 100)
    assert store_purity(store, alignment) == whole


def test_units_that_are_the_symbols_tell_all_and_equal_ones_nothing() -> None:
    line = {"supervisions": [{"alignment": {"x": [["a", 0.0, 1.0], ["b", 1.0, 1.0], {"s": "c", "t": 2, "d": 1}]}}]}
    times = np.arange(30) / 10 + 0.05
    for units, expected in (
        (np.arange(30) // 10 + 65533, (1.0, 1.0, 1.0)),
        (np.zeros(30, np.uint8), (1 / 3, 1.0, 0.0)),
    ):
        joint = Joint()
        assert joint.add(line, "x", units, times)
        assert not joint.add(line, "y", units, times)
        found = joint.measure()
        assert (found.purity, found.cluster_purity, found.pnmi) == pytest.approx(expected, abs=1e-12)


def test_labels_of_any_rate_are_counted_at_their_middles(aligned: Path, tmp_path: Path) -> None:
    """The symbols themselves as labels, at 100 and 50 Hz of 16 kHz, 100 Hz of 8 kHz, and two of one time."""
    manifest = Manifest(aligned)
    rates = ((16000, 160, 400, 1), (16000, 320, 640, 1), (8000, 80, 200, 1), (16000, 160, 400, 2))
    for number, (rate, hop, window, same) in enumerate(rates):
        folder = tmp_path / str(number)
        folder.mkdir()
        center = (window - 1) / 2
        card = Card(
            clusters=9, sample_rate=rate, hop=hop, center=center, features="f", clusterer="c", dtype="uint8", cuts=8,
            labels=0, rows=same,
        )  # fmt: skip
        counts = card.labels_of(np.asarray(manifest.seconds))
        rows, symbols = [], {"": 0}
        for place, count in enumerate(counts.tolist()):
            items = items_of(manifest.line(place), "token")
            rows.append([
                next((symbols.setdefault(name, len(symbols)) for name, start, end in items if start <= time < end), 0)
                for time in ((center + hop * (np.arange(count) // same)) / rate).tolist()
            ])  # fmt: skip
        card = Card(**{**vars(card), "labels": int(counts.sum())})
        begin_store(folder, [str(manifest.line(place)["id"]) for place in range(8)], np.cumsum([0, *counts]), card)
        (folder / "labels.bin").write_bytes(np.concatenate(rows).astype(np.uint8).tobytes())
        card.write(folder)
        found = store_purity(LabelStore(folder), Alignment(aligned, "token"))
        assert (found.purity, found.cluster_purity, found.pnmi) == pytest.approx((1.0, 1.0, 1.0))
        assert found.frames == counts.sum()


def test_a_time_on_a_border_belongs_to_what_begins_there() -> None:
    items = [("a", 0.1, 0.3), ("b", 0.1 + 0.2, 0.5), ("c", 0.7, 0.8)]
    times = np.array([0.0, 0.1, 0.2, 0.3, 0.30000000000000004, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9])
    assert places_in(items, times).tolist() == [-1, 0, 0, 1, 1, -1, -1, 2, 2, -1, -1]


def test_items_of_a_mixed_cut_are_in_its_time() -> None:
    def track(offset: float, start: float, name: str) -> dict[str, Any]:
        return {"offset": offset, "cut": {"start": start, "supervisions": [{"alignment": {"x": [[name, 5.0, 1.0]]}}]}}

    line = {"tracks": [track(3.0, 4.0, "late"), track(0.0, 5.0, "early"), {"cut": {"duration": 1.0}}]}
    assert items_of(line, "x") == [("early", 0.0, 1.0), ("late", 4.0, 5.0)]


def test_the_labels_of_an_alignment_tell_all_of_it(models: Path, corpus, tmp_path: Path) -> None:
    folder = tmp_path / "alignment"
    assert main(["align", str(models / "ctc"), str(corpus.valid), "--out", str(folder), "--jobs", "1"]) == 0
    out = tmp_path / "purity.json"
    assert main(["units", "purity", str(folder / "labels"), str(folder / "cuts.jsonl"), "--out", str(out)]) == 0
    found = figures(out)
    assert (found["purity"], found["cluster_purity"], found["pnmi"]) == pytest.approx((1.0, 1.0, 1.0))
    assert found["left_out"] == 8 - found["cuts"] < 8


# The verb


def test_a_probe_is_what_the_units_verbs_give(models: Path, corpus, aligned: Path, tmp_path: Path, capsys) -> None:
    """Fit, label and compare in three verbs with the same seed; ranks from the singular values of all frames."""
    model, km, labels = str(models / "hubert"), str(tmp_path / "km"), str(tmp_path / "labels")
    hidden = ("--features", "hidden", "--model", model, "--layer", "1", "--jobs", "1")
    fit = ("--clusters", "8", "--max-frames", "100000", "--seed", "3")
    probe = ("--layer", "1", *fit, "--workers", "0", "--max-seconds", "4", "--out", str(tmp_path / "probe.json"))
    assert main(["probe", model, str(corpus.valid), "--alignment", str(aligned), *probe]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert main(["units", "fit", str(corpus.valid), "--out", km, *fit, *hidden]) == 0
    assert main(["units", "label", str(corpus.valid), "--clusterer", km, "--out", labels, *hidden]) == 0
    assert main(["units", "purity", labels, str(aligned), "--out", str(tmp_path / "purity.json")]) == 0
    found, expected = figures(tmp_path / "probe.json"), figures(tmp_path / "purity.json")
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=2e-3), "up to rounding in batches"
    assert found["frames_fitted"] == found["frames_of_ranks"] == found["frames"]

    backbone, _ = load_backbone(model)
    batches = [read_whole(Manifest(corpus.valid), [place], 16000, {}) for place in range(8)]
    with torch.no_grad():
        outputs = {
            "rank_frontend": [backbone.frontend(batch.inputs, batch.lengths)[0][0].numpy() for batch in batches],
            "rank_encoder": [hidden_rows(backbone, batch, (2,))[2][0] for batch in batches],
        }
    for name, rows in outputs.items():
        frames = np.concatenate(rows).astype(np.float64)
        singular = np.linalg.svd(frames - frames.mean(0), compute_uv=False)
        shares = singular[singular > 0] / singular.sum()
        assert found[name] == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())), rel=1e-3), name
    ranks = f"rank of the frontend {found['rank_frontend']:.1f}, rank of the encoder {found['rank_encoder']:.1f}"
    assert said.startswith(f"{model}: {ranks}; layer 1, 8 clusters, against `token`: purity {found['purity']:.4f} (")


def test_a_probe_is_seeded_and_bounded(models: Path, aligned: Path, tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / f"{number}.json"
        options = ("--layer", "2", "--clusters", "5", "--max-frames", "100", "--seed", str(seed), "--workers", "0")
        assert main(["probe", str(models / "hubert"), str(aligned), *options, "--out", str(out)]) == 0
        found.append(figures(out))
    assert found[0] == found[1]
    assert found[0]["frames_of_ranks"] == pytest.approx(100, rel=0.4)
    assert found[0]["rank_encoder"] != found[2]["rank_encoder"]


def test_a_cut_that_takes_the_place_of_another_counts_once(models: Path, aligned: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "broken.flac").write_bytes(b"")

    def damage(line: dict[str, Any]) -> None:
        if line["id"].endswith("3"):
            line["recording"]["sources"][0]["source"] = str(tmp_path / "broken.flac")

    manifest, out = changed(aligned, tmp_path / "cuts.jsonl", damage), tmp_path / "probe.json"
    options = ("--layer", "0", "--clusters", "5", "--workers", "0", "--out", str(out))
    assert main(["probe", str(models / "hubert"), str(manifest), *options]) == 0
    found = figures(out)
    assert (found["cuts"], found["left_out"]) == (7, 1)
    assert found["frames_of_ranks"] == found["frames"]
    assert capsys.readouterr().out.count("NOTE replaced") == 1


# What is refused


@pytest.mark.parametrize("kind", CHANGES)
def test_an_alignment_of_something_else_is_one_error(
    models: Path, corpus, aligned: Path, tmp_path: Path, capsys, kind: str
) -> None:
    change, words = CHANGES[kind]
    other = str(changed(aligned, tmp_path / "other.jsonl", change))
    for arguments in (
        ["units", "purity", str(corpus.labels), other],
        ["probe", str(models / "hubert"), str(aligned), "--alignment", other, "--layer", "1", "--clusters", "4",
         "--workers", "0"],
    ):  # fmt: skip
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line


def test_what_makes_no_probe_is_named(models: Path, corpus, aligned: Path, tmp_path: Path, capsys) -> None:
    def refused(*more: str, manifest: Path = aligned) -> str:
        assert main(["probe", str(models / "hubert"), str(manifest), "--workers", "0", *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return str(line)

    assert "`--layer` must lie in 0..2 for" in refused("--layer", "3")
    assert "the clusters must be 1 to 65536" in refused("--layer", "1", "--clusters", "0")
    assert "`--workers` 0 or more, got 0, 120 and 0" in refused("--layer", "1", "--max-frames", "0")
    line = refused("--layer", "1", "--clusters", "2", "--tier", "phone")
    assert "has an alignment `phone`, and at least one is needed; found `token`, `word`: `harken align` makes" in line

    def silence(data: dict[str, Any]) -> None:
        data["supervisions"][0]["alignment"]["token"] = [["a", 0.0, data["duration"], None]]

    assert main(["units", "purity", str(corpus.labels), str(changed(aligned, tmp_path / "a.jsonl", silence))]) == 2
    assert "purities need frames of two symbols or more, got " in capsys.readouterr().err
