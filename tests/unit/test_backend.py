"""Lhotse's backends behind libsndfile: the same samples, the same words for what cannot be read."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse.audio.backend import (
    CompositeAudioBackend,
    LibsndfileBackend,
    audio_backend,
    get_current_audio_backend,
    get_default_audio_backend,
)

from harken.data.backend import SoundfileFirst, use_soundfile_first


@pytest.fixture
def files(tmp_path: Path) -> Path:
    sound = 0.1 * np.random.default_rng(1).standard_normal((8000, 2))
    for name, coding in (("a.wav", None), ("b.flac", None), ("c.opus", "OPUS"), ("d.mp3", None)):
        container = {"c.opus": "OGG"}.get(name)
        soundfile.write(tmp_path / name, sound, 16000, format=container, subtype=coding)
    return tmp_path


@pytest.mark.parametrize("name", ["a.wav", "b.flac", "c.opus", "d.mp3"])
@pytest.mark.parametrize("part", [(0.0, None), (0.1, 0.25)])
@pytest.mark.parametrize("in_memory", [False, True])
def test_samples_are_those_of_lhotses_default(files: Path, name: str, part, in_memory: bool) -> None:
    default = get_default_audio_backend()
    what = [BytesIO((files / name).read_bytes()) if in_memory else str(files / name) for _ in range(2)]
    expected, rate = default.read_audio(what[0], *part)
    found, own_rate = SoundfileFirst(default.backends).read_audio(what[1], *part)
    assert (found == expected).all()
    assert found.shape == expected.shape
    assert own_rate == rate


@pytest.mark.parametrize("in_memory", [False, True])
def test_what_cannot_be_read_is_refused_in_lhotses_words(tmp_path: Path, in_memory: bool) -> None:
    (tmp_path / "broken.wav").write_bytes(b"RIFF none")
    default = get_default_audio_backend()
    said = []
    for backend in (default, SoundfileFirst(default.backends)):
        what = BytesIO(b"RIFF none") if in_memory else tmp_path / "broken.wav"
        with pytest.raises(Exception, match="failed") as error:
            backend.read_audio(what)
        said.append(str(error.value).replace(repr(what), "").replace(str(what), "").split("<_io.BytesIO")[0])
    assert said[0] == said[1]


def test_no_module_is_looked_for_to_read_a_plain_file(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: pytest.fail(f"looked for {name}"))
    found, _ = SoundfileFirst(get_default_audio_backend().backends).read_audio(str(files / "b.flac"))
    assert found.shape == (2, 8000)


def test_a_backend_of_the_users_stays() -> None:
    with audio_backend(LibsndfileBackend()):
        use_soundfile_first()
        assert type(get_current_audio_backend()) is LibsndfileBackend
    with audio_backend(get_default_audio_backend()):
        use_soundfile_first()
        chosen = get_current_audio_backend()
        assert type(chosen) is SoundfileFirst
        assert isinstance(chosen, CompositeAudioBackend)
