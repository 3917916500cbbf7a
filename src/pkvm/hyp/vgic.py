# SPDX-License-Identifier: GPL-2.0-or-later
"""EL2's part of the interrupt controller: list registers from the host, state of the vCPU's own.

The host emulates distributor and redistributors, and decides which virtual
interrupts are pending: they stand in its page of the vCPU when it calls VCPU_RUN
(`HostVcpu.VGIC_LR`, VGIC_HCR). EL2 copies as many as there are list registers,
once, and clears what the host has no say in. After the run the host gets them
back in the same place, with ICH_VMCR_EL2, ICH_MISR_EL2 and EOIcount. Active
priorities stay with EL2.

What has not changed is not moved. A run with no list register, in which the
guest leaves the interface alone, costs nothing and writes nothing.
"""

from __future__ import annotations

from pkvm.arm64 import gic as g
from pkvm.arm64.bits import MASK64
from pkvm.hyp.abi import HostVcpu
from pkvm.hyp.vcpu import Vcpu
from pkvm.machine.gic import VirtualCpuInterface

_HCR, _VMCR, _MISR, _LR = (
    offset >> 3
    for offset in (
        HostVcpu.VGIC_HCR,
        HostVcpu.VGIC_VMCR,
        HostVcpu.VGIC_MISR,
        HostVcpu.VGIC_LR,
    )
)
_ALLOWED = (
    g.LR_STATE | g.LR_GROUP1 | g.PRIORITY_MASK << g.LR_PRIORITY_SHIFT | g.LR_EOI | g.INTID_MASK
)
"""Bits of a list register that mean something here, with HW clear."""
_ALLOWED_WITH_HW = _ALLOWED & ~g.LR_PINTID
"""With HW set, EOI is a bit of a physical interrupt's number."""
_SHOWN_HCR = g.HCR_MAINTENANCE | g.HCR_EOICOUNT


class VirtualGic:
    """The virtual CPU interface of the physical CPU, as EL2 handles it.

    `load` must be called before a run for which the host has list registers, or if there are some
    `loaded`; `publish` after a run that left `VirtualCpuInterface.changed` set.
    """

    def __init__(self, interface: VirtualCpuInterface) -> None:
        self._interface = interface
        self.loaded: list[int] = []
        """The list registers as the host's page has them, if it has not touched them since."""
        self._hcr = 0
        """Its VGIC_HCR likewise."""
        self._loads = 0
        """`VirtualCpuInterface.loads` then: a reset of the vCPU empties the list registers."""

    def load(self, vcpu: Vcpu, nr_lrs: int) -> None:
        """Before the resident vCPU runs: `nr_lrs` list registers from the host's page."""
        interface, page = self._interface, vcpu.page
        nr = min(nr_lrs & MASK64, g.LIST_REGISTERS)
        lrs = page[_LR : _LR + nr].tolist()
        hcr = page[_HCR] if nr else 0
        dirt = hcr & ~g.HCR_MAINTENANCE
        same = lrs == self.loaded and hcr == self._hcr and interface.loads == self._loads
        if same and not dirt and not interface.misr:
            return
        clean = [lr & (_ALLOWED_WITH_HW if lr & g.LR_HW else _ALLOWED) for lr in lrs]
        interface.load(clean, hcr)
        if dirt or clean != lrs:
            interface.changed = True
        self.loaded, self._hcr, self._loads = lrs, hcr, interface.loads

    def publish(self, vcpu: Vcpu) -> None:
        """After the run: give the list registers back, and what the guest made of the rest."""
        interface, page, nr = self._interface, vcpu.page, len(self.loaded)
        lrs, hcr = interface.lr[:nr], interface.hcr & _SHOWN_HCR
        for index, lr in enumerate(lrs, start=_LR):
            page[index] = lr
        page[_HCR] = hcr
        page[_VMCR] = interface.vmcr
        page[_MISR] = interface.misr
        interface.fetched()
        self.loaded, self._hcr = lrs, hcr if nr else 0

    def save(self, vcpu: Vcpu) -> None:
        """The vCPU leaves the CPU."""
        interface = self._interface
        vcpu.vgic_vmcr = interface.vmcr
        vcpu.vgic_ap0r = interface.ap0r
        vcpu.vgic_ap1r = interface.ap1r

    def restore(self, vcpu: Vcpu) -> None:
        """The vCPU comes to the CPU, with no interrupt pending yet."""
        self._interface.load_context(vcpu.vgic_vmcr, vcpu.vgic_ap0r, vcpu.vgic_ap1r)
        self.loaded, self._hcr = [], 0

    def forget(self) -> None:
        """Nothing of any vCPU stays."""
        self._interface.load_context(0, 0, 0)
        self.loaded, self._hcr = [], 0
