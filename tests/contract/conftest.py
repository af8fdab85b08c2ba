"""What contract tests share."""

from __future__ import annotations

import numpy as np
import pytest

from harken.data.dataset import Row
from harken.data.manifest import Manifest
from harken.data.read import read_cut


@pytest.fixture(scope="module")
def rows(corpus) -> list[Row]:
    """Six utterances of 0.6 s to 2 s."""
    manifest = Manifest(corpus.train)
    places = np.argsort(np.asarray(manifest.seconds))[:48:8]
    cuts = [manifest[int(place)] for place in places]
    return [Row(cut.id, cut.supervisions[0].text, read_cut(cut, 16000), 0) for cut in cuts]
