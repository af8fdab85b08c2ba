"""A tiny corpus for every test: seeded tones and noise as FLAC, manifests, characters, labels made by harken."""

from __future__ import annotations

import functools
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from torch import Tensor, device
from torch import bool as bool_type
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

RATE = 16000
CLUSTERS = 12
# each character sounds as its own tone, so that CTC and k-means have something to find
TONES = {"a": 300.0, "b": 700.0, "c": 1500.0, "d": 3100.0, " ": 0.0}
ENCODER = {
    "name": "transformer",
    "dim": 32,
    "layers": 2,
    "heads": 4,
    "ffn_dim": 64,
    "position_kernel": 8,
    "position_groups": 4,
}
FRONTENDS: dict[str, dict[str, Any]] = {
    "filterbank": {"name": "filterbank", "bands": 20, "channels": 24, "subsampling": 2},
    "waveform": {"name": "waveform", "channels": 16, "grad_scale": 0.1},
}


@dataclass(frozen=True)
class Corpus:
    """Where the parts of the tiny corpus are, and configurations that train on it."""

    root: Path
    train: Path
    valid: Path
    tokens: Path
    clusterer: Path
    labels: Path

    def settings(self, objective: str, frontend: str) -> dict[str, Any]:
        """Return the plain data of a run: eight ragged micro-batches a step, three steps an epoch, dropout on."""
        parts: dict[str, dict[str, Any]] = {
            "hubert": {"name": "hubert", "classes": [CLUSTERS], "code_dim": 16, "mask_length": 4},
            "ctc": {
                "name": "ctc",
                "tokenizer": str(self.tokens),
                "mask_length": 4,
                "freeze_frontend": False,
                "dropout": 0.1,
            },
            "transducer": {
                "name": "transducer",
                "tokenizer": str(self.tokens),
                "predictor_dim": 16,
                "joiner_dim": 32,
                "mask_length": 4,
                "freeze_frontend": False,
            },
            "wav2vec2": {"name": "wav2vec2", "entries": 6, "code_dim": 16, "negatives": 8, "mask_length": 4},
            "data2vec": {"name": "data2vec", "top_layers": 2, "mask_length": 4},
            "data2vec_aqc": {
                "name": "data2vec_aqc",
                "top_layers": 2,
                "mask_length": 4,
                "entries": 6,
                "code_dim": 16,
                "negatives": 8,
                "cluster_factor": 4,
            },
            "unispeech_sat": {
                "name": "unispeech_sat",
                "classes": [CLUSTERS],
                "code_dim": 16,
                "mask_length": 4,
                "contrast_layer": 1,
                "entries": 6,
                "instances": 8,
            },
            "cpc": {"name": "cpc", "steps": 3, "negatives": 5, "heads": 4, "ffn_dim": 16},
            "wav2vec": {"name": "wav2vec", "steps": 3, "negatives": 5},
        }
        return {
            "seed": 7,
            "frontend": FRONTENDS[frontend],
            "encoder": {**ENCODER, "layer_drop": 0.2},
            "objective": parts[objective],
            "optimizer": {"name": "adamw"},
            "schedule": {"name": "constant", "rate": 1e-3, "warmup_steps": 2},
            "data": {
                "train": str(self.train),
                "labels": [str(self.labels)] if "classes" in parts[objective] else [],
                "max_seconds": 3.1,
                "workers": 0,
            },
            "batch": {"max_seconds": 6.0, "seconds_per_step": 48.0},
            "train": {"steps": 6},
            "engine": {"threads": 1},
            "checkpoint": {"every_steps": 100},
            "log": {"every_steps": 100, "tensorboard": False, "samples": True, "peak_tflops": 1.0},
        }

    def yaml(self, folder: Path, objective: str, frontend: str) -> Path:
        """Write a run's settings into a folder and return the file."""
        from omegaconf import OmegaConf

        path = folder / f"{objective}-{frontend}.yaml"
        OmegaConf.save(OmegaConf.create(self.settings(objective, frontend)), path)
        return path

    def config(self, objective: str, frontend: str, *overrides: str) -> Any:
        """Return a run's configuration."""
        from harken.config.load import load

        return load([self.yaml(self.root, objective, frontend)], overrides).config


def make_cuts(root: Path, name: str, count: int, seed: int) -> Path:
    """Write `count` utterances of 0.6 to 3 s and their manifest; the same seed gives the same bytes."""
    import soundfile
    from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

    rng = np.random.default_rng(seed)
    (root / "audio").mkdir(parents=True, exist_ok=True)
    cuts = []
    for number in range(count):
        inner = "".join(rng.choice(list(TONES), size=int(rng.integers(1, 11))))
        text = " ".join(f"{rng.choice(list('abcd'))}{inner}{rng.choice(list('abcd'))}".split())
        samples = int(np.clip(0.22 * len(text) * rng.uniform(0.9, 1.1), 0.6, 3.0) * RATE)
        pitch = np.repeat([TONES[character] for character in text], -(-samples // len(text)))[:samples]
        wave = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE) + 0.02 * rng.standard_normal(samples)
        path = root / "audio" / f"{name}-{number:03d}.flac"
        soundfile.write(path, wave, RATE)
        recording = Recording.from_file(path)
        cut = f"{name}-{number:03d}"
        segment = SupervisionSegment(cut, recording.id, 0.0, recording.duration, text=text)
        cuts.append(MonoCut(cut, 0.0, recording.duration, 0, recording=recording, supervisions=[segment]))
    CutSet.from_cuts(cuts).to_jsonl(root / f"{name}.jsonl")
    return root / f"{name}.jsonl"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """64 training and 8 validation utterances with transcripts, a tokenizer, a clusterer and labels."""
    from harken.config.schema import DataConfig
    from harken.data.manifest import Manifest
    from harken.data.tokens import Characters
    from harken.units.clusterer import fit_clusterer
    from harken.units.features import Mfcc, make_features
    from harken.units.kmeans import KMeansConfig
    from harken.units.label import Job, label

    root = tmp_path_factory.mktemp("corpus")
    train, valid = make_cuts(root, "train", 64, seed=1), make_cuts(root, "valid", 8, seed=2)
    Characters.train(cut.supervisions[0].text for cut in Manifest(train)).save(root / "tokens.txt")
    data = DataConfig(train=str(train), workers=0)
    config = KMeansConfig(clusters=CLUSTERS)
    fit_clusterer(root / "clusterer", str(train), Mfcc(), data, config, max_frames=10_000, say=lambda _: None)
    features = functools.partial(make_features, "mfcc")
    job = Job(root / "labels", (str(train), str(valid)), str(root / "clusterer"), features, RATE, 60.0)
    label(job, 1, lambda _: None)
    return Corpus(root, train, valid, root / "tokens.txt", root / "clusterer", root / "labels")


FRAMEWORK = str(Path(__file__).parents[1] / "framework" / "harken")
ASKING = (
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "repeat_interleave"),
    *("_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
)
"""Operators that wait for their tensor's values."""


class Waits(TorchDispatchMode):
    """Counts where the host waits for the device: asks for a value that was computed there, or copies one to it.

    There need be no GPU for it: `begin` says what would be on one, and what is computed from that would be, too. A copy
    from the host waits for what the device has to do, unless it is told not to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watching = False
        self.on_device: dict[int, Tensor] = {}  # kept alive, so that no other tensor comes to lie in their place
        self.found: Counter[str] = Counter()

    def begin(self, tensors: Iterable[Tensor]) -> None:
        """Take these for tensors on the device."""
        self.on_device.update((self._place(tensor), tensor) for tensor in tensors)

    def __enter__(self) -> Self:
        self.watching = True
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.watching = False

    def ask(self, tensor: Tensor, how: str) -> None:
        """Count a question, by the line of harken's that asks."""
        self._count(how, self._place(tensor) in self.on_device)

    def copy(self, tensor: Tensor, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Count a copy of a tensor on the host that names a device and waits."""
        named = "device" in options or any(isinstance(value, device) for value in arguments)
        waiting = named and not options.get("non_blocking", False)
        self._count("a copy to the device", waiting and self._place(tensor) not in self.on_device)

    def _count(self, how: str, waits: bool) -> None:
        if self.watching and waits:
            lines = [frame for frame in traceback.extract_stack() if frame.filename.startswith(FRAMEWORK)]
            where = f"{Path(lines[-1].filename).name}: {lines[-1].line}" if lines else "none of harken's lines"
            self.found[f"{how} in {where}"] += 1

    @staticmethod
    def _place(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [value for value in pytree.tree_leaves((args, kwargs or {})) if isinstance(value, Tensor)]
        name = func.overloadpacket.__name__
        if name in ASKING:
            for tensor in given:
                self.ask(tensor, name)
        if name.startswith(("index", "_unsafe_index")):
            for index in given[1:]:
                if index.dtype is bool_type:
                    self.ask(index, "a mask as an index")
        result = func(*args, **(kwargs or {}))
        if any(self._place(value) in self.on_device for value in given):
            self.begin(made for made in pytree.tree_leaves(result) if isinstance(made, Tensor))
        return result


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """Count the questions that are asked within it."""
    watch = Waits()
    plain_to, new_tensor = Tensor.to, Tensor.new_tensor

    def to(self: Tensor, *args: Any, **options: Any) -> Tensor:
        watch.copy(self, args, options)
        return plain_to(self, *args, **options)

    def new(self: Tensor, *args: Any, **options: Any) -> Tensor:
        watch.ask(self, "new_tensor")
        return new_tensor(self, *args, **options)

    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "new_tensor", new)
    for name in ("tolist", "numpy", "cpu"):  # these ask without a call that is dispatched
        plain = getattr(Tensor, name)

        def asked(self: Tensor, *args: Any, plain: Callable[..., Any] = plain, name: str = name) -> Any:
            watch.ask(self, name)
            return plain(self, *args)

        monkeypatch.setattr(Tensor, name, asked)
    return watch
