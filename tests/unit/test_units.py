"""Clusters and labels: the fit beside scikit-learn's, labels whatever the processes and kills, what is refused."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from harken.apps.main import main
from harken.config.schema import DataConfig
from harken.core.batch import Batch
from harken.core.draws import key
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec, Window
from harken.data.manifest import Manifest
from harken.units.alignment import UnitReader
from harken.units.check import check_units
from harken.units.clusterer import Clusterer, fit_clusterer, sample_frames
from harken.units.features import Mfcc, make_features
from harken.units.kmeans import KMeansConfig, assign, fit, plus_plus
from harken.units.label import Job, label
from harken.units.store import Card, LabelStore

WORKER = Path(__file__).with_name("worker_label.py")
FILES = ("labels.bin", "ids.txt", "index.npy", "lookup.npy", "card.json", "plan.json", "unreadable.tsv")


def quiet(text: str) -> None:
    """Say nothing."""


# The fit


@pytest.fixture(scope="module")
def frames(corpus) -> np.ndarray:
    """MFCC of the whole training set."""
    data = DataConfig(train=str(corpus.train), workers=0)
    return sample_frames(str(corpus.train), Mfcc(), data, max_frames=10**6, seed=0, say=quiet)


def test_inertia_is_scikit_learns(frames: np.ndarray) -> None:
    """Means of four seeds: one seed of either differs from another by 1%."""
    from sklearn.cluster import KMeans

    expected = np.mean([KMeans(50, n_init=1, random_state=seed).fit(frames).inertia_ for seed in range(4)])
    fits = [fit(frames, KMeansConfig(clusters=50, seed=seed), quiet) for seed in range(4)]
    found = np.mean([inertia for _, inertia in fits])
    print(f"{len(frames)} frames, 50 clusters: {found / expected:.4f} of scikit-learn's inertia")
    assert found <= 1.01 * expected
    centroids, inertia = fits[0]
    assert centroids.shape == (50, 39)
    distances = ((frames[:, None, :] - centroids[None]) ** 2).sum(-1)
    assert inertia == pytest.approx(float(distances.min(1).astype(np.float64).sum()), rel=1e-4), (
        "it says what it reached"
    )


def test_a_fit_is_a_function_of_its_seed(frames: np.ndarray) -> None:
    results = [fit(frames, KMeansConfig(clusters=20, seed=seed, lloyd_passes=3), quiet)[0] for seed in (1, 1, 2)]
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_plus_plus_finds_clusters_that_lie_apart() -> None:
    rng = np.random.default_rng(0)
    middles = rng.standard_normal((30, 8)).astype(np.float32) * 100
    points = np.repeat(middles, 50, axis=0) + rng.standard_normal((1500, 8)).astype(np.float32)
    start = plus_plus(torch.from_numpy(points), 30, np.random.default_rng(1))
    labels, distance = assign(torch.from_numpy(middles), start)
    assert len(labels.unique()) == 30, "one start in each cluster"
    assert float(distance.max()) < 60


def test_plus_plus_starts_better_than_chance(frames: np.ndarray) -> None:
    data = torch.from_numpy(frames)
    chance = data[np.random.default_rng(0).permutation(len(data))[:50]]
    start = plus_plus(data, 50, np.random.default_rng(0))
    assert float(assign(data, start)[1].mean()) < 0.95 * float(assign(data, chance)[1].mean())


def test_equal_frames_leave_no_cluster_without_a_number() -> None:
    same = np.ones((100, 4), dtype=np.float32)
    centroids, inertia = fit(same, KMeansConfig(clusters=5), quiet)
    assert np.isfinite(centroids).all()
    assert inertia == pytest.approx(0, abs=1e-3)


def test_fewer_frames_than_clusters_are_an_error(frames: np.ndarray) -> None:
    with pytest.raises(HarkenError, match="50 clusters need at least as many frames, got 49"):
        fit(frames[:49], KMeansConfig(clusters=50), quiet)


def test_the_sample_is_bounded_and_seeded(corpus) -> None:
    data = DataConfig(train=str(corpus.train), workers=0)
    samples = [
        sample_frames(str(corpus.train), Mfcc(), data, max_frames=2000, seed=seed, say=quiet) for seed in (0, 0, 1)
    ]
    assert len(samples[0]) == pytest.approx(2000, rel=0.1)
    assert np.array_equal(samples[0], samples[1])
    assert len(samples[0]) != len(samples[2]) or not np.array_equal(samples[0], samples[2])


# The labelling


@pytest.fixture(scope="module")
def long_audio(tmp_path_factory) -> Path:
    """10 minutes in 24 cuts of 25 s out of one file, so that labels outweigh their index."""
    import soundfile
    from lhotse import CutSet, MonoCut, Recording

    root = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    tone = np.sin(np.cumsum(np.repeat(rng.uniform(0.05, 1.5, 320), 1600)))
    soundfile.write(root / "audio.flac", 0.3 * tone + 0.05 * rng.standard_normal(len(tone)), 16000)
    recording = Recording.from_file(root / "audio.flac")
    cuts = [MonoCut(f"cut{index:02d}", index * 0.3, 25.0, 0, recording=recording) for index in range(24)]
    CutSet.from_cuts(cuts).to_jsonl(root / "long.jsonl")
    return root / "long.jsonl"


def size_of(folder: Path) -> int:
    """Return the bytes of all files, those that vanish while we look left out."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(path) / name).stat().st_size
            except FileNotFoundError:
                continue
    return total


@dataclass(frozen=True)
class Case:
    """What is labelled: a clusterer and the features it is of."""

    clusterer: Path
    features: dict[str, Any]


@pytest.fixture(scope="module")
def cases(corpus, long_audio: Path, tmp_path_factory) -> dict[str, Case]:
    """MFCC with few clusters, and a hidden layer with more than a byte can count."""
    from harken.config.saved import save_model
    from harken.objectives.saved import build_objective

    root = tmp_path_factory.mktemp("hidden")
    config = corpus.config("hubert", "waveform")
    torch.manual_seed(0)
    (root / "model").mkdir()
    save_model(root / "model", config, build_objective(config).state_dict())
    hidden = {"kind": "hidden", "model": str(root / "model"), "layer": 1}
    data = DataConfig(train=str(long_audio), workers=0)
    settings = KMeansConfig(clusters=300, lloyd_passes=2)
    fit_clusterer(root / "km", str(long_audio), make_features(**hidden), data, settings, max_frames=10_000, say=quiet)
    return {"mfcc": Case(corpus.clusterer, {"kind": "mfcc"}), "hidden": Case(root / "km", hidden)}


def start(folder: Path, manifest: Path, case: Case, processes: int) -> subprocess.Popen[str]:
    """Begin a labelling whose output and temporary files all lie below `folder`."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    job = {
        "out": str(folder / "store"),
        "manifest": str(manifest),
        "clusterer": str(case.clusterer),
        "features": case.features,
        "processes": processes,
        "max_seconds": 25.0,
    }
    (folder / "job.json").write_text(json.dumps(job))
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(folder / "job.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")},
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the labelling processes below one, not multiprocessing's own helper."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [child for child in found if "resource_tracker" not in " ".join(child.cmdline())]


def kill_after_a_piece(process: subprocess.Popen[str], store: Path, processes: int) -> None:
    """Kill the process that was started, once it has finished a piece; the workers below it must end by themselves."""
    limit = time.monotonic() + 600
    while not list((store / "pieces").glob("*.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.001)
    workers = children(process)
    assert len(workers) == (processes if processes > 1 else 0)
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert alive == [], "workers go on without their parent"


@pytest.mark.slow
@pytest.mark.parametrize("features", ["mfcc", "hidden"])
def test_labels_do_not_depend_on_processes_or_kills_and_take_their_size_on_disk(
    cases, long_audio: Path, tmp_path: Path, features: str
) -> None:
    case = cases[features]
    for name, processes in (("killed", 1), ("killed-of-two", 2)):
        store = tmp_path / name / "store"
        kill_after_a_piece(start(tmp_path / name, long_audio, case, processes), store, processes)
        with pytest.raises(HarkenError, match="its labelling did not finish: run the same `harken units label` again"):
            LabelStore(store)
        before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
        time.sleep(0.3)
        assert before == {path: path.stat().st_mtime_ns for path in store.rglob("*")}, "someone still writes"
        output = finish(start(tmp_path / name, long_audio, case, processes))
        assert any(f"{left} of 3 pieces to do" in output for left in (1, 2)), "what was done is not done again"

    two = start(tmp_path / "two", long_audio, case, 2)
    peak = 0
    while two.poll() is None:
        peak = max(peak, size_of(tmp_path / "two"))
        time.sleep(0.005)
    finish(two)

    make = functools.partial(make_features, **case.features)
    job = Job(tmp_path / "one/store", (str(long_audio),), str(case.clusterer), make, 16000, 25.0)
    card = label(job, 1, quiet)
    size = card.labels * np.dtype(card.dtype).itemsize
    assert card.labels == 24 * make().spec.num_frames(25 * 16000)
    for name in FILES:
        runs = ("one", "two", "killed", "killed-of-two")
        contents = {run: (tmp_path / run / "store" / name).read_bytes() for run in runs}
        assert all(content == contents["one"] for content in contents.values()), name
    for run in runs:
        assert {path.name for path in (tmp_path / run / "store").iterdir()} == set(FILES), "nothing else is left"
    print(f"{features}: peak of {peak} bytes on disk for {size} bytes of labels: {peak / size:.3f}")
    assert size < peak <= 1.1 * size


@pytest.mark.slow
def test_an_error_in_a_worker_reaches_the_user_bare(cases, long_audio: Path, tmp_path: Path) -> None:
    case = replace(cases["mfcc"], features={"kind": "mfcc", "fail": True})
    process = start(tmp_path, long_audio, case, 2)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2
    assert output.count(": this worker has no features\n") == 2
    assert "2 of 2 labelling processes failed (exit [1, 1]); finished pieces are kept" in output
    assert "Traceback" not in output


def test_labels_are_the_nearest_centroids(corpus) -> None:
    store, clusterer = LabelStore(corpus.labels), Clusterer.load(corpus.clusterer)
    from harken.data.dataset import Row, collate
    from harken.data.read import read_cut

    for cut in list(Manifest(corpus.valid))[:3]:
        (features,) = Mfcc()(collate([Row(cut.id, "", read_cut(cut, 16000), 0)]))
        expected = ((features[:, None] - clusterer.centroids[None]) ** 2).sum(-1).argmin(1)
        assert (store[cut.id] == expected).mean() > 0.999


def test_labels_of_hidden_features_do_not_depend_on_processes(corpus, tmp_path: Path) -> None:
    from harken.config.saved import save_model
    from harken.objectives.saved import build_objective

    config = corpus.config("hubert", "waveform")
    torch.manual_seed(0)
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", config, build_objective(config).state_dict())
    make = functools.partial(make_features, "hidden", model=str(tmp_path / "model"), layer=1)
    data = DataConfig(train=str(corpus.train), workers=0)
    fit_clusterer(
        tmp_path / "km", str(corpus.train), make(), data, KMeansConfig(clusters=300), max_frames=10**6, say=quiet
    )
    cards = []
    for processes in (1, 2):
        manifests = (str(corpus.train), str(corpus.valid))
        job = Job(tmp_path / f"labels{processes}", manifests, str(tmp_path / "km"), make, 16000, 3.1)
        cards.append(label(job, processes, quiet))
    assert cards[0] == cards[1]
    assert cards[0].dtype == "uint16"
    assert cards[0].hop == 320
    assert "hidden layer 1" in cards[0].features
    for name in FILES:
        assert (tmp_path / "labels1" / name).read_bytes() == (tmp_path / "labels2" / name).read_bytes(), name
    assert len(np.unique(LabelStore(tmp_path / "labels1").values)) > 100


def test_a_finished_labelling_is_not_done_again(corpus) -> None:
    said: list[str] = []
    job = Job(
        corpus.labels,
        (str(corpus.train), str(corpus.valid)),
        str(corpus.clusterer),
        functools.partial(make_features, "mfcc"),
        16000,
        60.0,
    )
    before = (corpus.labels / "labels.bin").stat().st_mtime_ns
    label(job, 1, said.append)
    assert said == [f"{corpus.labels} is finished: nothing to do"]
    assert (corpus.labels / "labels.bin").stat().st_mtime_ns == before
    with pytest.raises(HarkenError, match="holds labels of other audio, features or clusters"):
        label(replace(job, manifests=(str(corpus.train),)), 1, quiet)
    with pytest.raises(
        HarkenError, match="clusters `mfcc39 16000 Hz`, and these features are `mfcc39 16000 Hz without mean`"
    ):
        label(replace(job, features=functools.partial(make_features, "mfcc", subtract_mean=True)), 1, quiet)


def test_a_labelling_killed_before_its_card_is_finished_and_no_other_folder_is_touched(corpus, tmp_path: Path) -> None:
    job = Job(
        tmp_path / "store",
        (str(corpus.valid),),
        str(corpus.clusterer),
        functools.partial(make_features, "mfcc"),
        16000,
        60.0,
    )
    label(job, 1, quiet)
    expected = (tmp_path / "store/labels.bin").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    (tmp_path / "store/card.json").unlink()
    label(job, 1, quiet)
    assert (tmp_path / "store/labels.bin").read_bytes() == expected
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("x")
    with pytest.raises(HarkenError, match=r"holds `thesis\.tex`, so it is no label store that may be replaced"):
        label(replace(job, out=tmp_path / "other"), 1, quiet)
    assert (tmp_path / "other/thesis.tex").is_file()


def test_unreadable_audio_is_named_and_the_rest_is_labelled(corpus, tmp_path: Path) -> None:
    lines = corpus.valid.read_text().splitlines()
    data = json.loads(lines[3])
    (tmp_path / "bad.flac").write_bytes(b"fLaC" + bytes(100))
    data["recording"]["sources"][0]["source"] = str(tmp_path / "bad.flac")
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:3], json.dumps(data), *lines[4:]]) + "\n")
    job = Job(
        tmp_path / "store",
        (str(tmp_path / "bad.jsonl"),),
        str(corpus.clusterer),
        functools.partial(make_features, "mfcc"),
        16000,
        60.0,
    )
    said: list[str] = []
    card = label(job, 1, said.append)
    assert card.cuts == 8
    assert "WARNING 1 cuts have no labels of their own, among them:" in said
    (row,) = (tmp_path / "store/unreadable.tsv").read_text().splitlines()
    words = "cannot be read: File contains data in an unimplemented format."
    assert row == f"valid-003\tcut `valid-003` ({tmp_path}/bad.flac) {words}"
    whole, store = LabelStore(corpus.labels), LabelStore(tmp_path / "store")
    for cut in Manifest(corpus.valid):
        if cut.id != "valid-003":
            assert np.array_equal(store[cut.id], whole[cut.id])


# The store and its readers


def make_store(folder: Path, values: dict[str, list[int]], clusters: int = 10) -> Path:
    folder.mkdir()
    ids = sorted(values)
    flat = np.concatenate([np.asarray(values[name], dtype=np.uint8) for name in ids])
    flat.tofile(folder / "labels.bin")
    np.save(folder / "index.npy", np.cumsum([0, *(len(values[name]) for name in ids)]))
    (folder / "ids.txt").write_text("".join(f"{name}\n" for name in ids))
    Card(
        clusters=clusters,
        sample_rate=16000,
        hop=160,
        center=199.5,
        features="mfcc39",
        clusterer="0",
        dtype="uint8",
        cuts=len(ids),
        labels=len(flat),
    ).write(folder)
    return folder


def test_labels_meet_the_frames_whose_middle_is_nearest(tmp_path: Path) -> None:
    """100 Hz labels under 50 Hz frames of the same window: every second label, from where the crop begins."""
    folder = make_store(tmp_path / "store", {"a": list(range(10)) * 10, "b": [3] * 50})
    spec = FrameSpec((Window(400, 320),), 16000)
    batch = Batch(
        ids=("a", "b"),
        inputs=torch.zeros(2, 8000),
        lengths=torch.tensor([8000, 4000]),
        starts=torch.tensor([3200, 0]),
    )
    labels = UnitReader([str(folder)], spec, (10,)).read(batch, 24)
    assert labels.shape == (2, 24, 1)
    assert labels[0, :, 0].tolist() == [(20 + 2 * frame) % 10 for frame in range(24)]
    assert labels[1, :, 0].tolist() == [3] * 12 + [0] * 12


def test_labels_of_something_else_are_refused(corpus, tmp_path: Path) -> None:
    folder = str(make_store(tmp_path / "store", {"a": [1] * 20}))
    spec = FrameSpec((Window(400, 320),), 16000)
    batch = Batch(ids=("a",), inputs=torch.zeros(1, 16000), lengths=torch.tensor([16000]), starts=torch.tensor([0]))
    with pytest.raises(HarkenError, match=r"`objective.classes` must equal the clusters of .*store, got 12 and 10"):
        UnitReader([folder], spec, (12,))
    with pytest.raises(HarkenError, match=r"one store for each codebook of `objective.classes`, got 1 and 2"):
        UnitReader([folder], spec, (10, 10))
    with pytest.raises(HarkenError, match="was labelled at 16000 Hz, the frontend reads 8000 Hz"):
        UnitReader([folder], FrameSpec((Window(200, 80),), 8000), (10,))
    with pytest.raises(
        HarkenError, match=r"cut `a` has 20 labels in .* and needs 97: the audio or the label rate changed"
    ):
        UnitReader([folder], spec, (10,)).read(batch, 49)
    with pytest.raises(HarkenError, match="no labels for cut `z`: it was made from another manifest"):
        UnitReader([folder], spec, (10,)).read(replace(batch, ids=("z",)), 49)


def test_a_store_that_is_missing_or_cut_is_named(tmp_path: Path) -> None:
    with pytest.raises(HarkenError, match=r"no finished label store at .*none; `harken units label` makes one"):
        LabelStore(tmp_path / "none")
    folder = make_store(tmp_path / "store", {"a": [1] * 20})
    os.truncate(folder / "labels.bin", 10)
    with pytest.raises(HarkenError, match=r"labels.bin must be 20 bytes by its card, found 10: make the labels again"):
        LabelStore(folder)


def test_a_store_without_its_ids_or_index_is_named(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "store", {"a": [1] * 20, "b": [2] * 5})
    np.save(folder / "index.npy", np.array([0, 20]))
    with pytest.raises(
        HarkenError, match=r"index.npy cannot be read: expected 3 places up to 25; make the labels again"
    ):
        _ = LabelStore(folder)["a"]
    (folder / "ids.txt").unlink()
    with pytest.raises(HarkenError, match=r"ids.txt cannot be read: .*No such file.*; make the labels again"):
        _ = LabelStore(folder)["a"]


def test_a_store_without_a_lookup_gets_one_and_answers_the_same(corpus, tmp_path: Path, monkeypatch) -> None:
    import shutil

    folder, whole = tmp_path / "old", LabelStore(corpus.labels)
    shutil.copytree(corpus.labels, folder)
    (folder / "lookup.npy").unlink()
    names = [*whole.ids, "é"]
    old = LabelStore(folder)
    assert [old[name].tobytes() for name in whole.ids] == [whole[name].tobytes() for name in whole.ids]
    assert (folder / "lookup.npy").read_bytes() == (corpus.labels / "lookup.npy").read_bytes()
    hashes = np.array([key(name) for name in names], dtype=np.uint64)
    assert LabelStore(folder).rows(hashes).tolist() == [*range(len(whole.ids)), -1]
    (folder / "lookup.npy").unlink()

    def refuse(folder: Path, lookup: np.ndarray) -> None:
        raise PermissionError

    monkeypatch.setattr("harken.units.store.write_lookup", refuse)
    read_only = LabelStore(folder)
    assert np.array_equal(read_only["train-003"], whole["train-003"])
    assert not (folder / "lookup.npy").exists()


def test_ids_of_one_hash_are_told_apart(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("harken.units.store.key", len)
    store = LabelStore(make_store(tmp_path / "store", {"a": [1], "b": [2, 2], "aa": [3], "é": [4, 4], "bb": []}))
    assert [store[name].tolist() for name in ("a", "b", "aa", "é", "bb")] == [[1], [2, 2], [3], [4, 4], []]
    for name in ("c", "ab", "abc", "a\nb", ""):
        with pytest.raises(HarkenError, match="no labels for cut"):
            _ = store[name]


def test_a_damaged_lookup_is_named(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "store", {"a": [1] * 20})
    np.save(folder / "lookup.npy", np.zeros((3, 2), dtype=np.uint64))
    with pytest.raises(HarkenError, match=r"lookup.npy cannot be read: expected 3 x 1 numbers, found \(3, 2\)"):
        _ = LabelStore(folder)["a"]


def test_a_clusterer_that_is_missing_or_changed_is_named(corpus, tmp_path: Path) -> None:
    with pytest.raises(HarkenError, match=r"no clusterer at .*none; `harken units fit` makes one"):
        Clusterer.load(tmp_path / "none")
    import shutil

    shutil.copytree(corpus.clusterer, tmp_path / "km")
    np.save(tmp_path / "km/centroids.npy", np.zeros((12, 39), dtype=np.float32))
    with pytest.raises(HarkenError, match=r"centroids.npy is not as it was written: fit it again"):
        Clusterer.load(tmp_path / "km")


# The check


def judged(tmp_path: Path, values: dict[str, list[int]], **options: Any):
    return check_units(LabelStore(make_store(tmp_path / "store", values, **options)))


def test_healthy_units_are_counted_by_hand(tmp_path: Path, monkeypatch) -> None:
    report = judged(tmp_path, {"a": [0, 0, 1, 2, 2, 2], "b": [2, 3, 3, 1]}, clusters=4)
    assert report.counts == [2, 2, 4, 2]
    assert report.used == 4
    assert report.perplexity == pytest.approx(np.exp(-(0.6 * np.log(0.2) + 0.4 * np.log(0.4))))
    assert report.run_lengths[:4] == [3, 2, 1, 0], "a run does not go on from one cut into the next"
    assert report.mean_run == pytest.approx(10 / 6)
    assert (report.problems, report.warnings) == ([], [])
    store = LabelStore(tmp_path / "store")
    assert check_units(store, np.array([1])).counts == [0, 1, 1, 2]
    for block in (1, 7):  # blocks end between cuts, and a cut that is longer than one is not divided
        monkeypatch.setattr("harken.units.check.BLOCK", block)
        assert check_units(store) == report


@pytest.mark.parametrize(
    ("values", "problem", "warning"),
    [
        ([5] * 50, "every label is 5: the features or the clusterer are broken", ""),
        ([0, 1, 12, 3] * 10, "labels must lie below K = 10, found 12", ""),
        ([*[0] * 30, *range(10)], "", "unit 0 is 78% of all labels"),
        ([0, 1, 2, 3, 4] * 10, "", "only 5 of 10 clusters occur"),
        ([*[0] * 70, *[1] * 30], "", "the perplexity of 10 clusters is 1.8: few units are most of the labels"),
        (
            [*[4] * 95, *range(5)],
            (
                "unit 4 is 96% of all labels, and at most 90% leave something to predict: the audio is mostly silence, "
                "or the features are broken"
            ),
            "",
        ),
    ],
)
def test_sick_units_are_judged(tmp_path: Path, capsys, values: list[int], problem: str, warning: str) -> None:
    report = judged(tmp_path, {"a": values})
    assert any(text == problem for text in report.problems) == bool(problem), report.problems
    assert any(text == warning for text in report.warnings) == bool(warning), report.warnings
    assert main(["units", "check", str(tmp_path / "store")]) == (1 if problem else 0)
    out = capsys.readouterr().out
    assert (f"WRONG {problem}" if problem else f"warning {warning}") in out
