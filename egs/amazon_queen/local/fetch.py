"""Where the corpus comes from: what the user has, or the Debian package, fetched and unpacked without root."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harken.core.errors import HarkenError
from harken.core.files import atomic_folder

PACKAGE = "flight-of-the-amazon-queen"
DATA_FILE = "queen.1c"
WANTED = (DATA_FILE, "copyright")
WAYS = (
    "Either let apt fetch it: where the package lists are empty run `apt-get update` once as root, then this command"
    f" again, which runs `apt-get download {PACKAGE}` and needs no root. Or get {PACKAGE} from any Debian or Ubuntu"
    f" mirror and pass it: `--corpus FOLDER`, `--corpus FILE.deb` or `--corpus {DATA_FILE}`"
)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The data file, the package's copyright file if it is there, and a word on where both came from."""

    data: Path
    copyright: Path | None
    origin: str


def find_corpus(source: Path | None, download_dir: Path) -> Corpus:
    """Return the corpus in `source` (a folder, a .deb or queen.1c), or fetch the package into `download_dir`.

    Raises HarkenError that names both ways when there is neither.
    """
    if source is None:
        deb = newest_deb(download_dir) or download(download_dir)
        return from_folder(unpack(deb, download_dir / "unpacked"), str(deb))
    if not source.exists():
        raise HarkenError(f"`--corpus` must be a folder, a .deb or {DATA_FILE}, and {source} does not exist. {WAYS}.")
    if source.is_dir():
        if next(source.rglob(DATA_FILE), None) is not None:
            return from_folder(source, str(source))
        folder_deb = newest_deb(source)
        if folder_deb is None:
            raise HarkenError(f"`--corpus` must hold {DATA_FILE} or {PACKAGE}_*.deb, {source} holds neither. {WAYS}.")
        source = folder_deb
    if source.suffix == ".deb":
        return from_folder(unpack(source, download_dir / "unpacked"), str(source))
    notice = source.with_name("copyright")
    return Corpus(data=source.resolve(), copyright=notice if notice.exists() else None, origin=str(source))


def newest_deb(folder: Path) -> Path | None:
    """Return the package in `folder`, the last by name when there are several."""
    return max(folder.glob(f"{PACKAGE}_*.deb"), default=None)


def from_folder(folder: Path, origin: str) -> Corpus:
    """Return the corpus in an unpacked package or any folder that holds the data file."""
    data = next(folder.rglob(DATA_FILE), None)
    if data is None:
        raise HarkenError(f"{origin} must hold {DATA_FILE}, found none. {WAYS}.")
    notices = [path for path in folder.rglob("copyright") if path.parent.name in (PACKAGE, folder.name)]
    return Corpus(data=data.resolve(), copyright=notices[0] if notices else None, origin=origin)


def download(folder: Path) -> Path:
    """Fetch the package with `apt-get download`, which verifies its checksum; returns its path in `folder`."""
    if shutil.which("apt-get") is None:
        raise HarkenError(f"the corpus must come from a Debian package, and there is no `apt-get` here. {WAYS}.")
    print(f"fetching {PACKAGE} (35 MB) with apt-get download", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetched-") as temporary:
        result = subprocess.run(
            ["apt-get", "download", PACKAGE], cwd=temporary, capture_output=True, text=True, check=False
        )
        found = newest_deb(Path(temporary))
        if result.returncode != 0 or found is None:
            said = " / ".join(line for line in result.stderr.splitlines() if line.startswith("E:")) or "nothing"
            raise HarkenError(f"`apt-get download {PACKAGE}` must bring the package; apt said: {said}. {WAYS}.")
        return found.replace(folder / found.name)


def unpack(deb: Path, folder: Path) -> Path:
    """Unpack `deb` into `folder` with `dpkg -x`, or in Python where there is no dpkg, and return `folder`.

    A folder that was unpacked from the same file before is kept.
    """
    target = folder / deb.stem
    if target.is_dir():
        return target
    with atomic_folder(target, kind="unpacked package") as temporary:
        if shutil.which("dpkg") is not None:
            result = subprocess.run(
                ["dpkg", "-x", str(deb), str(temporary)], capture_output=True, text=True, check=False
            )
            if result.returncode != 0:
                raise HarkenError(f"{deb} must be a whole Debian package; dpkg said: {result.stderr.strip()}")
        else:
            unpack_in_python(deb, temporary)
    return target


def unpack_in_python(deb: Path, folder: Path) -> None:
    """Extract the data file and the copyright notice of `deb` into `folder` without any Debian tool."""
    try:
        for name, content in ar_members(deb.read_bytes()):
            if name.startswith("data.tar"):
                with tarfile.open(fileobj=io.BytesIO(content), mode="r:*") as archive:
                    for member in archive:
                        if member.isfile() and Path(member.name).name in WANTED:
                            archive.extract(member, folder, filter="data")
                return
    except (ValueError, tarfile.TarError, EOFError) as error:
        raise HarkenError(f"{deb} must be a whole Debian package, reading it failed: {error}") from error
    raise HarkenError(f"{deb} must be a Debian package with a `data.tar` member, found none")


def ar_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of a Unix `ar` archive. Source: deb(5), 60-byte member headers padded to even offsets."""
    if data[:8] != b"!<arch>\n":
        raise ValueError(f"an ar archive must start with `!<arch>`, found {data[:8]!r}")
    offset = 8
    while offset + 60 <= len(data):
        name = data[offset : offset + 16].decode("ascii").strip().rstrip("/")
        size = int(data[offset + 48 : offset + 58])
        if offset + 60 + size > len(data):
            raise ValueError(f"member `{name}` must have {size} bytes, the file ends before")
        yield name, data[offset + 60 : offset + 60 + size]
        offset += 60 + size + size % 2
