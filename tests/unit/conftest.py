"""What several unit tests do to the tiny corpus and to files: `harken train` in this process, damage."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from harken.apps.main import main
from harken.train import loop


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
