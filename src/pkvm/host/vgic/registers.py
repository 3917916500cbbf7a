# SPDX-License-Identifier: GPL-2.0-or-later
"""The registers of the distributor and the redistributors (IHI 0069, 12.9-12.11).

Two ways lead here: a guest's loads and stores, and a VMM's device attributes,
which mean the same but for what `Bits.user_read` and `Bits.user_write` say. An
access that no register has (its offset, its size, its alignment, an interrupt
that does not exist) reads as zero and writes nothing for a guest, and is no
attribute to a VMM.

As in Linux's KVM: everything is in group 1 at reset and SGIs are enabled;
redistributors are always awake; there are no LPIs, no message-based SPIs and no
routing to any one of the CPUs.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import NamedTuple

from pkvm.arm64 import gicv3 as g
from pkvm.arm64.gic import PRIORITY_MASK
from pkvm.host.vgic.cpu import GicCpu
from pkvm.host.vgic.gic import Gic
from pkvm.host.vgic.irq import Irq

_IMPLEMENTER_ARM = 0x43B
_PRODUCT_KVM = 0x4B
_IIDR = _PRODUCT_KVM << 24 | _IMPLEMENTER_ARM
_REVISION_SHIFT = 12
_REVISIONS = (2, 3)
_SPI_ID_BITS = 10
_BLOCK_SHIFT = 7
"""Registers for many interrupts start and end at multiples of 128 bytes."""
_WORD = 4
_EDGE = 2
"""ICFGR: bit 1 of an interrupt's two says edge-triggered."""

Read = Callable[[Irq], int]
Write = Callable[[Gic, Irq, int], None]


class Bits(NamedTuple):
    """Registers with `width` bits for each interrupt, from offset `start` on."""

    start: int
    end: int
    width: int
    read: Read
    write: Write
    user_read: Read | None = None
    user_write: Write | None = None
    sizes: tuple[int, ...] = (4,)


def _nothing(gic: Gic, irq: Irq, value: int) -> None:
    """Writes are ignored."""


def _zero(irq: Irq) -> int:
    return 0


def _set_group(gic: Gic, irq: Irq, value: int) -> None:
    irq.group = value
    gic.update(irq)


def _set_enable(gic: Gic, irq: Irq, value: int) -> None:
    if value and not irq.enabled:
        irq.enabled = True
        gic.update(irq)


def _clear_enable(gic: Gic, irq: Irq, value: int) -> None:
    if value and irq.enabled:
        irq.enabled = False
        gic.update(irq)


def _set_pending(gic: Gic, irq: Irq, value: int) -> None:
    if value and not irq.latch:
        irq.latch = True
        gic.update(irq)


def _clear_pending(gic: Gic, irq: Irq, value: int) -> None:
    """A level that is high keeps the interrupt pending."""
    if value and irq.latch:
        irq.latch = False
        gic.update(irq)


def _put_pending(gic: Gic, irq: Irq, value: int) -> None:
    irq.latch = bool(value)
    gic.update(irq)


def _set_active(gic: Gic, irq: Irq, value: int) -> None:
    if value and not irq.active:
        irq.active = True
        gic.update(irq)


def _clear_active(gic: Gic, irq: Irq, value: int) -> None:
    if value and irq.active:
        irq.active = False
        gic.update(irq)


def _set_priority(gic: Gic, irq: Irq, value: int) -> None:
    irq.priority = value & PRIORITY_MASK
    gic.update(irq)


def _set_config(gic: Gic, irq: Irq, value: int) -> None:
    """Of SPIs alone."""
    if irq.intid >= g.FIRST_SPI:
        irq.edge = bool(value & _EDGE)
        gic.update(irq)


def _is_enabled(irq: Irq) -> int:
    return int(irq.enabled)


def _is_pending(irq: Irq) -> int:
    return int(irq.pending)


def _is_active(irq: Irq) -> int:
    return int(irq.active)


BITS = (
    Bits(g.IGROUPR, g.ISENABLER, 1, lambda irq: irq.group, _set_group),
    Bits(g.ISENABLER, g.ICENABLER, 1, _is_enabled, _set_enable),
    Bits(g.ICENABLER, g.ISPENDR, 1, _is_enabled, _clear_enable),
    # A VMM sees and sets the latch; the level is an attribute of its own.
    Bits(
        g.ISPENDR, g.ICPENDR, 1, _is_pending, _set_pending, lambda irq: int(irq.latch), _put_pending
    ),
    Bits(g.ICPENDR, g.ISACTIVER, 1, _is_pending, _clear_pending, _zero, _nothing),
    Bits(g.ISACTIVER, g.ICACTIVER, 1, _is_active, _set_active),
    Bits(g.ICACTIVER, g.IPRIORITYR, 1, _is_active, _clear_active),
    Bits(g.IPRIORITYR, g.ITARGETSR, 8, lambda irq: irq.priority, _set_priority, sizes=(1, 4)),
    Bits(g.ITARGETSR, g.ITARGETSR_END, 8, _zero, _nothing, sizes=(1, 4)),
    Bits(g.ICFGR, g.ICFGR_END, 2, lambda irq: _EDGE * irq.edge, _set_config),
    Bits(g.IGRPMODR, g.IGRPMODR + 0x80, 1, _zero, _nothing),
)
_BY_BLOCK = {
    block: bits for bits in BITS for block in range(bits.start >> _BLOCK_SHIFT, bits.end >> 7)
}
_RD_WORDS = {
    g.GICR_CTLR, g.GICR_IIDR, g.GICR_TYPER, g.GICR_TYPER + 4, g.GICR_STATUSR, g.GICR_WAKER,
    g.GICR_PROPBASER, g.GICR_PROPBASER + 4, g.GICR_PENDBASER, g.GICR_PENDBASER + 4,
    g.GICR_INVLPIR, g.GICR_INVLPIR + 4, g.GICR_INVALLR, g.GICR_INVALLR + 4, g.GICR_SYNCR,
    *range(g.IDREGS, g.IDREGS_END, _WORD),
}  # fmt: skip
_DIST_WORDS = {
    g.GICD_CTLR, g.GICD_TYPER, g.GICD_IIDR, g.GICD_TYPER2, g.GICD_STATUSR,
    *range(g.IDREGS, g.IDREGS_END, _WORD),
}  # fmt: skip


class Frame:
    """The registers of the distributor (`cpu` is None), or of `cpu`'s redistributor."""

    def __init__(self, gic: Gic, cpu: GicCpu | None) -> None:
        self._gic = gic
        self._cpu = cpu

    def read(self, offset: int, size: int, *, user: bool = False) -> int:
        """Load `size` bytes (1, 2, 4 or 8) at byte `offset`; 0 where there is no register."""
        if offset % size:
            return 0
        place = self._place(offset)
        if place is not None:
            bits, irqs = place
            if size not in bits.sizes:
                return 0
            read = bits.user_read if user and bits.user_read else bits.read
            return sum(
                read(irq) << number * bits.width
                for number, irq in enumerate(irqs[: size * 8 // bits.width])
                if irq is not None
            )
        if size == 2 * _WORD:
            return self._wide_read(offset)
        return self._word(offset) if size == _WORD else 0

    def write(self, offset: int, size: int, value: int, *, user: bool = False) -> None:
        """Store; nothing happens where there is no register."""
        if offset % size:
            return
        place = self._place(offset)
        if place is not None:
            bits, irqs = place
            if size not in bits.sizes:
                return
            write = bits.user_write if user and bits.user_write else bits.write
            mask = (1 << bits.width) - 1
            for number, irq in enumerate(irqs[: size * 8 // bits.width]):
                if irq is not None:
                    write(self._gic, irq, value >> number * bits.width & mask)
        elif size == _WORD:
            self._write_word(offset, value)
        elif size == 2 * _WORD:
            self._write_router(offset, value)

    def has(self, offset: int) -> bool:
        """Whether a VMM may read and write a 32-bit word at `offset`."""
        if offset % _WORD:
            return False
        place = self._place(offset)
        if place is not None:
            # Linux: no access to interrupts beyond those that there are.
            return self._cpu is not None or place[1][0] is not None or self._is_private(offset)
        if self._cpu is not None:
            return offset in _RD_WORDS
        intid = (offset - g.GICD_IROUTER) // 8
        return offset in _DIST_WORDS or 0 <= intid < self._gic.nr_irqs

    def user_write(self, offset: int, value: int) -> None:
        """A VMM's write. Raises EINVAL where the value cannot be."""
        if self._cpu is None and offset == g.GICD_IIDR:
            revision = value >> _REVISION_SHIFT & 0xF
            if value & ~(0xF << _REVISION_SHIFT) != _IIDR or revision not in _REVISIONS:
                raise OSError(errno.EINVAL, f"GICD_IIDR {value:#x} is not one that KVM has had")
            self._gic.revision = revision
        elif self._cpu is None and offset == g.GICD_TYPER2 and value:
            raise OSError(errno.EINVAL, "GICD_TYPER2 is 0")
        else:
            self.write(offset, _WORD, value, user=True)

    # Registers for many interrupts

    def _place(self, offset: int) -> tuple[Bits, list[Irq | None]] | None:
        """The registers that have `offset`, and the interrupts from there on; None if it is one
        of its own."""
        cpu = self._cpu
        if cpu is not None:
            offset -= g.SGI_FRAME
            if offset < 0:
                return None
        bits = _BY_BLOCK.get(offset >> _BLOCK_SHIFT)
        if bits is None:
            return None
        first = (offset - bits.start) * 8 // bits.width
        count = 8 * _WORD // bits.width
        if cpu is not None:
            if first >= g.NR_PRIVATE:
                return None
            return bits, [*cpu.private[first : first + count]]
        return bits, [self._gic.irq(None, intid) for intid in range(first, first + count)]

    def _is_private(self, offset: int) -> bool:
        bits = _BY_BLOCK[offset >> _BLOCK_SHIFT]
        return (offset - bits.start) * 8 // bits.width < g.NR_PRIVATE

    # Registers of their own

    def _wide_read(self, offset: int) -> int:
        if self._cpu is not None:
            return self._typer(self._cpu) if offset == g.GICR_TYPER else 0
        irq = self._routed(offset)
        return irq.mpidr if irq is not None else 0

    def _word(self, offset: int) -> int:
        if offset == g.PIDR2:
            return g.PIDR2_GICV3
        if self._cpu is not None:
            return self._redistributor_word(self._cpu, offset)
        gic = self._gic
        if offset == g.GICD_CTLR:
            group0, group1 = gic.group_enables
            return g.CTLR.encode(EnableGrp0=group0, EnableGrp1=group1, ARE=1, DS=1)
        if offset == g.GICD_TYPER:
            return g.TYPER.encode(ITLinesNumber=gic.nr_irqs // 32 - 1, IDbits=_SPI_ID_BITS - 1)
        if offset == g.GICD_IIDR:
            return _IIDR | gic.revision << _REVISION_SHIFT
        irq = self._routed(offset)
        return irq.mpidr if irq is not None and not offset & _WORD else 0

    def _redistributor_word(self, cpu: GicCpu, offset: int) -> int:
        if offset == g.GICR_CTLR:
            return g.GICR_CTLR_IR | g.GICR_CTLR_CES if self._gic.revision >= _REVISIONS[1] else 0
        if offset == g.GICR_IIDR:
            return _IIDR
        if offset in (g.GICR_TYPER, g.GICR_TYPER + _WORD):
            return self._typer(cpu) >> 8 * (offset - g.GICR_TYPER) & 0xFFFF_FFFF
        return 0

    def _typer(self, cpu: GicCpu) -> int:
        return g.REDISTRIBUTOR_TYPER.encode(
            Last=cpu.is_last,
            Processor_Number=cpu.vcpu.id & 0xFFFF,
            Affinity_Value=cpu.affinity,
        )

    def _write_word(self, offset: int, value: int) -> None:
        """Affinity 3, the upper half of a GICD_IROUTER, cannot be written."""
        if self._cpu is None and offset == g.GICD_CTLR:
            group0, group1 = value & g.CTLR_ENABLE_GROUP0, value & g.CTLR_ENABLE_GROUP1
            self._gic.enable_groups(bool(group0), bool(group1))
        elif not offset & _WORD:
            self._write_router(offset, value)

    def _write_router(self, offset: int, value: int) -> None:
        irq = self._routed(offset)
        if irq is not None:
            self._gic.route(irq, value & g.AFFINITY_MASK)

    def _routed(self, offset: int) -> Irq | None:
        """The SPI whose GICD_IROUTER has `offset`."""
        if self._cpu is not None or not g.GICD_IROUTER <= offset < g.GICD_IROUTER_END:
            return None
        intid = (offset - g.GICD_IROUTER) // 8
        return self._gic.irq(None, intid) if intid >= g.FIRST_SPI else None
