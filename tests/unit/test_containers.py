"""The container files: what they run is what a checkout has, with the options that the scripts know. No engine runs."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def commands(name: str) -> list[str]:
    """What the file runs while it is built and tested."""
    text = (ROOT / "docker" / name).read_text()
    if name == "Dockerfile":
        return re.findall(r"^RUN (.+)$", text, re.MULTILINE)
    sections = re.findall(r"^%(?:post|test)\n((?:    .*\n)+)", text, re.MULTILINE)
    return [line.strip() for section in sections for line in section.splitlines()]


@pytest.mark.parametrize("name", ["Dockerfile", "harken.def"])
def test_containers_are_made_and_checked_by_the_scripts_of_the_checkout(name: str) -> None:
    lines = commands(name)
    for line in lines:
        assert subprocess.run(["bash", "-n", "-c", line], capture_output=True, check=False).returncode == 0, line
    scripts = [shlex.split(line)[1:] for line in lines if line.startswith("bash ")]
    assert {script for script, *_ in scripts} == {"tools/setup.sh", "tools/test.sh"}
    for script, *arguments in scripts:
        told = (ROOT / script).read_text().split("HELP\n")[1]
        for argument in arguments:
            assert not argument.startswith("--") or f"  {argument}" in told, f"{script} knows no {argument}"


def test_both_have_the_same_pinned_base_and_packages() -> None:
    docker, apptainer = ((ROOT / "docker" / name).read_text() for name in ("Dockerfile", "harken.def"))
    (version,) = re.findall(r"^ARG DEBIAN=(\d+\.\d+-slim)$", docker, re.MULTILINE)
    assert f"From: debian:{version}\n" in apptainer
    (packages,) = re.findall(r"apt-get install .*", docker)
    assert packages in apptainer
