"""`harken doctor`: what this machine has, what harken needs, and the command that installs what is missing."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harken.core.cpu import bf16_instructions

HELP = "versions, devices, what is missing and the command that installs it"
EXAMPLE = "harken doctor --json"

MIN_PYTHON = (3, 11)
MIN_FREE_GB = 5.0
SOURCE_SETUP = Path(__file__).resolve().parents[3] / "setup.py"
# Native libraries that can be installed and still not load; each imports in a fraction of a second.
NATIVE = {
    "numpy": "numpy",
    "soundfile": "soundfile",
    "soxr": "soxr",
    "sentencepiece": "sentencepiece",
    "kaldialign": "kaldialign",
    "kaldi-native-fbank": "kaldi_native_fbank",
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is missing or wrong, with the command or step that mends it.

    needed: harken does not work without it; otherwise one part of harken does not.
    """

    what: str
    fix: str
    needed: bool = True


@dataclass(kw_only=True)
class Report:
    """What the doctor found: facts by heading, and problems."""

    versions: dict[str, str] = field(default_factory=dict)
    devices: dict[str, Any] = field(default_factory=dict)
    optional: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether everything needed is there."""
        return not any(problem.needed for problem in self.problems)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report; return 0 when everything needed is there, 1 otherwise."""
    report = examine()
    if args.json:
        print(json.dumps({**asdict(report), "healthy": report.healthy}, indent=2))
    else:
        print(render(report))
    return 0 if report.healthy else 1


def examine() -> Report:
    """Look at the interpreter, the packages, the devices and the disk."""
    report = Report()
    check_python(report)
    check_requirements(report, requirements())
    torch = import_torch(report)
    check_cpu(report)
    check_gpus(report, torch)
    check_compiler(report)
    check_k2(report, torch)
    check_disk(report, Path.cwd())
    return report


def check_python(report: Report) -> None:
    """Python itself and harken."""
    from harken import __version__

    report.versions["python"] = f"{platform.python_version()} ({sys.executable})"
    report.versions["harken"] = __version__
    if sys.version_info < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        report.problems.append(
            Problem(
                what=f"Python must be {wanted} or later, found {platform.python_version()}",
                fix="tools/setup.sh --python PATH_OF_A_NEWER_PYTHON",
            )
        )


def requirements() -> list[str]:
    """Return what setup.py asks for, from the installed package or, in a source tree, from setup.py itself.

    An editable install keeps the list of the day it was made, so the source tree comes first.
    """
    if SOURCE_SETUP.is_file():
        for node in ast.parse(SOURCE_SETUP.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INSTALL_REQUIRES":
                return [str(name) for name in ast.literal_eval(node.value)]
    found = importlib.metadata.requires("harken") or []
    return [line for line in found if "extra ==" not in line]


def check_requirements(report: Report, names: Iterable[str]) -> None:
    """Compare what is installed with what is needed, and load the native libraries."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        report.problems.append(Problem(what="packaging is not installed", fix=f"{pip()} packaging"))
        return
    for requirement in map(Requirement, names):
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            report.versions[requirement.name] = "missing"
            report.problems.append(Problem(what=f"{requirement.name} is not installed", fix=f"{pip()} '{requirement}'"))
            continue
        report.versions[requirement.name] = found
        if not requirement.specifier.contains(found, prereleases=True):
            report.problems.append(
                Problem(
                    what=f"{requirement.name} must be {requirement.specifier}, found {found}",
                    fix=f"{pip()} '{requirement}'",
                )
            )
        elif requirement.name in NATIVE:
            check_native(report, requirement.name)


def check_native(report: Report, name: str) -> None:
    """Import a library whose compiled part may not fit this system."""
    try:
        importlib.import_module(NATIVE[name])
    except (ImportError, OSError) as error:
        report.problems.append(
            Problem(
                what=f"{name} is installed and does not load: {error}",
                fix=f"{pip()} --force-reinstall --no-deps {name}",
            )
        )


def pip() -> str:
    """Return the command that installs into this environment, with the tested versions where they are at hand."""
    constraints = SOURCE_SETUP.parent / "constraints.txt"
    pins = f" -c {constraints}" if constraints.is_file() else ""
    return f"{sys.executable} -m pip install{pins}"


def import_torch(report: Report) -> Any | None:
    """Import torch, or say why it does not load; its absence is reported with the other packages."""
    if report.versions.get("torch") == "missing":
        return None
    try:
        return importlib.import_module("torch")
    except (ImportError, OSError) as error:
        fix = "tools/setup.sh --force, or --torch VERSION with a build for this machine"
        report.problems.append(Problem(what=f"torch is installed and does not load: {error}", fix=fix))
        return None


def check_cpu(report: Report) -> None:
    """Model, cores this process may use, memory, and whether bf16 arithmetic is in hardware."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    affinity = getattr(os, "sched_getaffinity", None)
    report.devices["cpu"] = model.group(1) if model else platform.processor() or platform.machine()
    report.devices["cpu_cores"] = len(affinity(0)) if affinity else os.cpu_count()
    report.devices["cpu_bf16"] = ", ".join(bf16_instructions(info)) or "emulated: slower than fp32 on this CPU"
    try:
        import psutil
    except ImportError:
        return
    memory = psutil.virtual_memory()
    report.devices["memory"] = f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free"


def check_gpus(report: Report, torch: Any | None) -> None:
    """GPUs as torch sees them, and the case of a driver without a torch that can use it."""
    if torch is None:
        return
    report.devices["torch_build"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(i)
            report.devices[f"gpu{i}"] = (
                f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute {found.major}.{found.minor}"
            )
        return
    report.devices["gpus"] = "none"
    if Path("/proc/driver/nvidia/version").exists():
        built = "is a CPU build" if torch.version.cuda is None else "finds no usable device"
        report.problems.append(
            Problem(
                what=f"an NVIDIA driver is loaded, and torch {torch.__version__} {built}",
                fix='tools/setup.sh --force --torch VERSION --torch-args "--index-url URL_OF_CUDA_BUILDS"',
                needed=False,
            )
        )


def check_compiler(report: Report) -> None:
    """torch.compile and DeepSpeed's fused kernels compile C++ on this machine when they are asked for."""
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    report.optional["compiler"] = compiler or "none"
    if compiler is None or not headers.exists():
        absent = "C++ compiler" if compiler is None else f"Python headers ({headers})"
        report.problems.append(
            Problem(
                what=f"no {absent}: torch.compile and fused optimisers cannot be built",
                fix="apt-get install g++ python3-dev",
                needed=False,
            )
        )


def k2_build(torch_version: str, cuda: str | None, hip: str | None = None) -> str:
    """Return the local version of the k2 for this torch and device, for example `cuda13.0.torch2.11.0`.

    hip: the ROCm that torch was built with. Source: k2's installation pages, with wheels for CPUs, CUDA and ROCm.
    """
    device = f"cuda{cuda}" if cuda else f"rocm{'.'.join(hip.split('.')[:2])}" if hip else "cpu"
    return f"{device}.torch{torch_version.partition('+')[0]}"


def k2_wheel(build: str) -> str:
    """Return the name of the k2 wheel of a build for this Python and machine, with `*` for k2's own version.

    Source: the lists of k2's installation pages: `...-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl`.
    """
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return f"k2-*+{build}-{python}-{python}-*_{platform.machine().lower()}.whl"


def check_k2(report: Report, torch: Any | None) -> None:
    """k2 is for lattices and pruned transducers only; a wheel built for another torch does not import."""
    if torch is None:
        return
    build = k2_build(torch.__version__, torch.version.cuda, getattr(torch.version, "hip", None))
    fix = (
        f"look for {k2_wheel(build)} on k2's installation pages, which list wheels by torch and device; where it is "
        f"there, {pip()} k2==VERSION+{build} --find-links PAGE; where not, take a torch that they list, or build k2 "
        "from source"
    )
    try:
        report.optional["k2"] = str(getattr(importlib.import_module("k2"), "__version__", "imports"))
    except ModuleNotFoundError:
        report.optional["k2"] = f"not installed; to use lattices: {fix}"
    except (ImportError, OSError, RuntimeError) as error:
        report.optional["k2"] = "installed, does not import"
        report.problems.append(Problem(what=f"k2 does not import: {error}", fix=fix, needed=False))


def check_disk(report: Report, folder: Path) -> None:
    """Room for checkpoints and caches where the user stands."""
    free = shutil.disk_usage(folder).free / 1e9
    report.devices["disk_free"] = f"{free:.0f} GB at {folder}"
    if free < MIN_FREE_GB:
        report.problems.append(
            Problem(
                what=f"only {free:.1f} GB are free at {folder}, the default recipe needs about {MIN_FREE_GB:.0f}",
                fix="make room there, or give run.sh another folder with --exp DIR",
                needed=False,
            )
        )


def render(report: Report) -> str:
    """Lay the report out for a terminal."""
    lines: list[str] = []
    headings: tuple[tuple[str, dict[str, Any]], ...] = (
        ("versions", report.versions),
        ("devices", report.devices),
        ("optional", report.optional),
    )
    for heading, facts in headings:
        lines.append(heading)
        lines += [f"  {name.replace('_', ' '):<20} {value}" for name, value in facts.items()]
    for needed, heading in ((True, "missing or wrong"), (False, "worth knowing")):
        found = [problem for problem in report.problems if problem.needed == needed]
        if found:
            lines.append(heading)
            for problem in found:
                lines += [f"  {problem.what}", f"    -> {problem.fix}"]
    lines.append("everything needed is there" if report.healthy else "not ready: mend what is missing above")
    return "\n".join(lines)
