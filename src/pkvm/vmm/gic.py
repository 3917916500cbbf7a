# SPDX-License-Identifier: GPL-2.0-or-later
"""The VM's interrupt controller: a GICv3 that the kernel emulates (KVM API, devices/arm-vgic-v3).

User space says where it stands and starts it once all vCPUs exist; from then
on devices drive its lines.
"""

from __future__ import annotations

from pkvm.kvm import Vm
from pkvm.uapi import kvm as uapi
from pkvm.vmm import board
from pkvm.vmm.irq import IrqLine

INTERRUPTS = 96
"""INTIDs: 32 of each CPU's own, and SPIs 0 to 63. A multiple of 32, 64 or more."""


class Gic:
    """The interrupt controller of `vm`, made before any vCPU runs. Raises OSError."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._device = vm.create_device(uapi.DeviceType.ARM_VGIC_V3)

    def start(self) -> None:
        """Put it at its addresses and initialise it: every vCPU exists now. Raises OSError."""
        device, group = self._device, uapi.VgicGroup
        device.set_attr(group.ADDR, uapi.VgicAddr.DIST, board.GICD_BASE)
        device.set_attr(group.ADDR, uapi.VgicAddr.REDIST, board.GICR_BASE)
        device.set_attr(group.NR_IRQS, 0, INTERRUPTS)
        device.set_attr(group.CTRL, uapi.VgicCtrl.INIT)

    def line(self, spi: int) -> IrqLine:
        """The line of an SPI."""
        return IrqLine(self._vm, spi)

    def close(self) -> None:
        """Close the device's descriptor. The interrupt controller lives as long as the VM."""
        self._device.close()
