# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_CHECK_EXTENSION, and KVM_ENABLE_CAP of what a VM's owner may turn on (KVM API 4.4, 4.37)."""

from __future__ import annotations

import errno
from collections.abc import Mapping

from pkvm.host import firmware_address, irqchip, protected
from pkvm.host.argument import Argument
from pkvm.host.host import IPA_BITS, Host
from pkvm.host.vm import Vm
from pkvm.hyp.abi import MAX_VCPUS
from pkvm.uapi.dialects import Firmware
from pkvm.uapi.kvm import (
    DIRTY_LOG_INITIALLY_SET,
    DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    ENABLE_CAP,
    MEM_SLOTS_NUM,
    Cap,
)

_MAX_U32 = (1 << 32) - 1
_ONLY_OF_A_VM = (Cap.MSI_DEVID, Cap.ARM_CACHEABLE_PFNMAP_SUPPORTED)

_MANUAL = (
    0, DIRTY_LOG_MANUAL_PROTECT_ENABLE, DIRTY_LOG_MANUAL_PROTECT_ENABLE | DIRTY_LOG_INITIALLY_SET,
)  # fmt: skip
"""How a VM's dirty logs may be cleared."""
_CAPS: Mapping[int, int] = {
    Cap.USER_MEMORY: 1,
    Cap.NR_VCPUS: 1,
    Cap.NR_MEMSLOTS: MEM_SLOTS_NUM,
    Cap.MP_STATE: 1,
    Cap.SYNC_MMU: 1,
    Cap.DESTROY_MEMORY_REGION_WORKS: 1,
    Cap.JOIN_MEMORY_REGIONS_WORKS: 1,
    Cap.INTERNAL_ERROR_DATA: 1,
    Cap.MAX_VCPUS: MAX_VCPUS,
    Cap.ONE_REG: 1,
    Cap.READONLY_MEM: 1,
    Cap.ARM_PSCI: 1,
    Cap.ARM_SET_DEVICE_ADDR: 1,
    Cap.DEVICE_CTRL: 1,
    Cap.ENABLE_CAP_VM: 1,
    Cap.ARM_PSCI_0_2: 1,
    Cap.CHECK_EXTENSION_VM: 1,
    Cap.VCPU_ATTRIBUTES: 1,
    Cap.MAX_VCPU_ID: MAX_VCPUS,
    Cap.IMMEDIATE_EXIT: 1,
    Cap.ARM_VM_IPA_SIZE: IPA_BITS,
    Cap.MANUAL_DIRTY_LOG_PROTECT2: DIRTY_LOG_MANUAL_PROTECT_ENABLE | DIRTY_LOG_INITIALLY_SET,
    Cap.HALT_POLL: 1,
    Cap.SYSTEM_EVENT_DATA: 1,
    Cap.USER_MEMORY2: 1,
}
"""NR_VCPUS is the number of physical CPUs: one."""


def of_system(host: Host, cap: int) -> int:
    """KVM_CHECK_EXTENSION on /dev/kvm. Raises EINVAL for the few that only a VM can answer."""
    if cap in _ONLY_OF_A_VM:
        raise OSError(errno.EINVAL, f"capability {cap} is asked of a VM")
    return _check(host, cap)


def of_vm(vm: Vm, cap: int) -> int:
    """KVM_CHECK_EXTENSION on a VM: of a protected one as far as its dialect lets."""
    if vm.protected and not vm.host.dialect.offers(cap):
        return 0
    return _check(vm.host, cap)


def _check(host: Host, cap: int) -> int:
    if cap == host.dialect.capability:
        return int(host.protected_mode)
    if cap in (Cap.IRQCHIP, Cap.ARM_IRQ_LINE_LAYOUT_2):
        return irqchip.has_gic(host)
    if cap in (Cap.IRQFD, Cap.IRQFD_RESAMPLE):
        return irqchip.has_irqfd(host)
    if cap in (Cap.ARM_PTRAUTH_ADDRESS, Cap.ARM_PTRAUTH_GENERIC):
        return int(host.ptrauth != 0)
    if cap in (Cap.STEAL_TIME, Cap.PTP_KVM):
        return int(host.policy.services)
    if cap in (Cap.VCPU_EVENTS, Cap.ARM_INJECT_EXT_DABT):
        return int(host.policy.shows_cpu)
    return _CAPS.get(cap, 0)


def enable(vm: Vm, argument: Argument) -> int:
    """KVM_ENABLE_CAP of a VM: ARM_PROTECTED_VM, by the number that the dialect gives it, on a host
    in protected mode; and HALT_POLL, which changes nothing, as this host never polls. Raises
    EINVAL for any other."""
    cap, flags, *args = ENABLE_CAP.unpack(argument.read(ENABLE_CAP.size))
    host = vm.host
    if cap == Cap.HALT_POLL and not flags and args[0] <= _MAX_U32:
        return 0
    if cap == Cap.MANUAL_DIRTY_LOG_PROTECT2 and not flags and args[0] in _MANUAL:
        vm.manual_dirty_log = args[0]
        return 0
    if cap != host.dialect.capability:
        raise OSError(errno.EINVAL, f"capability {cap} cannot be enabled")
    if not host.protected_mode:
        raise OSError(errno.EINVAL, "the host is not in protected mode")
    slot = host.dialect.firmware is Firmware.SLOT
    enable_protection = protected.enable_cap if slot else firmware_address.enable_cap
    enable_protection(vm, flags, (args[0], args[1], args[2], args[3]))
    return 0
