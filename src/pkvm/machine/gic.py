# SPDX-License-Identifier: GPL-2.0-or-later
"""The virtual CPU interface of the CPU: list registers and what a guest does with them.

GIC architecture (IHI 0069), chapters 4.8 and 6 and the register descriptions in
12.4 and 12.5. EL2 puts virtual interrupts into list registers; the guest
acknowledges and ends them through ICC_*_EL1 without EL2. The interface drives
the CPU's virtual IRQ line (group 1) and virtual FIQ line (group 0), and asks for
EL2 by a maintenance interrupt. There is no physical CPU interface.

Chosen where the architecture leaves a choice: of equal priorities the list
register with the lowest number comes first; an EOI without an active priority
has no effect at all; a DIR write with EOImode 0 has none; SEIs, EL2's traps in
ICH_HCR_EL2 and direct injection do not exist.

Everything here belongs to the thread that runs the guest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pkvm.arm64 import gic as g
from pkvm.arm64 import registers as r

_INVALID, _PENDING, _ACTIVE = 0, g.LR_PENDING, g.LR_ACTIVE
_STATE = g.LR_STATE
_PRIORITY_SHIFT = g.LR_PRIORITY_SHIFT
_LOW_BITS = 8 - g.PRIORITY_BITS
_AP_MASK = (1 << (1 << g.PRIORITY_BITS)) - 1
_EOI_DONE = g.LR_STATE | g.LR_HW | g.LR_EOI
"""What says that a list register's interrupt has ended and EL2 wants to know."""
_MAX_EOICOUNT = g.HCR_EOICOUNT >> g.HCR_EOICOUNT_SHIFT
_INTID_WRITE = 0xFF_FFFF
_RES1_VMCR = g.VMCR["VFIQEn"].mask


class GuestRegister(NamedTuple):
    """An ICC_*_EL1 register as the guest has it; None: that direction is UNDEFINED."""

    register: r.SysReg
    read: Callable[[], int] | None
    write: Callable[[int], None] | None


class VirtualCpuInterface:
    """The interface. `drive(irq, fiq)` sets the levels of the virtual lines; `maintain()` is a
    maintenance interrupt, called whenever one is asserted after a change.

    `lr` are the list registers. `changed`: the state is not what EL2 loaded or fetched last, or a
    maintenance interrupt was asserted. `loads` counts how often the list registers were loaded.
    """

    def __init__(self, drive: Callable[[bool, bool], None], maintain: Callable[[], None]) -> None:
        self._drive = drive
        self._maintain = maintain
        self.changed = False
        self.loads = 0
        self.lr = [0] * g.LIST_REGISTERS
        self._enables = 0
        self._watched = False
        self.eoicount = 0
        self.enabled = False
        self._program(0, 0, 0)

    # EL2

    @property
    def vmcr(self) -> int:
        """ICH_VMCR_EL2."""
        return (
            self._enabled[0]
            | self._enabled[1] << 1
            | _RES1_VMCR
            | self._cbpr << 4
            | self._eoimode << 9
            | self._bpr[1] << 18
            | self._bpr[0] << 21
            | self._pmr << 24
        )

    @property
    def ap0r(self) -> int:
        """ICH_AP0R0_EL2: group 0's active priorities."""
        return self._ap[0]

    @property
    def ap1r(self) -> int:
        """ICH_AP1R0_EL2: group 1's active priorities."""
        return self._ap[1]

    @property
    def hcr(self) -> int:
        """ICH_HCR_EL2."""
        return int(self.enabled) | self._enables | self.eoicount << g.HCR_EOICOUNT_SHIFT

    @property
    def misr(self) -> int:
        """ICH_MISR_EL2: reasons for a maintenance interrupt that are asserted."""
        if not self._watched:
            return 0
        enables = self._enables
        reasons = g.MISR_EOI if self.eisr else 0
        if enables:
            group0, group1 = self._enabled
            valid = sum(1 for lr in self.lr if lr & _STATE)
            for reason, enable, condition in (
                (g.MISR_U, g.HCR_UIE, valid <= 1),
                (g.MISR_LRENP, g.HCR_LRENPIE, self.eoicount),
                (g.MISR_NP, g.HCR_NPIE, not any(lr & _STATE == _PENDING for lr in self.lr)),
                (g.MISR_VGRP0E, g.HCR_VGRP0EIE, group0),
                (g.MISR_VGRP0D, g.HCR_VGRP0DIE, not group0),
                (g.MISR_VGRP1E, g.HCR_VGRP1EIE, group1),
                (g.MISR_VGRP1D, g.HCR_VGRP1DIE, not group1),
            ):
                if enables & enable and condition:
                    reasons |= reason
        return reasons

    @property
    def eisr(self) -> int:
        """ICH_EISR_EL2: list registers whose interrupt has ended and that asked to be told."""
        return sum(1 << n for n, lr in enumerate(self.lr) if lr & _EOI_DONE == g.LR_EOI)

    @property
    def elrsr(self) -> int:
        """ICH_ELRSR_EL2: list registers that are free."""
        return sum(
            1 << n
            for n, lr in enumerate(self.lr)
            if not lr & _STATE and (lr & g.LR_HW or not lr & g.LR_EOI)
        )

    def load(self, lrs: Sequence[int], enables: int) -> None:
        """Enable the interface (ICH_HCR_EL2.En) with these list registers from 0 on, the others
        empty, EOIcount 0, and the maintenance interrupts that `enables` has (HCR_MAINTENANCE)."""
        self.lr[:] = (*lrs, *[0] * (g.LIST_REGISTERS - len(lrs)))
        self._enables = enables & g.HCR_MAINTENANCE
        self._watched = bool(self._enables) or any(lr & g.LR_EOI for lr in lrs)
        self.eoicount = 0
        self.enabled = True
        self.changed = False
        self.loads += 1
        self._update()

    def load_context(self, vmcr: int, ap0r: int, ap1r: int) -> None:
        """Become the interface of another vCPU, enabled, with ICH_VMCR_EL2, ICH_AP0R0_EL2 and
        ICH_AP1R0_EL2 (all 0: as reset) and no list register in use."""
        self._program(vmcr, ap0r, ap1r)
        self.load((), 0)

    def fetched(self) -> None:
        """EL2 has fetched the state: EOIcount starts from 0."""
        self.eoicount = 0
        self.changed = False

    def _program(self, vmcr: int, ap0r: int, ap1r: int) -> None:
        self._enabled = [vmcr & 1, vmcr >> 1 & 1]
        self._cbpr = vmcr >> 4 & 1
        self._eoimode = vmcr >> 9 & 1
        self._bpr = [
            max(vmcr >> 21 & 7, g.BPR0_MINIMUM),
            max(vmcr >> 18 & 7, g.BPR1_MINIMUM),
        ]
        self._pmr = vmcr >> 24 & g.PRIORITY_MASK
        self._ap = [ap0r & _AP_MASK, ap1r & _AP_MASK]

    # The guest

    def guest_registers(self) -> list[GuestRegister]:
        """Every register of the guest's that the interface serves."""
        return [
            GuestRegister(r.ICC_IAR0_EL1, lambda: self._acknowledge(0), None),
            GuestRegister(r.ICC_IAR1_EL1, lambda: self._acknowledge(1), None),
            GuestRegister(r.ICC_EOIR0_EL1, None, lambda value: self._end(0, value)),
            GuestRegister(r.ICC_EOIR1_EL1, None, lambda value: self._end(1, value)),
            GuestRegister(r.ICC_HPPIR0_EL1, lambda: self._highest_pending(0), None),
            GuestRegister(r.ICC_HPPIR1_EL1, lambda: self._highest_pending(1), None),
            GuestRegister(r.ICC_BPR0_EL1, lambda: self._bpr[0], self._write_bpr0),
            GuestRegister(r.ICC_BPR1_EL1, self._read_bpr1, self._write_bpr1),
            GuestRegister(
                r.ICC_AP0R0_EL1, lambda: self._ap[0], lambda value: self._write_ap(0, value)
            ),
            GuestRegister(
                r.ICC_AP1R0_EL1, lambda: self._ap[1], lambda value: self._write_ap(1, value)
            ),
            GuestRegister(r.ICC_DIR_EL1, None, self._write_dir),
            GuestRegister(r.ICC_RPR_EL1, self._running_priority, None),
            GuestRegister(r.ICC_CTLR_EL1, self._read_ctlr, self._write_ctlr),
            GuestRegister(
                r.ICC_IGRPEN0_EL1,
                lambda: self._enabled[0],
                lambda value: self._write_enable(0, value),
            ),
            GuestRegister(
                r.ICC_IGRPEN1_EL1,
                lambda: self._enabled[1],
                lambda value: self._write_enable(1, value),
            ),
            GuestRegister(r.ICC_PMR_EL1, lambda: self._pmr, self._write_pmr),
        ]

    def _acknowledge(self, group: int) -> int:
        """ICC_IAR0/1_EL1."""
        index = self._candidate()
        if index < 0:
            return g.SPURIOUS
        lr = self.lr[index]
        if (1 if lr & g.LR_GROUP1 else 0) != group or not self._preempts(lr):
            return g.SPURIOUS
        intid = lr & g.INTID_MASK
        if g.FIRST_SPECIAL <= intid <= g.SPURIOUS:
            self.lr[index] = lr & ~_STATE
        else:
            priority = lr >> _PRIORITY_SHIFT & 0xFF & self._group_mask(group)
            self._ap[group] |= 1 << (priority >> _LOW_BITS)
            self.lr[index] = lr & ~_STATE | (_ACTIVE if intid < g.FIRST_LPI else _INVALID)
        self._change()
        return intid

    def _end(self, group: int, value: int) -> None:
        """ICC_EOIR0/1_EL1: priority drop, and deactivation if EOImode is 0."""
        intid = value & _INTID_WRITE
        if g.FIRST_SPECIAL <= intid <= g.SPURIOUS:
            return
        dropped = self._drop_priority()
        if dropped is None:
            return
        if not self._eoimode and intid < g.FIRST_LPI:
            index = self._find_active(intid)
            if index < 0:
                self._count_eoi()
            else:
                lr = self.lr[index]
                own = lr >> _PRIORITY_SHIFT & 0xFF & self._group_mask(group)
                if (1 if lr & g.LR_GROUP1 else 0) == group and own == dropped:
                    self.lr[index] = lr & ~_ACTIVE
        self._change()

    def _write_dir(self, value: int) -> None:
        """ICC_DIR_EL1: deactivation, with EOImode 1."""
        intid = value & _INTID_WRITE
        if not self._eoimode or intid >= g.FIRST_LPI or g.FIRST_SPECIAL <= intid <= g.SPURIOUS:
            return
        index = self._find_active(intid)
        if index < 0:
            self._count_eoi()
        else:
            self.lr[index] &= ~_ACTIVE
        self._change()

    def _highest_pending(self, group: int) -> int:
        """ICC_HPPIR0/1_EL1: whatever the priority mask and the running priority."""
        index = self._candidate()
        if index < 0 or (1 if self.lr[index] & g.LR_GROUP1 else 0) != group:
            return g.SPURIOUS
        return self.lr[index] & g.INTID_MASK

    def _running_priority(self) -> int:
        """ICC_RPR_EL1: the highest group priority that is active."""
        active = self._ap[0] | self._ap[1]
        if not active:
            return g.IDLE_PRIORITY
        return (active & -active).bit_length() - 1 << _LOW_BITS

    def _read_ctlr(self) -> int:
        return self._cbpr | self._eoimode << 1 | g.CTLR_PRIBITS

    def _write_ctlr(self, value: int) -> None:
        self._cbpr, self._eoimode = value & 1, value >> 1 & 1
        self._change()

    def _write_enable(self, group: int, value: int) -> None:
        self._enabled[group] = value & 1
        self._change()

    def _write_pmr(self, value: int) -> None:
        self._pmr = value & g.PRIORITY_MASK
        self._change()

    def _write_bpr0(self, value: int) -> None:
        self._bpr[0] = max(value & 7, g.BPR0_MINIMUM)
        self._change()

    def _read_bpr1(self) -> int:
        return min(self._bpr[0] + 1, 7) if self._cbpr else self._bpr[1]

    def _write_bpr1(self, value: int) -> None:
        if not self._cbpr:
            self._bpr[1] = max(value & 7, g.BPR1_MINIMUM)
            self._change()

    def _write_ap(self, group: int, value: int) -> None:
        self._ap[group] = value & _AP_MASK
        self._change()

    # The state behind

    def _change(self) -> None:
        self.changed = True
        self._update()

    def _update(self) -> None:
        """Drive the lines as the state is now, and ask for EL2 if it wants to know."""
        index = self._candidate()
        if index >= 0 and self._preempts(self.lr[index]):
            irq = bool(self.lr[index] & g.LR_GROUP1)
            self._drive(irq, not irq)
        else:
            self._drive(False, False)
        if self._watched and self.enabled and self.misr:
            self.changed = True
            self._maintain()

    def _candidate(self) -> int:
        """The list register with the highest-priority pending interrupt of an enabled group;
        negative: none."""
        if not self.enabled:
            return -1
        best, found = 0x100, -1
        for index, lr in enumerate(self.lr):
            if lr & _STATE == _PENDING and self._enabled[1 if lr & g.LR_GROUP1 else 0]:
                priority = lr >> _PRIORITY_SHIFT & 0xFF
                if priority < best:
                    best, found = priority, index
        return found

    def _preempts(self, lr: int) -> bool:
        """Whether the priority mask and the running priority let this interrupt be signalled."""
        priority = lr >> _PRIORITY_SHIFT & 0xFF
        if priority >= self._pmr:
            return False
        return priority & self._group_mask(1 if lr & g.LR_GROUP1 else 0) < self._running_priority()

    def _group_mask(self, group: int) -> int:
        """The bits of a priority that decide about preemption, by the binary point."""
        if group and not self._cbpr:
            return 0xFF << self._bpr[1] & 0xFF
        return 0xFF << self._bpr[0] + 1 & 0xFF

    def _drop_priority(self) -> int | None:
        """Clear the highest active priority of both groups; which one it was, None: none."""
        group0, group1 = self._ap
        active = group0 | group1
        if not active:
            return None
        bit = active & -active
        self._ap[0 if group0 & bit else 1] &= ~bit
        return bit.bit_length() - 1 << _LOW_BITS

    def _find_active(self, intid: int) -> int:
        for index, lr in enumerate(self.lr):
            if lr & _ACTIVE and lr & g.LR_VINTID == intid:
                return index
        return -1

    def _count_eoi(self) -> None:
        """A deactivation of what no list register holds."""
        self.eoicount = self.eoicount + 1 & _MAX_EOICOUNT
