# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's loads and stores to the interrupt controller, served inside the host."""

from __future__ import annotations

from pkvm.arm64.gicv3 import DISTRIBUTOR_BYTES, REDISTRIBUTOR_BYTES
from pkvm.host.vgic.gic import Gic
from pkvm.host.vgic.registers import Frame


def frame_at(gic: Gic | None, ipa: int) -> tuple[Frame, int] | None:
    """The frame that has `ipa`, and the offset in it; None if that is none of the GIC's."""
    if gic is None:
        return None
    if gic.distributor is not None and 0 <= ipa - gic.distributor < DISTRIBUTOR_BYTES:
        return Frame(gic, None), ipa - gic.distributor
    for cpu in gic.cpus:
        if cpu.frames is not None and 0 <= ipa - cpu.frames < REDISTRIBUTOR_BYTES:
            return Frame(gic, cpu), ipa - cpu.frames
    return None
