"""The container files: what they run is what a checkout has, with the options that the scripts know. No engine runs.

`tools/check_containers.py` runs the same commands for real, as root and for minutes: docs/LOG.md has what it found.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_containers", ROOT / "tools/check_containers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["Dockerfile", "harken.def"])
def test_containers_are_made_and_checked_by_the_scripts_of_the_checkout(tool: ModuleType, name: str) -> None:
    steps = tool.steps_of(ROOT / "docker" / name, "test")
    lines = [line for step in steps if step.kind in {"run", "test"} for line in step.text.splitlines()]
    for line in lines:
        assert subprocess.run(["bash", "-n", "-c", line], capture_output=True, check=False).returncode == 0, line
    scripts = [shlex.split(line)[1:] for line in lines if line.startswith("bash ")]
    assert {script for script, *_ in scripts} == {"tools/setup.sh", "tools/test.sh"}
    for script, *arguments in scripts:
        told = (ROOT / script).read_text().split("HELP\n")[1]
        for argument in arguments:
            assert not argument.startswith("--") or f"  {argument}" in told, f"{script} knows no {argument}"


def test_both_files_start_from_one_image_and_install_the_same_packages(tool: ModuleType) -> None:
    docker, apptainer = (tool.steps_of(ROOT / "docker" / name, "cpu") for name in ("Dockerfile", "harken.def"))

    def packages(steps) -> str:
        (line,) = [line for step in steps for line in step.text.splitlines() if "apt-get install" in line]
        return line

    assert packages(docker) == packages(apptainer)
    (image,) = [step.text for step in docker if step.kind == "from"]
    (default,) = [step.text for step in docker if step.text.startswith("DEBIAN=")]
    assert image.replace("${DEBIAN}", default.partition("=")[2]) in [step.text for step in apptainer]


def test_a_stage_of_a_dockerfile_is_what_the_stages_below_it_do_and_then_its_own(tool: ModuleType) -> None:
    text = (
        'ARG V=12\n# a remark\nFROM debian:$V AS base\nRUN one \\\n  two\nCMD ["serve"]\n'
        "FROM base AS other\nRUN three\nFROM base AS last\nENV A=1\nRUN four\n"
    )
    steps = [(step.kind, " ".join(step.text.split())) for step in tool.dockerfile_steps(text, "last")]
    assert steps == [
        ("argument", "V=12"),
        ("from", "debian:$V"),
        ("run", "one two"),
        ("set", "A=1"),
        ("run", "four"),
        ("command", '["serve"]'),
    ]
    with pytest.raises(ValueError, match="--target must be one of base, other, last, got 'cuda'"):
        tool.dockerfile_steps(text, "cuda")
    with pytest.raises(ValueError, match="found VOLUME"):
        tool.dockerfile_steps(text + "VOLUME /x\n", "last")


def test_what_the_build_copies_leaves_out_what_docker_ignores(tool: ModuleType, tmp_path: Path) -> None:
    for name in (
        ".git/a",
        ".venv/b",
        "framework/__pycache__/c",
        "egs/x/data/d",
        "egs/x/conf/e",
        "data/f",
        "tests/data/g",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".dockerignore").write_text((ROOT / ".dockerignore").read_text())
    pack = ["tar", "--create", "--file=-", *tool.copied(tmp_path), "--directory", str(tmp_path), "."]
    done = subprocess.run(pack, capture_output=True, check=True)
    listed = subprocess.run(["tar", "--list"], input=done.stdout, capture_output=True, check=True).stdout.decode()
    kept = {line for line in listed.splitlines() if not line.endswith("/")}
    assert kept == {"./.dockerignore", "./egs/x/conf/e", "./tests/data/g"}


def test_what_a_machine_lacks_is_named(tool: ModuleType) -> None:
    assert tool.missing({"debootstrap": None, "unshare": "/usr/bin/unshare"}, 0).startswith("it needs debootstrap: ")
    assert (
        tool.missing({"debootstrap": "/usr/sbin/debootstrap"}, 1000)
        == "it must run as root, which chroot and mount need"
    )
    assert tool.missing({"debootstrap": "/usr/sbin/debootstrap"}, 0) == ""


def test_the_mirror_is_the_one_that_apt_has(tool: ModuleType, tmp_path: Path) -> None:
    assert tool.mirror_of(tmp_path) == ""
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/debian.sources").write_text("Types: deb\nURIs: https://mirror.example/debian/\n")
    assert tool.mirror_of(tmp_path) == "https://mirror.example/debian"
    lines = ["# deb http://a/debian x", "deb http://b/debian-security x", "deb [trusted=yes] http://c/debian x main"]
    (tmp_path / "sources.list").write_text("\n".join(lines))
    assert tool.mirror_of(tmp_path) == "http://c/debian"
