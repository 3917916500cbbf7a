# SPDX-License-Identifier: GPL-2.0-or-later
"""The runs of real kernels that come with pkvm: `pkvm compare --record FILE` makes one."""

from __future__ import annotations

from pathlib import Path

from pkvm.check.scenarios import record

STOCK = "linux-7.3.4-cortex-a72"
"""Debian's stock kernel in protected mode, on QEMU's Cortex-A72."""


def load(name: str = STOCK) -> record.Record:
    """A run by its name. Raises RecordError, OSError."""
    return record.load(Path(__file__).with_name(f"{name}.json"))
