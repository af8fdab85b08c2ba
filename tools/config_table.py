"""Writes the table of settings in docs/configuration.md from the dataclasses that are the schema.

Run as `python tools/config_table.py` to print it, with `--write` to put it into the page.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import inspect
import itertools
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "framework"))

from harken.config.registry import SLOTS, available, find  # noqa: E402
from harken.config.schema import RunConfig  # noqa: E402
from harken.core.errors import HarkenError  # noqa: E402

PAGE = ROOT / "docs/configuration.md"
BEGIN, END = "<!-- settings:begin -->", "<!-- settings:end -->"


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write it into docs/configuration.md")
    args = parser.parse_args(arguments)
    if not args.write:
        print(settings())
        return 0
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: settings written")
    return 0


def updated(page: str) -> str:
    """Return the text of the page with the table of today between its two markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE} must hold {BEGIN} and {END}")
    return f"{before}{begin}\n{settings()}\n{end}{after}"


def settings() -> str:
    """Return a table for each section of the schema and for each part of each slot."""
    hints = typing.get_type_hints(RunConfig)
    sections = ["### seed and sections\n\n" + table(RunConfig, "")]
    for field in dataclasses.fields(RunConfig):
        if field.name in SLOTS:
            for name, part in parts(field.name):
                sections.append(section(f"{field.name}.name: {name}", part, field.name))
        elif dataclasses.is_dataclass(hints[field.name]):
            sections.append(section(field.name, hints[field.name], field.name))
    return "\n\n".join(sections)


def parts(slot: str) -> Iterator[tuple[str, type]]:
    """Yield name and configuration of each part of a slot; a module that registers none is passed over."""
    for name in available(slot):
        with contextlib.suppress(HarkenError):
            yield name, find(slot, name).config


def section(title: str, cls: type, path: str) -> str:
    """Return a heading, what the dataclass says of itself, and its table."""
    about = one_line(inspect.getdoc(cls) or "")
    return f"### {title}\n\n{about}\n\n{table(cls, path)}"


def table(cls: type, path: str) -> str:
    """Return a Markdown table of a dataclass: key, type, default, and the docstring under each field."""
    hints, about = typing.get_type_hints(cls), field_docstrings(cls)
    rows = ["| key | type | default | meaning, source |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if field.name == "name" and path in SLOTS:
            continue
        key = f"{path}.{field.name}" if path else field.name
        meaning = one_line(about.get(field.name, "")).replace("|", "\\|")
        rows.append(f"| `{key}` | {type_name(hints[field.name])} | {default(field)} | {meaning} |")
    return "\n".join(rows)


def field_docstrings(cls: type) -> dict[str, str]:
    """Return the string that stands under each field in the source, which Python itself throws away.

    Inherited fields have those of their base; a field that is declared anew has its own or none, as its default is new.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found.update(own_docstrings(base))
    return found


def own_docstrings(cls: type) -> dict[str, str]:
    """Return the string under each field that a class itself declares, empty where there is none."""
    (body,) = [node for node in ast.parse(inspect.getsource(cls)).body if isinstance(node, ast.ClassDef)]
    found = {}
    for field, after in itertools.zip_longest(body.body, body.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = after.value if isinstance(after, ast.Expr) else None
            found[field.target.id] = str(text.value) if isinstance(text, ast.Constant) else ""
    return found


def type_name(hint: object) -> str:
    """Return a type as a user writes its values: `list of float`, `int or null`, `0, 1, 2 or 3`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join([", ".join(map(str, inner[:-1])), str(inner[-1])])
    if origin is tuple:
        return f"list of {type_name(inner[0])}"
    words = [
        word for option in inner if typing.get_origin(option) is typing.Literal for word in typing.get_args(option)
    ]
    if words:
        return " or ".join([type_name(inner[0]), *words])
    if type(None) in inner:
        return f"{type_name(inner[0])} or null"
    if origin is dict:
        return "group"
    return "group" if dataclasses.is_dataclass(hint) else str(getattr(hint, "__name__", hint))


def default(field: dataclasses.Field[object]) -> str:
    """Return a field's default as YAML has it."""
    if field.default is not dataclasses.MISSING:
        return f"`{yaml(field.default)}`"
    if field.default_factory is dataclasses.MISSING:
        return "must be given"
    made = field.default_factory()
    return "its defaults" if dataclasses.is_dataclass(made) else f"`{yaml(made)}`"


def yaml(value: object) -> str:
    """Return a plain value as YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(yaml, value))}]"
    return str(value)


def one_line(text: str) -> str:
    """Return a text without its line breaks."""
    return re.sub(r"\s+", " ", text).strip()


if __name__ == "__main__":
    sys.exit(main())
