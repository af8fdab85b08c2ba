"""The documentation is true: its blocks run, its links lead somewhere, its messages are in the code, its table fits.

A fenced block marked `bash` or `python` in README.md and docs/*.md is run, in the order of its page. A block whose
first line is a comment that is nothing but a file name (`# mylab/gru.py`; after `#!` for a script) is written to that
file instead. `console` and blocks of any other language are not run: they need a GPU, root, or hours.

README.md runs first, on a corpus of tones; every other page starts in a copy of the folder that README.md leaves.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harken.config.registry import SLOTS, find
from harken.config.schema import RunConfig
from harken.encoders.stack import StackConfig
from harken.units.kmeans import KMeansConfig

ROOT = Path(__file__).resolve().parents[2]
SERVER = Path(__file__).with_name("docs_server.py")
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
RECIPES = sorted(f"egs/{path.parent.name}/README.md" for path in (ROOT / "egs").glob("*/README.md"))
LINKED = ["README.md", *(f"docs/{name}" for name in PAGES), *RECIPES, "CONTRIBUTING.md"]
FENCE = re.compile(r"^```(\w+)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"(?:#!.*\n)?# ([\w./-]+\.\w+)\n")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
GROUPS = {"data", "batch", "train", "engine", "checkpoint", "log"}
LARGE = 100_000  # bytes; such files are linked into a page's folder, not copied: they are replaced, never changed


@dataclass(frozen=True, kw_only=True)
class DeclaredAnew(StackConfig):
    """A part whose author forgot to say what the new default means."""

    dim: int = 7
    kernel: int = 3
    """Frames."""


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page on which the text begins."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield Block(found[1] or "", found[2], text.count("\n", 0, found.start(2)) + 1)


@dataclass(frozen=True)
class Site:
    """The folder that README.md leaves behind, and the environment in which blocks run."""

    folder: Path
    environment: dict[str, str]

    def run(self, page: Path, folder: Path) -> None:
        """Run a page's blocks in a folder; a block that fails is named by its line, with what it printed."""
        for block in blocks(page):
            place = f"{page.name} line {block.line}"
            if name := FILE_NAME.match(block.text):
                path = folder / name[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
                path.chmod(0o755 if block.text.startswith("#!") else 0o644)
            elif block.language in {"bash", "python"}:
                command = ["bash", "-euo", "pipefail", "-c", block.text]
                if block.language == "python":
                    (folder / ".block.py").write_text("\n" * (block.line - 1) + block.text)
                    command = [str(Path(self.environment["PATH"].split(":")[0], "python")), ".block.py"]
                self.check(place, command, folder)

    def check(self, place: str, command: list[str], folder: Path) -> None:
        done = subprocess.run(
            command,
            cwd=folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{place} ended with status {done.returncode}:\n{done.stdout[-6000:]}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of the blocks, with `harken` and `python` on its PATH."""
    programs = tmp_path_factory.mktemp("bin")
    load(SERVER).write_clients(programs, str(programs / "socket"))
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "framework"),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.Popen(
        [sys.executable, SERVER, programs / "socket"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert any(line == "ready\n" for line in process.stdout), "the server ended before it listened"
    yield environment
    os.killpg(process.pid, signal.SIGKILL)  # what a block left running ends, too
    process.wait()


@pytest.fixture(scope="module")
def site(corpus, server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Site:
    """README.md's blocks, run on folders of tones with a text beside each."""
    from harken.data.manifest import Manifest

    folder = tmp_path_factory.mktemp("site")
    for manifest, part in ((corpus.train, "train"), (corpus.valid, "dev")):
        (folder / "corpus" / part).mkdir(parents=True)
        for cut in Manifest(manifest):
            audio = Path(cut.recording.sources[0].source)
            os.link(audio, folder / "corpus" / part / audio.name)
            (folder / "corpus" / part / f"{audio.stem}.txt").write_text(cut.supervisions[0].text + "\n")
    (folder / "egs/amazon_queen").mkdir(parents=True)
    (folder / "tests").mkdir()
    (folder / "tests/golden").symlink_to(ROOT / "tests/golden")
    shutil.copytree(ROOT / "egs/shared", folder / "egs/shared")
    shutil.copytree(ROOT / "egs/amazon_queen/conf", folder / "egs/amazon_queen/conf")
    made = Site(folder, server)
    made.run(ROOT / "README.md", folder)
    return made


def copy_or_link(source: str, target: str) -> None:
    if Path(source).stat().st_size > LARGE:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


@pytest.mark.slow
def test_the_blocks_of_the_readme_run(site: Site) -> None:
    names = [block.language for block in blocks(ROOT / "README.md")]
    assert names.count("bash") >= 2, "README.md must show how to train on one's own data"
    assert (site.folder / "exp/finetune/checkpoints").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page: str, site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    shutil.copytree(site.folder, folder, symlinks=True, copy_function=copy_or_link)
    site.run(ROOT / "docs" / page, folder)


@pytest.mark.parametrize("page", LINKED)
def test_every_relative_link_leads_somewhere(page: str) -> None:
    path = ROOT / page
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    broken = []
    for target in LINK.findall(text):
        name, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        aim = (path.parent / name) if name else path
        if not aim.exists() or (anchor and anchor not in anchors(aim)):
            broken.append(target)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """The names that headings have on the usual forges: lower case, spaces to dashes, no punctuation."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_index_once() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert [name for name in PAGES if name != "README.md" and index.count(f"| [{name}]({name}) |") != 1] == []


@pytest.mark.parametrize("page", LINKED)
def test_every_block_is_marked_as_one_that_runs_or_one_that_does_not(page: str) -> None:
    known = {"bash", "python", "console", "yaml", "json"}  # `sh` would look like `bash` and never run
    found = [block for block in blocks(ROOT / page) if block.language not in known]
    assert [f"line {block.line}: {block.language}" for block in found] == []


def literal(node: ast.AST) -> str | None:
    """A text of the code with `\\0` for what is filled in, None for what is no text."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


@functools.cache
def messages() -> list[str]:
    """Every text of the code, every line of the scripts, and the texts that are printed behind a word."""
    found = []
    for path in sorted(
        [*(ROOT / "framework").rglob("*.py"), *(ROOT / "egs").glob("*/local/*.py"), *(ROOT / "tools").glob("*.py")]
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (text := literal(node)) is not None:
                found.append(text)
            elif isinstance(node, ast.Call):
                texts = [text if (text := literal(argument)) is not None else "\0" for argument in node.args]
                if ast.unparse(node.func) == "Note" and len(texts) == 3:
                    found.append(f"NOTE {texts[0]}: {texts[2]}")
                elif ast.unparse(node.func).endswith(".lacks"):
                    found.append(f"missing: {texts[1]}")
    for path in [*(ROOT / "egs").rglob("*.sh"), *(ROOT / "tools").glob("*.sh")]:
        joined = re.sub(r'" \\\n\s*"', " ", path.read_text(encoding="utf-8"))
        found += re.sub(r"\$\{?\w+\}?|\$\(.*?\)", "\0", joined).splitlines()
    return found


MESSAGE_TABLE = re.compile(r"^\| (?:you see|message) \|.*\n\|[-|]+\n((?:\|.*\n)+)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_every_message_that_a_page_quotes_is_in_the_code(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = [row.split(" | ")[0] for table in MESSAGE_TABLE.findall(text) for row in table.splitlines()]
    # backticks are left out on both sides: Markdown needs its own
    quoted = [text.replace("`", "").strip() for row in rows for _, text in re.findall(r"(`+)(.+?)\1(?!`)", row)]
    assert len(quoted) > 60 or page != "symptoms.md"
    code = [message.replace("`", "") for message in messages()]
    lost = []
    for text in quoted:
        pattern = re.compile(".*".join(map(re.escape, re.split(r"\.\.\.|\bN\b", text))), re.DOTALL)
        if not any(pattern.search(message) for message in code):
            lost.append(text)
    assert lost == []


def test_every_warning_of_the_code_is_in_the_symptom_index() -> None:
    page = (ROOT / "docs/symptoms.md").read_text(encoding="utf-8").replace("`", "")
    warnings = [text.replace("`", "") for text in messages() if re.match(r"(WARNING|NOTE|  WRONG|  warning) ", text)]
    assert len(warnings) >= 5
    # the words before the first thing that is filled in
    assert [text for text in warnings if text.split("\0")[0].strip() not in page] == []


def test_every_field_of_a_configuration_says_what_it_means() -> None:
    table = load(ROOT / "tools/config_table.py")
    groups = [RunConfig, KMeansConfig, *(part for slot in SLOTS for _, part in table.parts(slot))]
    hints = typing.get_type_hints(RunConfig)
    groups += [hints[field.name] for field in dataclasses.fields(RunConfig) if field.name in GROUPS]
    silent = []
    for cls in groups:
        told = table.field_docstrings(cls)
        silent += [f"{cls.__name__}.{field.name}" for field in dataclasses.fields(cls) if not told.get(field.name)]
    assert [name for name in silent if not name.endswith(".name")] == [], "write a docstring under these fields"


def test_the_table_of_settings_has_the_docstrings_of_inherited_fields() -> None:
    table = load(ROOT / "tools/config_table.py")

    told = table.field_docstrings(find("encoder", "conformer").config)
    assert told["position_groups"].startswith("Groups of the convolution"), "of StackConfig"
    assert told["dim"].startswith("Width of a representation. The paper's encoder dim"), "its own"
    assert table.own_docstrings(DeclaredAnew) == {"dim": "", "kernel": "Frames."}
    assert table.field_docstrings(DeclaredAnew)["dim"] == "", "the base's words are of the base's default"
    assert "### encoder.name: conformer" in (ROOT / "docs/configuration.md").read_text(encoding="utf-8")


def test_the_table_of_settings_is_up_to_date() -> None:
    table = load(ROOT / "tools/config_table.py")
    page = ROOT / "docs/configuration.md"
    assert table.updated(page.read_text(encoding="utf-8")) == page.read_text(encoding="utf-8"), (
        "docs/configuration.md is older than the code: run python tools/config_table.py --write"
    )
