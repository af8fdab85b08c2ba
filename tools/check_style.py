"""Limits that no linter here checks: the length of files and functions, `eval` and bare `except`.

Run as `python tools/check_style.py [FOLDER ...]`; without folders it reads framework, tools, tests and egs.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("framework", "tools", "tests", "egs")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80


def check_source(text: str, name: str, *, limit_file: bool = True) -> list[str]:
    """Return one message for each broken limit in Python source `text`, each starting with `name:line:`."""
    found: list[str] = []
    lines = text.count("\n") + 1 - text.endswith("\n")
    if limit_file and lines > MAX_FILE_LINES:
        found.append(f"{name}:1: a file must have at most {MAX_FILE_LINES} lines, found {lines}: split it")
    for node in ast.walk(ast.parse(text, filename=name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(
                    f"{name}:{node.lineno}: a function must have at most {MAX_FUNCTION_LINES} lines, "
                    f"`{node.name}` has {length}: split it"
                )
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{name}:{node.lineno}: `except` must name what it catches")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "eval":
            found.append(f"{name}:{node.lineno}: text must never be run as code: no `eval`")
    return found


def python_files(folders: Iterable[Path]) -> Iterator[Path]:
    """Yield the Python files below the folders, without hidden folders and what recipes make."""
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).parts
            made = folder.name == "egs" and len(parts) > 1 and parts[1] in {"exp", "data"}
            if not made and not any(part.startswith(".") for part in parts):
                yield path


def check_folders(folders: Iterable[Path]) -> tuple[int, list[str]]:
    """Return the number of files read and every message; the file limit holds in framework/ alone."""
    found: list[str] = []
    count = 0
    for path in python_files(folders):
        count += 1
        relative = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        limit_file = relative.parts[0] == "framework"
        found += check_source(path.read_text(encoding="utf-8"), str(relative), limit_file=limit_file)
    return count, found


def main(arguments: list[str]) -> int:
    """Print every message; return 0 when there is none."""
    folders = [Path(argument).resolve() for argument in arguments] or [ROOT / name for name in FOLDERS]
    missing = [str(folder) for folder in folders if arguments and not folder.is_dir()]
    if missing:
        print(f"check_style.py: expected folders, found none at {', '.join(missing)}", file=sys.stderr)
        return 2
    count, found = check_folders(folders)
    print("\n".join([*found, f"{count} files read, {len(found)} over a limit"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
