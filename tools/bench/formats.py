"""How fast one core reads training audio from each format, as a run does and by decoding alone. See README.md."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from apart import measured_apart, write_figures

CODINGS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS"), "mp3": ("MP3", None)}
STREAMS = ("shar", "webdataset")
FORMATS = (*CODINGS, *STREAMS)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Measure how many hours of audio a core reads a second, from files of each coding and from shards.",
        epilog="example: python tools/bench/formats.py egs/amazon_queen/data/train.jsonl --json formats.json",
    )
    parser.add_argument("manifest", help="whose audio is written in each format")
    parser.add_argument("--minutes", type=float, default=60.0, metavar="M", help="of audio at most (default: 60)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, metavar="NAME", help="(default: all)")
    parser.add_argument("--folder", metavar="DIR", help="where it is written (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--only", choices=FORMATS, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_audio(manifest: str, minutes: float, folder: Path, formats: tuple[str, ...]) -> None:
    """Write the first cuts of a manifest in each format, with what harken reads it by."""
    from harken.config.schema import DataConfig
    from harken.data.dataset import as_it_is
    from harken.data.loader import EvalLoader

    chosen = {*formats, *(("flac",) if set(STREAMS) & set(formats) else ())} - set(STREAMS)
    data, seconds = DataConfig(train=manifest), 0.0
    for batch, _ in EvalLoader(manifest, data, 60.0, as_it_is):
        for row, length in enumerate(batch.lengths.tolist()):
            samples = batch.inputs[row, :length].numpy()
            seconds += length / data.sample_rate
            for coding in chosen:
                own = folder / coding
                own.mkdir(exist_ok=True)
                container, subtype = CODINGS[coding]
                # a file name says what is inside: soundfile writes Opus in Ogg
                path = own / f"{batch.ids[row].replace('/', '_')}.{coding}"
                soundfile.write(path, samples, data.sample_rate, format=container, subtype=subtype)
        if seconds >= 60 * minutes:
            break
    for coding in chosen:
        quietly(["data", "scan", str(folder / coding), "--out", str(folder / f"{coding}.jsonl"), "--jobs", "2"])
    for stream in set(STREAMS) & set(formats):
        source, out = str(folder / "flac.jsonl"), str(folder / stream)
        quietly(["data", "shards", source, "--out", out, "--to", stream, "--shuffle", "1"])


def quietly(command: list[str]) -> None:
    """Run one of harken's verbs; what it prints is no figure. Raises RuntimeError when it fails."""
    from contextlib import redirect_stdout
    from io import StringIO

    from harken.apps.main import main as harken

    said = StringIO()
    with redirect_stdout(said):
        status = harken(command)
    if status:
        raise RuntimeError(f"harken {' '.join(command)}: exit status {status}\n{said.getvalue()}")


def decoding(folder: Path) -> float:
    """Return the audio seconds that one CPU second decodes from the files of a folder, each read whole."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        path.read_bytes()  # into the page cache: what is measured is not the disk
    samples, begin = 0.0, time.process_time()
    for path in files:
        found, rate = soundfile.read(path, dtype=np.float32)
        samples += len(found) / rate
    return samples / (time.process_time() - begin)


def loading(source: Path) -> float:
    """Return the audio seconds that one CPU second makes into batches of wav2vec 2.0: read, masked, collated."""
    import torch

    from harken.config.load import load
    from harken.objectives.saved import preparers
    from harken.train.run import training_loader

    torch.set_num_threads(1)
    changes = [f"data.train={source}", "data.workers=0", "batch.max_seconds=87.5", "batch.seconds_per_step=87.5"]
    config = load(["wav2vec2_base"], changes).config
    prepare, spec = preparers(config)
    loader = training_loader(config, prepare, spec)
    position: Any = loader.restore({})[0]  # each loader's own kind
    steps = loader.steps(position)
    next(steps)
    seconds, begin = 0.0, time.process_time()
    for step in itertools.islice(steps, 60):
        seconds += sum(batch.real for batch in step.batches) / config.data.sample_rate
    return seconds / (time.process_time() - begin)


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Return the figures of one format, in hours of audio for a second of one core."""
    stream = name in STREAMS
    decoded = None if stream else decoding(folder / name) / 3600
    loaded = loading(folder / name if stream else folder / f"{name}.jsonl") / 3600
    size = sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
    return {"name": name, "mebibytes": size / 2**20, "decoding": decoded, "loading": loaded}


def main() -> None:
    """Print a table."""
    args = parse()
    if args.only:
        print(json.dumps(measure(args.only, Path(args.folder))))
        return
    with tempfile.TemporaryDirectory(prefix="formats-") as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_audio(args.manifest, args.minutes, folder, tuple(args.formats))
        sys.argv += ["--folder", str(folder)]
        found = list(measured_apart(args.formats))
    print("| format | MiB | decoding alone, h/s of a core | a run's batches, h/s of a core |")
    print("|---|---|---|---|")
    for row in found:
        alone = "" if row["decoding"] is None else f"{row['decoding']:.2f}"
        print(f"| {row['name']} | {row['mebibytes']:.0f} | {alone} | {row['loading']:.2f} |")
    write_figures(args.json, args, "rows", found)


if __name__ == "__main__":
    main()
