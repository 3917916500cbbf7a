# SPDX-License-Identifier: GPL-2.0-or-later
"""Capabilities, held against what a Linux 7.3 host in protected mode was seen to report: on
/dev/kvm, on a VM that is not protected and on one that is.

Where this host differs from it, `OURS` has the numbers, and why.
"""

from __future__ import annotations

import errno

import pytest

from fakes.contract_rig import errno_of
from fakes.dialect_rig import host
from pkvm.kvm import Kvm, Vm
from pkvm.uapi import kvm as uapi
from pkvm.uapi.dialects import UPSTREAM
from pkvm.uapi.kvm import Cap

Numbers = tuple[int, int, int]
"""Of the system (-1: EINVAL), of a non-protected VM, of a protected one."""

LINUX = (
    ("IRQCHIP", 1, 1, 1),
    ("USER_MEMORY", 1, 1, 1),
    ("NR_VCPUS", 2, 2, 2),
    ("MAX_VCPUS", 512, 512, 512),
    ("MAX_VCPU_ID", 512, 512, 512),
    ("NR_MEMSLOTS", 32767, 32767, 32767),
    ("MP_STATE", 1, 1, 0),
    ("SET_GUEST_DEBUG", 1, 1, 0),
    ("IRQ_ROUTING", 4096, 4096, 4096),
    ("IRQFD", 1, 1, 1),
    ("IOEVENTFD", 1, 1, 0),
    ("VCPU_EVENTS", 1, 1, 0),
    ("ONE_REG", 1, 1, 0),
    ("READONLY_MEM", 1, 1, 0),
    ("SIGNAL_MSI", 1, 1, 1),
    ("DEVICE_CTRL", 1, 1, 1),
    ("ARM_PSCI", 1, 1, 1),
    ("ARM_SET_DEVICE_ADDR", 1, 1, 0),
    ("ARM_EL1_32BIT", 0, 0, 0),
    ("ARM_PSCI_0_2", 1, 1, 1),
    ("VM_ATTRIBUTES", 0, 0, 0),
    ("CHECK_EXTENSION_VM", 1, 1, 1),
    ("GUEST_DEBUG_HW_BPS", 6, 6, 0),
    ("GUEST_DEBUG_HW_WPS", 4, 4, 0),
    ("ARM_PMU_V3", 1, 1, 0),
    ("MSI_DEVID", -1, 0, 0),
    ("IMMEDIATE_EXIT", 1, 1, 0),
    ("ARM_USER_IRQ", 1, 1, 0),
    ("VCPU_ATTRIBUTES", 1, 1, 0),
    ("ARM_INJECT_SERROR_ESR", 1, 1, 0),
    ("ARM_VM_IPA_SIZE", 48, 48, 48),
    ("MANUAL_DIRTY_LOG_PROTECT2", 3, 3, 3),
    ("ARM_SVE", 0, 0, 0),
    ("ARM_PTRAUTH_ADDRESS", 0, 0, 0),
    ("ARM_PTRAUTH_GENERIC", 0, 0, 0),
    ("ARM_IRQ_LINE_LAYOUT_2", 1, 1, 0),
    ("ARM_NISV_TO_USER", 1, 1, 0),
    ("ARM_INJECT_EXT_DABT", 1, 1, 0),
    ("STEAL_TIME", 1, 1, 0),
    ("SET_GUEST_DEBUG2", 196611, 196611, 0),
    ("DIRTY_LOG_RING", 0, 0, 0),
    ("PTP_KVM", 1, 1, 0),
    ("ARM_MTE", 0, 0, 0),
    ("BINARY_STATS_FD", 1, 1, 1),
    ("ARM_SYSTEM_SUSPEND", 1, 1, 0),
    ("DIRTY_LOG_RING_ACQ_REL", 1048576, 1048576, 1048576),
    ("DIRTY_LOG_RING_WITH_BITMAP", 1, 1, 1),
    ("COUNTER_OFFSET", 1, 1, 0),
    ("ARM_EAGER_SPLIT_CHUNK_SIZE", 0, 0, 0),
    ("ARM_SUPPORTED_BLOCK_SIZES", 0, 0, 0),
    ("ARM_SUPPORTED_REG_MASK_RANGES", 1, 1, 0),
    ("USER_MEMORY2", 1, 1, 1),
    ("MEMORY_FAULT_INFO", 0, 0, 0),
    ("MEMORY_ATTRIBUTES", 0, 0, 0),
    ("GUEST_MEMFD", 1, 1, 1),
    ("GUEST_MEMFD_FLAGS", 3, 3, 3),
    ("VM_TYPES", 0, 0, 0),
    ("PRE_FAULT_MEMORY", 0, 0, 0),
    ("ARM_WRITABLE_IMP_ID_REGS", 1, 1, 0),
    ("ARM_EL2", 0, 0, 0),
    ("ARM_EL2_E2H0", 0, 0, 0),
    ("ARM_CACHEABLE_PFNMAP_SUPPORTED", -1, 0, 0),
    ("ARM_SEA_TO_USER", 1, 1, 0),
    ("ARM_PMU_V3_STRICT", 1, 1, 0),
    ("HALT_POLL", 1, 1, 1),
    ("SYNC_MMU", 1, 1, 1),
    ("DESTROY_MEMORY_REGION_WORKS", 1, 1, 1),
    ("MULTI_ADDRESS_SPACE", 0, 0, 0),
    ("COALESCED_MMIO", 1, 1, 1),
    ("JOIN_MEMORY_REGIONS_WORKS", 1, 1, 1),
    ("INTERNAL_ERROR_DATA", 1, 1, 1),
    ("IRQFD_RESAMPLE", 1, 1, 0),
    ("ENABLE_CAP_VM", 1, 1, 1),
    ("IOEVENTFD_ANY_LENGTH", 1, 1, 1),
    ("COALESCED_PIO", 1, 1, 1),
    ("SYSTEM_EVENT_DATA", 1, 1, 1),
)
"""The kernel's log, line by line; CPU neoverse-n1, two CPUs."""

OURS: dict[str, Numbers] = {
    # The machine's: one CPU that has no debug registers for guests, 40 bits of IPA.
    "NR_VCPUS": (1, 1, 1),
    "ARM_VM_IPA_SIZE": (40, 40, 40),
    # Interrupts have the way of KVM_IRQ_LINE and KVM_IRQFD: no routes, no MSIs, no ITS.
    "IRQ_ROUTING": (0, 0, 0),
    "SIGNAL_MSI": (0, 0, 0),
    "ARM_USER_IRQ": (0, 0, 0),
    # Exits go to the VMM one by one.
    "IOEVENTFD": (0, 0, 0),
    "IOEVENTFD_ANY_LENGTH": (0, 0, 0),
    "COALESCED_MMIO": (0, 0, 0),
    "COALESCED_PIO": (0, 0, 0),
    # Debugging a guest, counting in it, putting it to sleep, putting errors into it.
    "SET_GUEST_DEBUG": (0, 0, 0),
    "SET_GUEST_DEBUG2": (0, 0, 0),
    "GUEST_DEBUG_HW_BPS": (0, 0, 0),
    "GUEST_DEBUG_HW_WPS": (0, 0, 0),
    "ARM_PMU_V3": (0, 0, 0),
    "ARM_PMU_V3_STRICT": (0, 0, 0),
    "ARM_SYSTEM_SUSPEND": (0, 0, 0),
    "ARM_INJECT_SERROR_ESR": (0, 0, 0),
    "ARM_NISV_TO_USER": (0, 0, 0),
    "ARM_SEA_TO_USER": (0, 0, 0),
    # Migration: dirty logs, counter offsets, ID registers that can be written.
    "DIRTY_LOG_RING_ACQ_REL": (0, 0, 0),
    "DIRTY_LOG_RING_WITH_BITMAP": (0, 0, 0),
    "COUNTER_OFFSET": (0, 0, 0),
    "ARM_SUPPORTED_REG_MASK_RANGES": (0, 0, 0),
    "ARM_WRITABLE_IMP_ID_REGS": (0, 0, 0),
    # Memory is anonymous; nobody reads statistics.
    "GUEST_MEMFD": (0, 0, 0),
    "GUEST_MEMFD_FLAGS": (0, 0, 0),
    "BINARY_STATS_FD": (0, 0, 0),
}


def numbers(kvm: Kvm, vms: tuple[Vm, Vm], cap: int) -> Numbers:
    of_system = -1 if errno_of(kvm.check_extension, cap) == errno.EINVAL else None
    if of_system is None:
        of_system = kvm.check_extension(cap)
    return of_system, vms[0].check_extension(cap), vms[1].check_extension(cap)


def test_what_upstream_reports() -> None:
    with (
        host("upstream") as (_, kvm),
        kvm.create_vm() as plain,
        kvm.create_vm(uapi.TYPE_PROTECTED) as protected,
    ):
        assert kvm.api_version() == 12
        with protected.create_vcpu(0) as vcpu:
            assert len(kvm.kernel.mmap_vcpu(vcpu.fd, 8192).view) == 8192
            assert errno_of(kvm.kernel.mmap_vcpu, vcpu.fd, 8193) == errno.EINVAL
        seen = {name: numbers(kvm, (plain, protected), Cap[name]) for name, *_ in LINUX}
    linux = {name: (system, plain, protected) for name, system, plain, protected in LINUX}
    assert len(linux) == 76
    assert seen == linux | OURS
    assert all(OURS[name] != linux[name] for name in OURS), "a difference that is none any more"


def test_the_filter_of_upstream_is_the_kernels() -> None:
    """Also for what this host does not have."""
    for name, _, plain, protected in LINUX:
        if plain:
            assert UPSTREAM.offers(Cap[name]) == bool(protected), name


@pytest.mark.parametrize("name", ["rfc", "android", "upstream"])
def test_what_is_claimed_is_there(name: str) -> None:
    """Each capability of a request or an attribute: the request is known, or it is not claimed."""
    with host(name) as (_, kvm), kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        memory = kvm.mmap(8192)
        region = uapi.MEMORY_REGION.pack(0, 0, 0x4000_0000, memory.length, memory.address)
        argument = bytearray(region.ljust(uapi.MEMORY_REGION2_BYTES, b"\xff"))
        assert vm.check_extension(Cap.USER_MEMORY2)
        ioctl, fd = kvm.kernel.ioctl, vm.fd
        assert errno_of(ioctl, fd, uapi.Ioctl.SET_USER_MEMORY_REGION2, argument) == 0
        argument[4] = uapi.MemFlag.GUEST_MEMFD
        request = uapi.Ioctl.SET_USER_MEMORY_REGION2
        assert errno_of(ioctl, fd, request, argument) == errno.EINVAL
        assert errno_of(ioctl, fd, request, argument[:32]) == errno.EFAULT
        assert vm.check_extension(Cap.ARM_SET_DEVICE_ADDR)
        request = uapi.Ioctl.ARM_SET_DEVICE_ADDR
        assert errno_of(ioctl, fd, request, bytearray(16)) == errno.ENODEV
        assert vm.check_extension(Cap.HALT_POLL)
        assert errno_of(vm.enable_cap, Cap.HALT_POLL, 0, (200_000,)) == 0
        assert errno_of(vm.enable_cap, Cap.HALT_POLL, 1) == errno.EINVAL
        assert errno_of(vm.enable_cap, Cap.HALT_POLL, 0, (1 << 32,)) == errno.EINVAL
        assert errno_of(vm.enable_cap, Cap.ARM_MTE) == errno.EINVAL
        assert vm.check_extension(Cap.VCPU_ATTRIBUTES)
        services = vm.check_extension(Cap.STEAL_TIME)
        assert vcpu.has_attr(uapi.PVTIME_CTRL, uapi.PVTIME_IPA) == bool(services)
        assert services == vm.check_extension(Cap.PTP_KVM) == (name != "rfc")
        assert vm.check_extension(Cap.MAX_VCPUS) == 512
        vm.create_vcpu(511).close()
        assert errno_of(vm.create_vcpu, 512) == errno.EINVAL


def test_a_protected_vm_has_no_device_address() -> None:
    with host("upstream") as (_, kvm), kvm.create_vm(uapi.TYPE_PROTECTED) as vm:
        request = uapi.Ioctl.ARM_SET_DEVICE_ADDR
        assert errno_of(kvm.kernel.ioctl, vm.fd, request, bytearray(16)) == errno.EINVAL
        assert errno_of(vm.enable_cap, Cap.HALT_POLL, 0, (0,)) == 0
