"""Figures as SVG that the page holds inline: they take its colours, in the light and in the dark theme."""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

WIDTH = 9.6  # inches, drawn at about 100 pixels an inch on a page 1000 pixels wide
# Colours that the page replaces by variables of its style sheet. The series are those of Okabe and Ito 2008, "Color
# universal design", which people with any colour vision can tell apart.
INK, FAINT = "#0a0b0c", "#0a0b0d"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    **{color: f"var(--s{place})" for place, color in enumerate(SERIES)},
}
_STYLE: dict[str, Any] = {
    "font.size": 8.0,
    "font.family": ["DejaVu Sans"],
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.3,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "image.composite_image": False,
    "figure.constrained_layout.use": True,
}


def page_style(more: dict[str, Any] | None = None) -> AbstractContextManager[None]:
    """Return a context in which matplotlib draws for the page; `more` is added to the settings."""
    settings: dict[Any, Any] = {**_STYLE, **(more or {})}
    return mpl.rc_context(settings)


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure as an `<svg>` element that scales to the page's width.

    name: unlike that of every other figure of the page; it keeps their inner references apart.
    """
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with page_style({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", body)
    body = re.sub(r" xmlns(:\w+)?=\"[^\"]*\"", "", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # hundredths of a point are finer than a screen; matplotlib writes millionths
    body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path.group()), body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, variable)
    return f'<svg role="img" aria-label="{escape(description)}" {box.group() if box else ""}>{body}'
