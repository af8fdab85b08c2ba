"""`--help` of every verb and sub-verb shows an example, explains every option and says every default, and is quick."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from harken.apps.main import VERBS, main, module_of


def parsers(verb: str) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser of a verb and those of its sub-verbs."""
    module = importlib.import_module(module_of(verb))
    parser = argparse.ArgumentParser(prog=f"harken {verb}", epilog=f"example:\n  {module.EXAMPLE}")
    module.add_arguments(parser)
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_explained_with_its_default_and_an_example(verb: str) -> None:
    for parser in parsers(verb):
        assert (parser.epilog or "").startswith("example:\n  harken "), parser.prog
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            name = f"{parser.prog} {'/'.join(action.option_strings) or action.dest}"
            assert action.help, f"{name} has no help"
            if action.option_strings and not action.required and action.nargs != 0 and action.default is not None:
                assert "default" in action.help, f"{name} does not say its default"


@pytest.mark.parametrize("verb", VERBS)
def test_the_command_prints_them(verb: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: harken {verb}")
    assert "example:\n  harken " in out


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    """Measured 0.03 to 0.07 s; a heavy import takes seconds."""
    for arguments in ([], ["--help"], ["units", "--help"], ["report", "--help"]):
        code = f"""
import sys
from harken.apps.main import main
try:
    main({arguments!r})
except SystemExit:
    pass
sys.exit(any(name in sys.modules for name in ("torch", "numpy", "lhotse", "deepspeed", "matplotlib", "omegaconf")))
"""
        began = time.monotonic()
        assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
        assert time.monotonic() - began < 1.0
