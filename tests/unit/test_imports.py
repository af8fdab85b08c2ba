"""Dependencies point one way (docs/DESIGN.md, section 2): the imports are read, not run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "framework/harken"
MODELS = {"encoders", "frontends", "nn", "config", "core"}
# What each package may import besides itself. `apps` may import everything; nothing may import `apps`.
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "config": {"core"},
    "nn": {"config", "core"},
    "frontends": {"nn", "config", "core"},
    "encoders": MODELS - {"encoders"},
    "data": {"config", "core"},
    "units": {"data", *MODELS},
    "objectives": {"units", "data", *MODELS},  # `prepare` runs in the loader: masks, tokens
    "optim": {"nn", "config", "core"},
    "engine": {"optim", "config", "core"},
    "train": {"engine", "optim", "data", "units", "nn", "config", "core"},
    "cluster": {"config", "core"},
    "decode": {"data", "nn", "config", "core"},
    "evaluate": {"decode", "objectives", "units", "data", *MODELS},
    "interop": {"objectives", "data", *MODELS},  # tokenizers of models that were fine-tuned
    "report": {"evaluate", "decode", "train", "data", "units", "config", "core"},
}
ALLOWED["apps"] = set(ALLOWED)
# These run every objective and every encoder and so may know none by name.
KNOW_NO_PART = ("data", "engine", "train")
PARTS = ("objectives", "encoders")


def imported_modules(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the full name of everything a file imports, inside functions and type checks too."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def modules(root: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield the package under harken ("" for harken itself), the module's full name and its file."""
    for path in sorted(root.rglob("*.py")):
        parts = list(path.relative_to(root).with_suffix("").parts)
        package = parts[0] if len(parts) > 1 else ""
        yield package, ".".join(["harken", *(part for part in parts if part != "__init__")]), path


def bad_arrows(root: Path) -> list[str]:
    """Return one message for each import that points up, and for each package without a place in the order."""
    found = []
    for package, module, path in modules(root):
        if package and package not in ALLOWED:
            found.append(f"{path}: package `{package}` has no place in ALLOWED: give it one, and one in docs/DESIGN.md")
            continue
        for line, name in imported_modules(path, module):
            parts = name.split(".")
            if parts[0] != "harken" or len(parts) == 1 or not package:
                continue
            target = parts[1]
            if (root / target).is_dir() and target != package and target not in ALLOWED[package]:
                found.append(f"{path}:{line}: `{package}` must not import `{target}` ({name})")
    return found


def part_names(root: Path) -> set[str]:
    """Names of the registered objectives and encoders: the files with a `@register(...)` class."""
    names = set()
    for package in PARTS:
        for path in (root / package).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                decorators = node.decorator_list if isinstance(node, ast.ClassDef) else []
                if any(isinstance(d, ast.Call) and ast.unparse(d.func) == "register" for d in decorators):
                    names.add(path.stem)
    return names


def words(name: str) -> str:
    """`HubertLoss` and `hubert_loss` are both `_hubert_loss_`."""
    return "_" + re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower() + "_"


def mentioned_parts(root: Path) -> list[str]:
    """Return one message for each identifier or string of data, engine and train that names an objective or encoder.

    Comments and prose may name them: a reader is told why a rule exists.
    """
    found = []
    names = part_names(root)
    for package, _, path in modules(root):
        if package not in KNOW_NO_PART:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for text in identifiers(node):
                found += [
                    f"{path}:{getattr(node, 'lineno', 0)}: `{package}` must not know `{name}` (`{text}`)"
                    for name in sorted(names)
                    if f"_{name}_" in words(text)
                ]
    return found


def identifiers(node: ast.AST) -> Iterator[str]:
    """Yield what a node calls things, and its string when that is one word (a name to compare with, not prose)."""
    for field in ("id", "attr", "arg", "name", "module"):
        value = getattr(node, field, None)
        if isinstance(value, str):
            yield from value.split(".")
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
        yield from node.value.split(".")


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_imports_point_down() -> None:
    assert sum(1 for _ in modules(PACKAGE)) > 5, "the package must be found"
    assert bad_arrows(PACKAGE) == []


def test_data_engine_and_train_know_no_objective_and_no_encoder() -> None:
    assert {"hubert", "ctc", "transformer"} <= part_names(PACKAGE)
    assert mentioned_parts(PACKAGE) == []


def test_the_order_has_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {package for package, below in ALLOWED.items() if package not in done and below - {package} <= done}
        assert ready, f"these import each other: {sorted(set(ALLOWED) - done)}"
        done |= ready


@pytest.mark.parametrize(
    "line",
    [
        "import harken.apps.main",
        "from harken import apps",
        "from harken.apps.main import main",
        "from ..apps import main",
        "from ..apps.main import main",
        "def f():\n    from harken.apps import main",
        "if TYPE_CHECKING:\n    from harken.apps import main",
    ],
)
def test_every_kind_of_import_that_points_up_is_found(tmp_path: Path, line: str) -> None:
    write(tmp_path, "core/files.py", "import os\nfrom harken.core import errors\nfrom . import loss\n")
    write(tmp_path, "apps/main.py", "from harken import core, data\nfrom harken.train.loop import train\n")
    write(tmp_path, "data/plan.py", "from ..core.files import sync\nimport harken\n")
    write(tmp_path, "train/loop.py", "from harken.data import plan\n")
    assert bad_arrows(tmp_path) == []
    write(tmp_path, "core/bad.py", line + "\n")
    (message,) = bad_arrows(tmp_path)
    assert "`core` must not import `apps`" in message
    assert "core/bad.py:" in message


def test_a_package_without_a_place_is_found(tmp_path: Path) -> None:
    write(tmp_path, "misc/helpers.py", "")
    assert "`misc` has no place" in bad_arrows(tmp_path)[0]


@pytest.mark.parametrize(
    ("line", "is_bad"),
    [
        ("if config.objective.name == 'hubert': pass", True),
        ("from harken.objectives.hubert import Hubert", True),
        ("def f(model): return model.hubert_head", True),
        ("class HubertLoop: ...", True),
        ("find('encoder', 'harken.encoders.transformer')", True),
        ("# hubert needs units\nx = 'HuBERT reads units, so does ctc'", False),
        ("action = direct", False),
        ("def f():\n    'A hubert model.'", False),
    ],
)
def test_a_part_known_by_name_is_found(tmp_path: Path, line: str, is_bad: bool) -> None:
    registered = "@register('objective', Config)\nclass Part: ...\n"
    for name in ("objectives/hubert.py", "objectives/ctc.py", "encoders/transformer.py"):
        write(tmp_path, name, registered)
    write(tmp_path, "objectives/base.py", "class Base: ...\n")
    write(tmp_path, "train/loop.py", "from harken.core import base\n" + line + "\n")
    assert bool(mentioned_parts(tmp_path)) == is_bad
