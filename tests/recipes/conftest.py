"""Recipes as the tests see them."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from harken.core.errors import HarkenError

QUEEN = Path(__file__).parents[2] / "egs" / "amazon_queen" / "local"
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
