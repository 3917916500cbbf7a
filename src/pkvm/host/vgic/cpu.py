# SPDX-License-Identifier: GPL-2.0-or-later
"""A vCPU's share of the interrupt controller: its private interrupts and its list registers.

The list has every interrupt that the vCPU's list registers should hold, and no
other: those that are pending and enabled, and those that are active. It is empty
most of the time, and then an entry to the guest costs one look at it. Before an
entry `flush` writes the list registers to the vCPU's page, from where EL2 takes
them; after it `fold` reads what the guest has made of them. Between the two the
kernel lock is held: nothing else changes an interrupt meanwhile.

If there are more interrupts than list registers, the most urgent pending one
has the first and the active ones come before the rest; maintenance interrupts
then say when a pending one is missing or the guest has ended an active one that
is not there. Of several such the most urgent is taken to have ended: right as
long as the guest ends interrupts in the order of their priorities (EOI mode 0).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from pkvm.arm64.gic import (
    HCR_EOICOUNT,
    HCR_EOICOUNT_SHIFT,
    HCR_LRENPIE,
    HCR_NPIE,
    LR_ACTIVE,
    LR_EOI,
    LR_GROUP1,
    LR_PENDING,
    LR_PRIORITY_SHIFT,
    LR_STATE,
    VMCR,
)
from pkvm.arm64.gicv3 import NR_PRIVATE, PHYSICAL_TIMER_INTID, VIRTUAL_TIMER_INTID
from pkvm.arm64.registers import mpidr_of_vcpu_id
from pkvm.host.vgic.irq import Irq
from pkvm.hyp.abi import HostVcpu

if TYPE_CHECKING:
    from pkvm.host.vcpu import Vcpu
    from pkvm.host.vgic.gic import Gic

_GROUP_ENABLES = (VMCR["VENG0"].mask, VMCR["VENG1"].mask)
_MPIDR_AFFINITY = 0xFF_FFFF
_PACKED = [struct.Struct(f"<{count}Q") for count in range(17)]


class GicCpu:
    """The redistributor and list registers of `vcpu`; `nr_lrs` is how many there are."""

    def __init__(self, gic: Gic, vcpu: Vcpu, nr_lrs: int) -> None:
        self.gic = gic
        self.vcpu = vcpu
        self.affinity = mpidr_of_vcpu_id(vcpu.id) & _MPIDR_AFFINITY
        self.private = [Irq(intid, self) for intid in range(NR_PRIVATE)]
        self.vtimer = self.private[VIRTUAL_TIMER_INTID]
        self.ptimer = self.private[PHYSICAL_TIMER_INTID]
        self.listed: list[Irq] = vcpu.irqs
        """The same list as the vCPU's, which an entry looks at."""
        self.frames: int | None = None
        """IPA of the redistributor."""
        self.is_last = False
        """No redistributor follows in the same run of frames (GICR_TYPER.Last)."""
        self.waiting = False
        """The vCPU sleeps until an interrupt is for it."""
        self.stale = True
        """The page's list registers are not what the list asks for."""
        self._nr_lrs = nr_lrs
        self._ran_with_timer = False
        self._shown: list[Irq] = []
        """What the page's list registers hold, in order."""
        self._words: tuple[int, ...] = ()
        self._control = 0
        """The maintenance interrupts that EL2 is asked for."""

    def flush(self, *, look: bool = True) -> int:
        """Make the page's list registers what they should be; how many the vCPU enters with.
        Without `look` a virtual timer that asserted its interrupt is taken to do so still: good
        enough between two accesses to a device, of which a guest that prints makes thousands."""
        if self._ran_with_timer and look:
            self._ask_timer()
        if self.stale:
            self._fill()
        return len(self._shown)

    def _ask_timer(self) -> None:
        """The guest ran with its timer's interrupt pending. It may have set the timer anew without
        taking that. Once after each run: it makes no difference how often `flush` is called."""
        self._ran_with_timer = False
        vtimer = self.vtimer
        if vtimer.level and not vtimer.active and vtimer.sample is not None:
            self.gic.set_level(vtimer, vtimer.sample())

    def fold(self, nr_lrs: int) -> None:
        """Take over what the guest did to the `nr_lrs` interrupts that it was entered with."""
        vcpu = self.vcpu
        self._ran_with_timer = self.vtimer.home is self
        packed = _PACKED[nr_lrs]
        at = vcpu.page + HostVcpu.VGIC_LR
        words = packed.unpack(vcpu.vm.host.bus.read(at, packed.size))
        if words != self._words:
            before, self._words = self._words, words
            self.stale = True
            for irq, old, new in zip(self._shown, before, words, strict=True):
                if old != new:
                    self._changed(irq, old, new)
        if self._control:
            self._end_others(vcpu.word(HostVcpu.VGIC_HCR))

    def deliverable(self) -> bool:
        """Whether the CPU interface would signal an interrupt, as far as the host knows: pending,
        enabled, in an enabled group and of higher priority than the mask. The running priority
        is EL2's."""
        if not self.listed:
            return False
        vmcr = self.vcpu.word(HostVcpu.VGIC_VMCR)
        mask = VMCR["VPMR"].get(vmcr)
        return any(
            irq.priority < mask and vmcr & _GROUP_ENABLES[irq.group]
            for irq in self.listed
            if not irq.active
        )

    def kick(self) -> None:
        """An interrupt for this vCPU has come: wake it if it waits and could take it."""
        if self.waiting and self.deliverable():
            self.waiting = False
            host = self.vcpu.vm.host
            host.timers.woken(self)
            host.sched.wake(self.vcpu.runner)

    def forget(self) -> None:
        """The vCPU was reset: its page holds nothing, and its CPU interface has forgotten which
        interrupts are active."""
        self.stale = True
        self._words = ()
        self._shown = []
        self._control = 0

    def _fill(self) -> None:
        listed = self.listed
        control = 0
        shown = listed
        if len(listed) > self._nr_lrs:
            shown, control = self._choose()
        self._shown = shown[:]
        words = self._words = tuple(self._word(irq) for irq in shown)
        vcpu = self.vcpu
        if words:
            packed = _PACKED[len(words)]
            vcpu.vm.host.bus.write(vcpu.page + HostVcpu.VGIC_LR, packed.pack(*words))
        if control or self._control:
            vcpu.set_word(HostVcpu.VGIC_HCR, control)
            self._control = control
        # With EOIcount in it, the control word must be written again each time.
        self.stale = bool(control)

    def _choose(self) -> tuple[list[Irq], int]:
        """More interrupts than list registers: those to show, and the maintenance interrupts."""
        by_priority = sorted(self.listed, key=lambda irq: (irq.priority, irq.intid))
        active = [irq for irq in by_priority if irq.active]
        waiting = [irq for irq in by_priority if not irq.active]
        order = waiting[:1] + active + waiting[1:]
        shown, others = order[: self._nr_lrs], order[self._nr_lrs :]
        control = HCR_LRENPIE if any(irq.active for irq in others) else 0
        if any(not irq.active for irq in others):
            control |= HCR_NPIE
        return shown, control

    def _word(self, irq: Irq) -> int:
        """The list register for an interrupt. A level that is high is looked at again when the
        guest deactivates the interrupt, so it is never pending and active at the same time."""
        word = irq.intid | irq.priority << LR_PRIORITY_SHIFT
        if irq.group:
            word |= LR_GROUP1
        if irq.active:
            word |= LR_ACTIVE
        if irq.edge:
            return word | LR_PENDING if irq.latch and self._may_pend(irq) else word
        if irq.level:
            word |= LR_EOI
        return word if irq.active else word | LR_PENDING

    def _may_pend(self, irq: Irq) -> bool:
        return irq.enabled and self.gic.forwards(irq)

    def _changed(self, irq: Irq, old: int, new: int) -> None:
        """The guest changed the list register of `irq`: it took the interrupt, or ended it."""
        irq.active = bool(new & LR_ACTIVE)
        if old & LR_PENDING and not new & LR_PENDING:
            irq.latch = False
        if not new & LR_STATE:
            self._ended(irq)
        self.gic.update(irq)

    def _ended(self, irq: Irq) -> None:
        """The guest has handled the interrupt: what is its input now?"""
        if irq.edge:
            return
        if irq.sample is not None:
            irq.level = irq.sample()
        elif irq.lowered is not None and irq.level:
            irq.level = False
            irq.lowered()

    def _end_others(self, hcr: int) -> None:
        """So many active interrupts ended that were not in list registers."""
        count = (hcr & HCR_EOICOUNT) >> HCR_EOICOUNT_SHIFT
        others = [irq for irq in self.listed if irq.active and irq not in self._shown]
        others.sort(key=lambda irq: (irq.priority, irq.intid))
        for irq in others[:count]:
            irq.active = False
            self._ended(irq)
            self.gic.update(irq)
