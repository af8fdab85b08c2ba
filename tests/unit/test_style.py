"""The limits of tools/check_style.py hold, and the tool sees what breaks them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/check_style.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("check_style", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_style = load_tool()


def test_the_repository_is_within_its_limits() -> None:
    count, found = check_style.check_folders([ROOT / name for name in check_style.FOLDERS])
    assert found == []
    assert count > 10, "the folders must have been read"


def test_limits_are_inclusive() -> None:
    body = "def f():\n" + "    x = 1\n" * 79
    assert check_style.check_source(body + "y = 1\n" * 320, "f.py") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n" * 401, "a.py:1: a file must have at most 400 lines, found 401"),
        ("\ndef f():\n" + "    x = 1\n" * 80, "a.py:2: a function must have at most 80 lines, `f` has 81"),
        ("class A:\n  async def g(self):\n" + "    x = 1\n" * 80, "`g` has 81"),
        ("try:\n    f()\nexcept:\n    g()\n", "a.py:3: `except` must name what it catches"),
        ("x = eval('1')\n", "a.py:1: text must never be run as code"),
    ],
)
def test_every_limit_is_seen(text: str, message: str) -> None:
    (found,) = check_style.check_source(text, "a.py")
    assert message in found


def test_a_models_eval_mode_and_the_word_in_prose_are_no_eval() -> None:
    assert check_style.check_source("model.eval()\n'no eval( here'  # eval(x)\n", "a.py") == []


def test_the_command_line_fails_and_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("eval('1')\n")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/worse.py").write_text("eval('1')\n")
    done = subprocess.run([sys.executable, TOOL, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "bad.py:1: text must never" in done.stdout
    assert "1 files read, 1 over a limit" in done.stdout


def test_a_missing_folder_is_an_error() -> None:
    done = subprocess.run([sys.executable, TOOL, "/nowhere"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "/nowhere" in done.stderr
