"""tools/setup.sh and tools/test.sh, run on a small repository: real venvs, real pip, no network."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# torch and setuptools of the environment that runs the tests, so that nothing is fetched.
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "PYTHONPATH": sysconfig.get_path("purelib")}
OFFLINE = "--no-build-isolation --no-deps --no-index"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/setup.sh", tmp_path / "tools")
    (tmp_path / "setup.py").write_text(
        "from setuptools import setup\nsetup(name='small', version='1.0', py_modules=[])\n"
    )
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    return tmp_path


def setup(repository: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        ["bash", str(repository / "tools/setup.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=ENVIRONMENT,
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    return output


def small(repository: Path, *arguments: str) -> str:
    return setup(repository, "--python", sys.executable, "--pip-args", OFFLINE, *arguments)


@pytest.mark.slow
def test_setup_installs_once_and_mends_what_was_cut_off(repository: Path) -> None:
    first = small(repository, "--torch", "none")
    venv = repository / ".venv"
    assert f"environment {venv} is ready" in first
    (package,) = venv.glob("lib/python3*/site-packages/small-1.0.dist-info")
    (pins,) = [line for line in (venv / "harken-constraints.txt").read_text().splitlines() if "torch==" in line]
    import torch

    assert pins == f"torch=={torch.__version__}", "the torch that is there must be pinned"

    assert "is up to date" in small(repository)
    (repository / "constraints.txt").write_text("torch==2.13.0\nnumpy\n")
    assert "is ready" in small(repository), "--torch none must have been remembered"
    assert "is up to date" in small(repository)

    # As a kill in the middle leaves it: pip's RECORD and the final stamp are missing.
    (package / "RECORD").unlink()
    stamp = venv / "harken-setup.stamp"
    stamp.write_text("hash=unfinished\ntorch=none\nextras=dev\n")
    mended = small(repository)
    assert "was cut off while it installed small-1.0: installing it again" in mended
    assert (package / "RECORD").exists()
    assert "is up to date" in small(repository)


def stub_python(folder: Path, body: str) -> str:
    path = folder / "stub"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_an_old_python_is_refused(repository: Path, tmp_path: Path) -> None:
    old = stub_python(tmp_path, 'case "$1" in --version) echo Python 3.9.2;; *) exit 1;; esac')
    output = setup(repository, "--python", old, code=1)
    assert "Python must be 3.11 or later" in output
    assert "Python 3.9.2" in output
    assert not (repository / ".venv").exists()


def test_a_python_without_venv_names_the_package(repository: Path, tmp_path: Path) -> None:
    bare = stub_python(tmp_path, f'case "$2" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac')
    output = setup(repository, "--python", bare, code=1)
    assert "apt-get install python3-venv" in output


def test_a_folder_with_other_files_is_not_touched(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    output = setup(repository, "--python", sys.executable, "--venv", str(folder), code=1)
    assert "must be a venv or absent, found a folder with other files" in output
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--trch", "1"], "unknown option --trch"), (["--venv"], "--venv needs a value")],
)
def test_bad_options_are_refused(repository: Path, arguments: list[str], message: str) -> None:
    assert message in setup(repository, *arguments, code=1)


@pytest.mark.parametrize("script", ["setup.sh", "test.sh"])
def test_help_has_examples_and_does_nothing(script: str) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / script), "--help"],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert "Examples:" in done.stdout
    assert done.stdout.count(f"tools/{script}") >= 3


@pytest.mark.slow
def test_every_kind_of_check_runs_and_the_first_failure_counts(tmp_path: Path) -> None:
    for folder in ("tools", "framework/harken", "tests"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("tools/test.sh", "tools/check_style.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "framework/harken/__init__.py").write_text("import os\n")  # lint: unused
    (tmp_path / "tests/test_small.py").write_text("def test_small() -> None:\n    assert 1 + 1 == 2\n")
    done = subprocess.run(
        ["bash", "tools/test.sh", "--python", sys.executable, "--nproc", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    table = done.stdout.split("check    seconds")[1]
    results = {line.split()[0]: line.split()[2] for line in table.splitlines()[1:]}
    assert results == {
        "lint": "FAILED",
        "format": "passed",
        "types": "passed",
        "style": "passed",
        "tests": "passed",
    }
    assert done.returncode == 1
    assert "1 passed" in done.stdout


def test_setup_py_and_constraints_agree() -> None:
    """Every package that setup.py names has exactly one pin, but k2, whose wheel must fit the torch that is there."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    by_name = {canonicalize_name(pin.name): pin for pin in pins}
    assert len(by_name) == len(pins)
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    values = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in {"INSTALL_REQUIRES", "EXTRAS"}:
            values[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
    names = [*values["INSTALL_REQUIRES"], *(name for extra in values["EXTRAS"].values() for name in extra)]
    wanted = [Requirement(name) for name in names]
    assert len(wanted) > 20
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        if name == "k2":
            assert name not in by_name
            continue
        (pin,) = by_name[name].specifier
        assert requirement.specifier.contains(pin.version), f"{pin} must satisfy {requirement}"
