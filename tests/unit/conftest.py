"""What several unit tests share: the tiny corpus read, `harken train` in this process, goldens, damage."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from harken.apps.main import main
from harken.core.batch import Batch
from harken.data.dataset import Row, collate
from harken.data.manifest import Manifest
from harken.data.read import read_cut
from harken.train import loop

Golden = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def own_signals():
    """Training takes SIGTERM and SIGINT for itself; give them back to pytest."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def train(corpus, tmp_path: Path, capsys):
    """Run `harken train` on the tiny corpus with changed settings; return its status, output and error."""

    def run(objective: str, *overrides: str, steps: int = 2, exp: str = "exp") -> tuple[int, str, str]:
        config = corpus.yaml(tmp_path, objective, "filterbank")
        status = main(["train", str(config), "--exp", str(tmp_path / exp), f"train.steps={steps}", *overrides])
        out, error = capsys.readouterr()
        return status, out, error

    return run


@pytest.fixture
def damage():
    """Overwrite a file of a folder, or remove it where the content is None."""

    def overwrite(folder: Path, name: str, content: bytes | None) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return overwrite


@pytest.fixture
def scores(monkeypatch):
    """Make each validation of the next run give one of these; the first batch is validated before the first step."""

    def give(*values: float) -> None:
        remaining = iter([1.0, *values])
        monkeypatch.setattr(loop, "validate", lambda engine, batches: ({"loss": next(remaining)}, []))

    return give


@pytest.fixture
def batch(corpus) -> Batch:
    """Three cuts of different lengths with their texts."""
    manifest = Manifest(corpus.train)
    cuts = [manifest[place] for place in (0, 5, 9)]
    return collate([Row(cut.id, cut.supervisions[0].text, read_cut(cut, 16000), 0) for cut in cuts])


@pytest.fixture(scope="session")
def read_golden() -> Callable[[Path], Golden]:
    """Read what an original implementation returned."""

    def read(path: Path) -> Golden:
        with np.load(path) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    return read


@pytest.fixture(scope="module")
def golden(request, read_golden) -> dict[str, Golden]:
    """Read what lies beside the checkpoints of a module's `KINDS`."""
    return {kind: read_golden(request.module.checkpoint(kind).with_suffix(".npz")) for kind in request.module.KINDS}


@pytest.fixture(scope="module")
def folders(request, tmp_path_factory) -> dict[str, Path]:
    """Import the checkpoints of a module's `KINDS` by its `FORMAT`."""
    root, module = tmp_path_factory.mktemp("imported"), request.module
    importer = importlib.import_module(f"harken.interop.{module.FORMAT}")
    for kind in module.KINDS:
        importer.import_checkpoint(module.checkpoint(kind), root / kind)
    return {kind: root / kind for kind in module.KINDS}
