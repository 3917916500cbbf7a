# SPDX-License-Identifier: GPL-2.0-or-later
"""A VM's interrupt controller: a GICv3 with affinity routing and one security state.

All of it is the host's, and so nothing that a protected guest may trust; the CPU
interface is the machine's. The kernel lock covers everything.

Life: made by KVM_CREATE_DEVICE; given its addresses and size by attributes; then
initialised (KVM_DEV_ARM_VGIC_CTRL_INIT), after which no vCPU can be made; its
registers answer from the first KVM_RUN on.
"""

from __future__ import annotations

import errno
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from pkvm.arm64.gicv3 import (
    DISTRIBUTOR_BYTES,
    FIRST_SPI,
    FRAME_BYTES,
    NR_PRIVATE,
    REDISTRIBUTOR_BYTES,
    sgi_targets,
)
from pkvm.host.host import IPA_BITS
from pkvm.host.vgic.cpu import GicCpu
from pkvm.host.vgic.irq import Irq

if TYPE_CHECKING:
    from pkvm.host.vcpu import Vcpu
    from pkvm.host.vm import Vm

DEFAULT_IRQS = 256
MAX_IRQS = 1023
"""KVM_DEV_ARM_VGIC_GRP_NR_IRQS: what Linux takes at most, so in steps of 32 up to 992."""
REVISION = 3
"""GICD_IIDR.Revision of Linux's."""
_IRM = 1 << 40
_SGI_INTID_SHIFT = 24
_SGI_INTID_MASK = 0xF


class Region(NamedTuple):
    """Where redistributors go. `room` 0 is the legacy single region, as long as it must be."""

    number: int
    base: int
    room: int


class Gic:
    """struct vgic_dist. `nr_lrs` is how many list registers the CPU has."""

    def __init__(self, vm: Vm, nr_lrs: int) -> None:
        self.vm = vm
        self._nr_lrs = nr_lrs
        self.cpus: list[GicCpu] = []
        """By vCPU index."""
        self.nr_irqs = 0
        """INTIDs, private ones included; 0: not said yet."""
        self.spis: list[Irq] = []
        self.initialised = False
        self.mapped = False
        """The registers answer."""
        self.distributor: int | None = None
        """IPA."""
        self.regions: list[Region] = []
        self.group_enables = [False, False]
        """GICD_CTLR.EnableGrp0 and 1."""
        self.revision = REVISION
        for vcpu in vm.vcpus.values():
            self.add_cpu(vcpu)

    # Setting up

    def add_cpu(self, vcpu: Vcpu) -> None:
        """A vCPU was made, before `initialise`. Raises EINVAL if there is no room for its
        redistributor where one should go."""
        cpu = GicCpu(self, vcpu, self._nr_lrs)
        self.cpus.append(cpu)
        try:
            self._place_redistributors()
        except OSError:
            self.cpus.pop()
            raise
        vcpu.gic = cpu
        self.vm.host.timers.attach(cpu)

    def forget_cpu(self, vcpu: Vcpu) -> None:
        """Undo `add_cpu` for the last vCPU."""
        if vcpu.gic is not None:
            self.vm.host.timers.detach(vcpu.gic)
            self.cpus.remove(vcpu.gic)
            self._place_redistributors()

    def set_nr_irqs(self, number: int) -> None:
        """So many INTIDs. Raises EINVAL unless a multiple of 32 from 64 on, EBUSY a second time."""
        if not NR_PRIVATE + 32 <= number <= MAX_IRQS or number % 32:
            raise OSError(errno.EINVAL, f"{number} interrupts: multiples of 32 from 64 to 992")
        if self.nr_irqs:
            raise OSError(errno.EBUSY, f"the number of interrupts is {self.nr_irqs} already")
        self.nr_irqs = number

    def set_distributor(self, ipa: int) -> None:
        """Where the distributor is. Raises EEXIST a second time, EINVAL, E2BIG."""
        if self.distributor is not None:
            raise OSError(errno.EEXIST, "the distributor has an address already")
        _check_range(ipa, DISTRIBUTOR_BYTES)
        self.distributor = ipa

    def add_region(self, index: int, base: int, count: int) -> None:
        """Where redistributors are, in regions from `index` 0 on, or all in one (`count` 0).

        Raises EINVAL for a wrong index, a mixture of both ways, or an overlap; EEXIST for a
        second single region; E2BIG.
        """
        size = (count or len(self.cpus)) * REDISTRIBUTOR_BYTES
        if base + size >> 64:
            raise OSError(errno.EINVAL, "the region wraps")
        if self.regions:
            last = self.regions[-1]
            if not count and not last.room:
                raise OSError(errno.EEXIST, "the redistributors have an address already")
            if not count:
                raise OSError(errno.EINVAL, "one region for all does not go with numbered ones")
        following = self.regions[-1].number + 1 if self.regions else 0
        if index != following:
            raise OSError(errno.EINVAL, f"the next region has index {following}")
        if (not count and self._meets_distributor(base, size)) or any(
            _overlap(base, size, region.base, self._size(region)) for region in self.regions
        ):
            raise OSError(errno.EINVAL, "the region overlaps another one")
        _check_range(base, size)
        self.regions.append(Region(index, base, count))
        try:
            self._place_redistributors()
        except OSError:
            self.regions.pop()
            self._place_redistributors()
            raise

    def initialise(self) -> None:
        """KVM_DEV_ARM_VGIC_CTRL_INIT. Again is nothing."""
        if self.initialised:
            return
        self.nr_irqs = self.nr_irqs or DEFAULT_IRQS
        boot = self.cpus[0] if self.cpus else None
        self.spis = [Irq(intid, boot) for intid in range(FIRST_SPI, self.nr_irqs)]
        self.initialised = True

    def map(self) -> None:
        """Before the first entry to the guest: the registers answer from now on.

        Raises ENXIO for a missing address, EINVAL for frames that overlap, EBUSY before
        `initialise`.
        """
        if self.mapped:
            return
        if any(cpu.frames is None for cpu in self.cpus):
            raise OSError(errno.ENXIO, "not every redistributor of the VM's GIC has an address")
        if self.distributor is None:
            raise OSError(errno.ENXIO, "the distributor of the VM's GIC has no address")
        self._check_bases()
        if not self.initialised:
            raise OSError(errno.EBUSY, "the VM's GIC is not initialised")
        self.mapped = True
        frames = [cpu.frames for cpu in self.cpus if cpu.frames is not None]
        self.vm.gic_start = min(self.distributor, *frames)
        self.vm.gic_end = max(
            self.distributor + DISTRIBUTOR_BYTES, max(frames) + REDISTRIBUTOR_BYTES
        )

    def close(self) -> None:
        """The device goes, mostly with its VM."""
        for cpu in self.cpus:
            self.vm.host.timers.detach(cpu)
            cpu.vcpu.gic = None

    # Interrupts

    def irq(self, cpu: GicCpu | None, intid: int) -> Irq | None:
        """An interrupt by number; of `cpu` if it is private. None if there is none."""
        if intid >= FIRST_SPI:
            index = intid - FIRST_SPI
            return self.spis[index] if index < len(self.spis) else None
        return None if cpu is None else cpu.private[intid]

    def cpu_at(self, affinity: int) -> GicCpu | None:
        """The CPU with this affinity (levels 2 to 0)."""
        for cpu in self.cpus:
            if cpu.affinity == affinity:
                return cpu
        return None

    def forwards(self, irq: Irq) -> bool:
        """Whether the distributor forwards the interrupt's group."""
        return self.group_enables[irq.group]

    def update(self, irq: Irq) -> None:
        """The state of `irq` has changed: it goes to the list where it belongs."""
        home = irq.home
        wanted: GicCpu | None = None
        if irq.active:
            wanted = home or irq.target
        elif irq.enabled and irq.pending and self.group_enables[irq.group]:
            wanted = irq.target
        if wanted is not home:
            irq.home = wanted
            if home is not None:
                home.listed.remove(irq)
                home.stale = True
            if wanted is not None:
                wanted.listed.append(irq)
        if wanted is not None:
            wanted.stale = True
            wanted.kick()

    def set_level(self, irq: Irq, level: bool) -> None:
        """The input of `irq` is at `level`."""
        if irq.level != level:
            irq.level = level
            self.update(irq)

    def inject(self, cpu: GicCpu | None, intid: int, level: bool) -> None:
        """Drive an interrupt's input from outside: KVM_IRQ_LINE, irqfd. An edge-triggered one
        takes every `level` 1 for an edge.

        Raises EBUSY before `initialise`, EINVAL for an interrupt that does not exist.
        """
        if not self.initialised:
            raise OSError(errno.EBUSY, "the VM's GIC is not initialised")
        irq = self.irq(cpu, intid)
        if irq is None:
            raise OSError(errno.EINVAL, f"the VM's GIC has no interrupt {intid}")
        if irq.sample is not None:
            return  # Its input is a timer's.
        if not irq.edge:
            self.set_level(irq, level)
        elif level:
            irq.latch = True
            self.update(irq)

    def send_sgi(self, sender: GicCpu, value: int, group1: bool) -> None:
        """A guest wrote `value` to ICC_SGI1R_EL1 (`group1`), which makes SGIs of either group, or
        to ICC_SGI0R_EL1 or ICC_ASGI1R_EL1, which make those of group 0."""
        intid = value >> _SGI_INTID_SHIFT & _SGI_INTID_MASK
        if value & _IRM:
            targets = [cpu for cpu in self.cpus if cpu is not sender]
        else:
            affinity, mask = sgi_targets(value)
            targets = [
                cpu
                for cpu in self.cpus
                if cpu.affinity & ~0xFF == affinity and mask >> (cpu.affinity & 0xFF) & 1
            ]
        for cpu in targets:
            irq = cpu.private[intid]
            if group1 or not irq.group:
                irq.latch = True
                self.update(irq)

    def route(self, irq: Irq, mpidr: int) -> None:
        """GICD_IROUTER: send an SPI to the CPU with this affinity, if there is one."""
        irq.mpidr = mpidr
        irq.target = self.cpu_at(mpidr)
        self.update(irq)

    def enable_groups(self, group0: bool, group1: bool) -> None:
        """GICD_CTLR: which groups the distributor forwards."""
        if self.group_enables == [group0, group1]:
            return
        self.group_enables[:] = [group0, group1]
        for cpu in self.cpus:
            for irq in cpu.private:
                self.update(irq)
        for irq in self.spis:
            self.update(irq)

    # Addresses

    def _size(self, region: Region) -> int:
        return (region.room or len(self.cpus)) * REDISTRIBUTOR_BYTES

    def _meets_distributor(self, base: int, size: int) -> bool:
        at = self.distributor
        return at is not None and _overlap(base, size, at, DISTRIBUTOR_BYTES)

    def _check_bases(self) -> None:
        """The frames are apart and in the IPA space. Raises EINVAL."""
        spans = [(region.base, self._size(region)) for region in self.regions]
        if self.distributor is not None:
            spans.append((self.distributor, DISTRIBUTOR_BYTES))
        spans.sort()
        for (base, size), (following, _) in pairwise(spans):
            if base + size > following:
                raise OSError(errno.EINVAL, "frames of the VM's GIC overlap")
        if spans and spans[-1][0] + spans[-1][1] > 1 << IPA_BITS:
            raise OSError(errno.EINVAL, "the VM's GIC leaves its IPA space")

    def _place_redistributors(self) -> None:
        """Give each CPU, in order, the next free place of the regions. Raises EINVAL."""
        if self.regions:
            self._check_bases()
        places = [
            region.base + number * REDISTRIBUTOR_BYTES
            for region in self.regions
            for number in range(region.room or len(self.cpus))
        ]
        for index, cpu in enumerate(self.cpus):
            cpu.frames = places[index] if index < len(places) else None
        taken = {cpu.frames for cpu in self.cpus}
        for cpu in self.cpus:
            cpu.is_last = cpu.frames is None or cpu.frames + REDISTRIBUTOR_BYTES not in taken


def _overlap(base: int, size: int, other: int, other_size: int) -> bool:
    return base < other + other_size and other < base + size


def _check_range(base: int, size: int) -> None:
    """Raises EINVAL for an address that is no multiple of 64 KiB, E2BIG outside the IPA space."""
    if base % FRAME_BYTES:
        raise OSError(errno.EINVAL, f"IPA {base:#x} is not aligned to 64 KiB")
    if base + size > 1 << IPA_BITS:
        raise OSError(errno.E2BIG, f"IPA {base:#x} leaves the {IPA_BITS}-bit IPA space")
