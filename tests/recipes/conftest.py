"""Recipes as the tests see them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from harken.core.errors import HarkenError

ROOT = Path(__file__).parents[2]
QUEEN = ROOT / "egs" / "amazon_queen" / "local"
MODULES = ("audio", "fetch", "manifests", "prepare", "queen", "splits", "text")
DOWNLOADS = Path(os.environ.get("HARKEN_TEST_CORPUS", "~/.cache/harken/amazon_queen")).expanduser()


@pytest.fixture(scope="module")
def local():
    """The recipe's modules; their plain names are given back, since other recipes use the same."""
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    sys.path.insert(0, str(QUEEN))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path.remove(str(QUEEN))
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture(scope="module")
def real(local):
    """The real package: given, kept from an earlier run, or fetched."""
    try:
        return local.fetch.find_corpus(None, DOWNLOADS)
    except HarkenError as error:
        pytest.skip(f"the package cannot be had here: {error}")


@pytest.fixture(scope="module")
def pairing(local, real):
    return local.queen.pair(local.queen.open_queen(real.data))


def load_file(path: Path, name: str) -> ModuleType:
    """Import a file under a name of its own: those of recipes repeat."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


MINIATURE = load_file(Path(__file__).with_name("librispeech.py"), "recipes_librispeech")
SERVER = load_file(Path(__file__).parents[1] / "unit/docs_server.py", "recipes_server")


@pytest.fixture(scope="session")
def librispeech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with LibriSpeech and librispeech_finetuning in miniature."""
    return MINIATURE.make_librispeech(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="session")
def librilight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small part of Libri-light in miniature."""
    return MINIATURE.make_librilight(tmp_path_factory.mktemp("librilight"))


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A `python` for recipes that runs harken and their scripts in forks of one process with everything imported."""
    programs = tmp_path_factory.mktemp("bin")
    SERVER.write_clients(programs, str(programs / "socket"))
    process = subprocess.Popen(
        [sys.executable, SERVER.__file__, str(programs / "socket"), "--as-configured"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "framework"), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert any(line == "ready\n" for line in process.stdout), "the server ended before it listened"
    yield programs / "python"
    os.killpg(process.pid, signal.SIGKILL)  # what a stage left running ends, too
    process.wait()


def run(python: Path, name: str, *arguments: str | Path, code: int = 0) -> str:
    """Run `egs/NAME/run.sh ARGUMENTS` with a `python`; returns its output and asserts its exit status."""
    done = subprocess.run(
        ["bash", str(ROOT / "egs" / name / "run.sh"), "--python", str(python), *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == code, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="session")
def run_recipe(python: Path) -> Callable[..., str]:
    """`run` with everything real."""
    return functools.partial(run, python)


@pytest.fixture(scope="session")
def run_stub(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`run` with a `python` that does nothing."""
    stub = tmp_path_factory.mktemp("stub") / "python"
    stub.write_text("#!/bin/sh\nexit 0\n")
    stub.chmod(0o755)
    return functools.partial(run, stub)


@pytest.fixture(scope="session")
def load_module() -> Callable[[Path, str], ModuleType]:
    """`load_file`, for a recipe's scripts."""
    return load_file
