"""Runs what a container file runs, line by line and in its order, in a clean Debian, without a container engine.

    python tools/check_containers.py docker/Dockerfile --target cpu --argument TORCH_ARGS="--index-url URL"
    python tools/check_containers.py docker/harken.def --argument TORCH_ARGS="--index-url URL"

It needs root, debootstrap and unshare (util-linux). The root is what debootstrap installs of the release that the file
names, not its image: the newest point release instead of the pinned one, with documentation that a slim image lacks.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RELEASES = {"12": "bookworm", "13": "trixie"}
PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SOURCES = "deb {mirror} {name} main\ndeb {mirror} {name}-updates main\ndeb {mirror}-security {name}-security main\n"
# In a mount namespace of the command's own: what is mounted is gone with it, however it ends.
INSIDE = """set -e
root="$1" binds="$2"; shift 2
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/dev/shm"
for bind in $binds; do
  mkdir -p "$root$bind"
  mount --bind "$bind" "$root$bind"
  mount -o remount,bind,ro "$root$bind"
done
exec chroot "$root" "$@"
"""


@dataclass(frozen=True)
class Step:
    """What a file says next. kind: from, copy, run, test, folder, set, argument or command; text: the rest of it."""

    kind: str
    text: str


DOCKER = {"RUN": "run", "COPY": "copy", "WORKDIR": "folder", "ENV": "set", "ARG": "argument", "CMD": "command"}


def dockerfile_steps(text: str, target: str) -> list[Step]:
    """Return what a Dockerfile does up to the end of a stage, from its base image on.

    Raises ValueError for a stage that it has not and for an instruction that is not known here.
    """
    stages: dict[str, list[Step]] = {"": []}
    name = ""
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if not word or word.startswith("#"):
            continue
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages[name] = list(stages[base]) if base in stages else [*stages[""], Step("from", base)]
        elif word in DOCKER:
            stages[name].append(Step(DOCKER[word], rest.strip()))
        else:
            raise ValueError(f"instructions must be FROM, {', '.join(DOCKER)}, found {word}")
    if target not in stages:
        raise ValueError(f"--target must be one of {', '.join(filter(None, stages))}, got {target!r}")
    return sorted(stages[target], key=lambda step: step.kind == "command")  # what an image starts with comes last


def apptainer_steps(text: str) -> list[Step]:
    """Return what an Apptainer definition does, its test behind what makes the image."""
    head, *parts = re.split(r"^%(?=\w)", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)
    found = re.search(r"^From: *(\S+)$", head, re.MULTILINE)
    sections = {name: body for name, _, body in (part.partition("\n") for part in parts)}
    steps = [Step("argument", line.strip()) for line in sections.get("arguments", "").splitlines() if line.strip()]
    steps.append(Step("from", found[1] if found else ""))
    steps += [Step("copy", line.strip()) for line in sections.get("files", "").splitlines() if line.strip()]
    steps.append(Step("run", _script(sections["post"])))
    for line in sections.get("environment", "").splitlines():
        if line.strip():
            steps.append(Step("set", line.strip().removeprefix("export ")))
    return [*steps, Step("test", _script(sections["test"])), Step("command", "harken doctor")]


def _script(section: str) -> str:
    return "".join(f"{line.strip()}\n" for line in section.splitlines() if line.strip())


def steps_of(path: Path, target: str) -> list[Step]:
    """Return the steps of a container file of either kind."""
    text = path.read_text(encoding="utf-8")
    return dockerfile_steps(text, target) if path.name == "Dockerfile" else apptainer_steps(text)


def copied(folder: Path) -> Iterator[str]:
    """Yield tar's options that leave out what `.dockerignore` does."""
    for line in (folder / ".dockerignore").read_text(encoding="utf-8").split():
        if line.startswith("**/"):
            yield from ("--no-anchored", f"--exclude={line[3:]}")
        else:
            yield from ("--anchored", f"--exclude=./{line}")


class Build:
    """A root in which the steps are taken. site: options of the command line that say what this machine needs."""

    def __init__(self, root: Path, site: argparse.Namespace) -> None:
        self.root, self.site, self.folder = root, site, "/"
        self.given = dict(item.split("=", 1) for item in site.argument)
        self.arguments: dict[str, str] = {}
        self.environment = {"PATH": PATHS, "HOME": "/root"}

    def take(self, step: Step) -> None:
        """Take a step; CalledProcessError when a command of it fails."""
        if step.kind == "argument":
            name, _, default = step.text.partition("=")
            self.arguments[name] = self.given.get(name, default.strip("\"'"))
        elif step.kind == "set":
            for item in shlex.split(step.text):
                name, _, value = item.partition("=")
                self.environment[name] = value.replace("$PATH", self.environment["PATH"])
        elif step.kind == "from":
            self._debian(self._filled(step.text))
        elif step.kind == "folder":
            self.folder = step.text
            self._inside(step.text).mkdir(parents=True, exist_ok=True)
        elif step.kind == "copy":
            self._copy(*step.text.split())
        elif step.kind == "command":
            words = step.text.replace(",", " ").strip("[]") if step.text.startswith("[") else step.text
            self._run(shlex.split(words))
        else:  # Apptainer runs its sections by `sh -ex`, Docker a line by `sh -c`
            self._run(["/bin/sh", "-ec", self._filled(step.text)])

    def _filled(self, text: str) -> str:
        for name, value in self.arguments.items():
            text = text.replace(f"${{{name}}}", value).replace(f"{{{{ {name} }}}}", value)
        return text

    def _inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def _debian(self, image: str) -> None:
        number = re.fullmatch(r"debian:(\d+)(?:\.\d+)?(?:-slim)?", image)
        if number is None or number[1] not in RELEASES:
            raise ValueError(f"the base must be debian:{' or debian:'.join(RELEASES)}, got {image}")
        name, mirror = RELEASES[number[1]], self.site.mirror
        _call(["debootstrap", "--variant=minbase", name, str(self.root), mirror])
        (self.root / "etc/apt/sources.list").write_text(SOURCES.format(name=name, mirror=mirror))
        shutil.copy("/etc/resolv.conf", self.root / "etc/resolv.conf")

    def _copy(self, source: str, to: str) -> None:
        place = self._inside(self.folder if to == "." else to)
        place.mkdir(parents=True, exist_ok=True)
        left_out = copied(ROOT) if self.site.file.name == "Dockerfile" else ("--anchored", "--exclude=./.git")
        pack = ["tar", "--create", "--file=-", *left_out, "--directory", str(ROOT / source), "."]
        with subprocess.Popen(pack, stdout=subprocess.PIPE) as packed:
            _call(["tar", "--extract", "--no-same-owner", "--file=-", "--directory", str(place)], stdin=packed.stdout)
        if packed.returncode:
            raise subprocess.CalledProcessError(packed.returncode, pack)

    def _run(self, command: Sequence[str]) -> None:
        site = dict(item.split("=", 1) for item in self.site.environment)
        words = [f"{name}={value}" for name, value in {**self.environment, **self.arguments, **site}.items()]
        chdir = ["--chdir", self.folder] if self.folder != "/" else []
        inside = ["env", "--ignore-environment", *chdir, *words, *command]
        sandbox = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", INSIDE, "inside"]
        _call([*sandbox, str(self.root), " ".join(self.site.bind), *inside])


def _call(command: Sequence[str], **options: object) -> None:
    subprocess.run(command, check=True, **options)  # type: ignore[call-overload]


def build(path: Path, root: Path, site: argparse.Namespace) -> bool:
    """Take all steps of a file and say how each went; False, after the first that failed."""
    made = Build(root, site)
    steps = [step for step in steps_of(path, site.target) if step.kind != "test" or site.test]
    for number, step in enumerate(steps, start=1):
        print(f"== step {number}: {step.kind} {step.text.strip()}", flush=True)
        before = time.monotonic()
        try:
            made.take(step)
        except subprocess.CalledProcessError as error:
            print(f"step {number} of {path} FAILED with status {error.returncode}: {step.text.strip()}", flush=True)
            return False
        print(f"== step {number}: done in {time.monotonic() - before:.0f} s", flush=True)
    return True


def missing(found: Mapping[str, str | None], user: int) -> str:
    """Say what this machine lacks; found: programs and where they are."""
    lacks = [name for name, path in found.items() if path is None]
    if lacks:
        return f"it needs {', '.join(lacks)}: apt-get install debootstrap util-linux"
    return "" if user == 0 else "it must run as root, which chroot and mount need"


def mirror_of(apt: Path) -> str:
    """Return the first mirror of Debian's packages that apt's sources name, of either form; "" where none does."""
    for path in (apt / "sources.list", *sorted((apt / "sources.list.d").glob("*"))):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for found in re.finditer(r"^(?:deb(?: +\[.*?\])? +|URIs: *)(\S+)", text, re.MULTILINE):
            if not found[1].rstrip("/").endswith("-security"):
                return found[1].rstrip("/")
    return ""


def main() -> int:
    """Run a file's steps; status 0 when all went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="docker/Dockerfile or docker/harken.def")
    parser.add_argument("--target", default="cpu", help="stage of the Dockerfile (default: cpu)")
    parser.add_argument("--argument", action="append", default=[], metavar="NAME=VALUE", help="of the build")
    parser.add_argument(
        "--environment", action="append", default=[], metavar="NAME=VALUE", help="of all commands, such as PIP_CERT=..."
    )
    parser.add_argument(
        "--bind", action="append", default=[], metavar="DIR", help="folder of here that commands see, read-only"
    )
    parser.add_argument("--test", action="store_true", help="take an Apptainer definition's %%test, too")
    parser.add_argument("--mirror", metavar="URL", help="of Debian (default: the first that apt has here)")
    parser.add_argument("--folder", type=Path, help="new folder for the root, which is kept (default: temporary)")
    args = parser.parse_args()
    why = missing({name: shutil.which(name) for name in ("debootstrap", "unshare", "chroot")}, os.geteuid())
    if why:
        print(f"check_containers.py: {why}", file=sys.stderr)
        return 2
    args.mirror = args.mirror or mirror_of(Path("/etc/apt"))
    if not args.mirror:
        print("check_containers.py: apt has no Debian mirror here: give --mirror URL", file=sys.stderr)
        return 2
    if args.folder is not None:
        args.folder.mkdir(parents=True)
        return 0 if build(args.file, args.folder.resolve(), args) else 1
    with tempfile.TemporaryDirectory(prefix="harken-root-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        return 0 if build(args.file, Path(folder), args) else 1


if __name__ == "__main__":
    sys.exit(main())
