"""What starting harken imports: a count of modules, as a time would be the machine's."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "numpy", "lhotse", "deepspeed", "omegaconf", "transformers", "matplotlib", "scipy"}


def imported(code: str) -> set[str]:
    """Return the names of the modules that a fresh interpreter has after `code`, beyond those of its own start."""
    count = "names = [*set(sys.modules) - before]; import json; print(json.dumps(names))"
    program = f"import sys; before = set(sys.modules)\n{code}\n{count}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "most"),
    [
        ("import harken", 10),
        ("from harken.apps.main import main; main([])", 90),
    ],
)
def test_starting_imports_nothing_heavy(code: str, most: int) -> None:
    found = imported(code)
    assert "harken" in found
    assert not {name.partition(".")[0] for name in found} & HEAVY
    assert len(found) <= most, sorted(found)


def test_the_help_of_all_verbs_imports_no_verb() -> None:
    apps = {name for name in imported("from harken.apps.main import main; main([])") if name.startswith("harken.apps.")}
    assert apps == {"harken.apps.main"}


def test_torch_would_be_seen() -> None:
    assert "torch" in imported("import harken.core.batch"), "the tests above would not see torch"
