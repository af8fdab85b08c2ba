"""`harken doctor` on this machine, and on what it must notice."""

from __future__ import annotations

import argparse
import fnmatch
import json
import platform
import subprocess
import sys

import pytest

from harken.apps import doctor


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return parser.parse_args(arguments)


def test_this_environment_is_healthy_and_the_report_is_readable(capsys) -> None:
    assert doctor.run(parse()) == 0
    output = capsys.readouterr().out
    for word in (
        "python",
        "harken",
        "torch",
        "deepspeed",
        "lhotse",
        "cpu cores",
        "cpu bf16",
        "disk free",
        "k2",
    ):
        assert word in output
    assert output.endswith("everything needed is there\n")


def test_json_has_the_same_facts(capsys) -> None:
    import torch

    assert doctor.run(parse("--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"]["cpu_cores"] >= 1


def test_requirements_are_those_of_setup_py() -> None:
    names = doctor.requirements()
    assert "torch>=2.11" in names
    assert "urllib3" in names
    assert not any("pytest" in name for name in names)


@pytest.mark.parametrize(
    ("requirement", "what", "fix"),
    [
        (
            "harken-no-such-package>=1",
            "harken-no-such-package is not installed",
            "'harken-no-such-package>=1'",
        ),
        ("torch>=99", "torch must be >=99, found 2", "'torch>=99'"),
    ],
)
def test_what_is_missing_comes_with_the_command_that_installs_it(requirement: str, what: str, fix: str) -> None:
    report = doctor.Report()
    doctor.check_requirements(report, ["numpy", requirement])
    (problem,) = report.problems
    assert what in problem.what
    assert problem.fix.startswith(f"{sys.executable} -m pip install ")
    assert problem.fix.endswith(fix)
    assert not report.healthy
    assert what in doctor.render(report)
    assert "not ready" in doctor.render(report)


def test_a_missing_package_fails_the_command(capsys, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: ["harken-no-such-package"])
    assert doctor.run(parse()) == 1
    assert "pip install" in capsys.readouterr().out


def test_a_library_that_does_not_load_is_noticed(tmp_path, monkeypatch) -> None:
    (tmp_path / "harken_broken.py").write_text("raise OSError('libbroken.so: cannot open')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(doctor.NATIVE, "broken", "harken_broken")
    report = doctor.Report()
    doctor.check_native(report, "broken")
    assert "broken is installed and does not load: libbroken.so: cannot open" in report.problems[0].what


@pytest.mark.parametrize(
    ("torch_version", "cuda", "hip", "wheel"),
    [
        ("2.13.0+cpu", None, None, "k2-1.24.4.dev20260626+cpu.torch2.13.0-{py}-{py}-manylinux_2_28_{machine}.whl"),
        (
            "2.11.0+cu130",
            "13.0",
            None,
            "k2-1.24.4.dev20260423+cuda13.0.torch2.11.0-{py}-{py}-manylinux_2_27_{machine}.manylinux_2_28_{machine}.whl",
        ),
        (
            "2.12.1+rocm7.2",
            None,
            "7.2.53211-e1a6bc5663",
            "k2-1.24.4.dev20260626+rocm7.2.torch2.12.1-{py}-{py}-manylinux_2_27_{machine}.manylinux_2_28_{machine}.whl",
        ),
    ],
)
def test_the_k2_wheel_that_fits_is_named(torch_version: str, cuda: str | None, hip: str | None, wheel: str) -> None:
    """The names are those of k2's installation pages, with this Python and machine in them."""
    python, machine = f"cp{sys.version_info.major}{sys.version_info.minor}", platform.machine().lower()
    pattern = doctor.k2_wheel(doctor.k2_build(torch_version, cuda, hip))
    assert fnmatch.fnmatch(wheel.format(py=python, machine=machine), pattern)
    other = doctor.k2_wheel(doctor.k2_build("2.10.0", cuda, hip))
    assert not fnmatch.fnmatch(wheel.format(py=python, machine=machine), other)


def test_a_k2_for_another_torch_is_a_warning_not_a_failure(tmp_path, monkeypatch) -> None:
    import torch

    (tmp_path / "k2.py").write_text("raise ImportError('undefined symbol: torch')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "k2", raising=False)
    report = doctor.Report()
    doctor.check_k2(report, torch)
    assert "undefined symbol" in report.problems[0].what
    assert "torch" + torch.__version__.split("+")[0] in report.problems[0].fix
    assert report.healthy


def test_little_disk_is_worth_knowing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_GB", 1e9)
    report = doctor.Report()
    doctor.check_disk(report, tmp_path)
    assert "are free at" in report.problems[0].what
    assert report.healthy


def test_importing_the_verb_is_instant() -> None:
    code = "import sys, harken.apps.doctor; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
