# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory that EL2 keeps for ownership, beside page tables: bytes a page of RAM."""

from __future__ import annotations

from collections.abc import Iterator

from common import Result
from pkvm.hyp.vmemmap import vmemmap_bytes

RAM = 1 << 30


def measure() -> Iterator[Result]:
    """The one figure of this file."""
    per_page = vmemmap_bytes(RAM) / (RAM // 4096)
    yield Result("ownership-bytes-a-page", per_page, 8, "records in the carve-out, beside tables")
