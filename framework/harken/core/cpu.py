"""What a CPU can do. Imports nothing, since `harken doctor` asks before it knows that anything is installed."""

from __future__ import annotations

import re
from pathlib import Path

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "svebf16"}  # x86 and ARM


def bf16_instructions(cpuinfo: str | Path = "/proc/cpuinfo") -> list[str]:
    """Return the names of the CPU's bf16 instructions as Linux lists them; none where it has none or is not asked so.

    Without one, bf16 is emulated: slower than fp32.
    """
    path = Path(cpuinfo)
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return sorted(set(flags.group(1).split()) & _BF16_FLAGS) if flags else []
