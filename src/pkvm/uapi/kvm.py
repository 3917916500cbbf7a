# SPDX-License-Identifier: GPL-2.0-or-later
"""The KVM user ABI (include/uapi/linux/kvm.h and arm64's asm/kvm.h): numbers and byte layouts.

Standard library only: the same module serves the built-in host, the /dev/kvm
back-end and whoever reads a log.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

API_VERSION = 12


def _ioc(direction: int, number: int, size: int) -> int:
    """An ioctl request of type 0xAE (asm-generic/ioctl.h): direction 1 = write, 2 = read."""
    return direction << 30 | size << 16 | 0xAE << 8 | number


class Ioctl(IntEnum):
    """ioctl requests, in the order of their numbers."""

    GET_API_VERSION = _ioc(0, 0x00, 0)
    CREATE_VM = _ioc(0, 0x01, 0)
    CHECK_EXTENSION = _ioc(0, 0x03, 0)
    GET_VCPU_MMAP_SIZE = _ioc(0, 0x04, 0)
    CREATE_VCPU = _ioc(0, 0x41, 0)
    SET_USER_MEMORY_REGION = _ioc(1, 0x46, 32)
    SET_USER_MEMORY_REGION2 = _ioc(1, 0x49, 160)
    CREATE_IRQCHIP = _ioc(0, 0x60, 0)
    IRQ_LINE = _ioc(1, 0x61, 8)
    GET_DIRTY_LOG = _ioc(1, 0x42, 16)
    IRQFD = _ioc(1, 0x76, 32)
    RUN = _ioc(0, 0x80, 0)
    GET_MP_STATE = _ioc(2, 0x98, 4)
    SET_MP_STATE = _ioc(1, 0x99, 4)
    SET_GUEST_DEBUG = _ioc(1, 0x9B, 520)
    GET_VCPU_EVENTS = _ioc(2, 0x9F, 64)
    SET_VCPU_EVENTS = _ioc(1, 0xA0, 64)
    ENABLE_CAP = _ioc(1, 0xA3, 104)
    GET_ONE_REG = _ioc(1, 0xAB, 16)
    ARM_SET_DEVICE_ADDR = GET_ONE_REG
    """The same number: this is a VM's, GET_ONE_REG a vCPU's."""
    SET_ONE_REG = _ioc(1, 0xAC, 16)
    ARM_VCPU_INIT = _ioc(1, 0xAE, 32)
    ARM_PREFERRED_TARGET = _ioc(2, 0xAF, 32)
    GET_REG_LIST = _ioc(3, 0xB0, 8)
    CLEAR_DIRTY_LOG = _ioc(3, 0xC0, 24)
    CREATE_DEVICE = _ioc(3, 0xE0, 12)
    SET_DEVICE_ATTR = _ioc(1, 0xE1, 24)
    GET_DEVICE_ATTR = _ioc(1, 0xE2, 24)
    HAS_DEVICE_ATTR = _ioc(1, 0xE3, 24)


class Cap(IntEnum):
    """KVM_CHECK_EXTENSION and KVM_ENABLE_CAP numbers."""

    IRQCHIP = 0
    USER_MEMORY = 3
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    MP_STATE = 14
    COALESCED_MMIO = 15
    SYNC_MMU = 16
    DESTROY_MEMORY_REGION_WORKS = 21
    SET_GUEST_DEBUG = 23
    IRQ_ROUTING = 25
    JOIN_MEMORY_REGIONS_WORKS = 30
    IRQFD = 32
    IOEVENTFD = 36
    INTERNAL_ERROR_DATA = 40
    VCPU_EVENTS = 41
    MAX_VCPUS = 66
    ONE_REG = 70
    SIGNAL_MSI = 77
    READONLY_MEM = 81
    IRQFD_RESAMPLE = 82
    ARM_PSCI = 87
    ARM_SET_DEVICE_ADDR = 88
    DEVICE_CTRL = 89
    ARM_EL1_32BIT = 93
    ENABLE_CAP_VM = 98
    VM_ATTRIBUTES = 101
    ARM_PSCI_0_2 = 102
    CHECK_EXTENSION_VM = 105
    MULTI_ADDRESS_SPACE = 118
    GUEST_DEBUG_HW_BPS = 119
    GUEST_DEBUG_HW_WPS = 120
    IOEVENTFD_ANY_LENGTH = 122
    ARM_PMU_V3 = 126
    VCPU_ATTRIBUTES = 127
    MAX_VCPU_ID = 128
    MSI_DEVID = 131
    IMMEDIATE_EXIT = 136
    ARM_USER_IRQ = 144
    ARM_INJECT_SERROR_ESR = 158
    COALESCED_PIO = 162
    ARM_VM_IPA_SIZE = 165
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    ARM_SVE = 170
    ARM_PTRAUTH_ADDRESS = 171
    ARM_PTRAUTH_GENERIC = 172
    ARM_IRQ_LINE_LAYOUT_2 = 174
    ARM_NISV_TO_USER = 177
    ARM_INJECT_EXT_DABT = 178
    HALT_POLL = 182
    STEAL_TIME = 187
    DIRTY_LOG_RING = 192
    SET_GUEST_DEBUG2 = 195
    PTP_KVM = 198
    ARM_PROTECTED_VM = 199
    """The RFC's number (facts §1.2)."""
    BINARY_STATS_FD = 203
    ARM_MTE = 205
    SYSTEM_EVENT_DATA = 215
    ARM_SYSTEM_SUSPEND = 216
    DIRTY_LOG_RING_ACQ_REL = 223
    DIRTY_LOG_RING_WITH_BITMAP = 225
    COUNTER_OFFSET = 227
    ARM_EAGER_SPLIT_CHUNK_SIZE = 228
    ARM_SUPPORTED_BLOCK_SIZES = 229
    ARM_SUPPORTED_REG_MASK_RANGES = 230
    USER_MEMORY2 = 231
    MEMORY_FAULT_INFO = 232
    MEMORY_ATTRIBUTES = 233
    GUEST_MEMFD = 234
    VM_TYPES = 235
    PRE_FAULT_MEMORY = 236
    ARM_WRITABLE_IMP_ID_REGS = 239
    ARM_EL2 = 240
    ARM_EL2_E2H0 = 241
    ARM_CACHEABLE_PFNMAP_SUPPORTED = 243
    GUEST_MEMFD_FLAGS = 244
    ARM_SEA_TO_USER = 245
    ARM_PMU_V3_STRICT = 251


class ProtectedVm(IntEnum):
    """`flags` of KVM_ENABLE_CAP(ARM_PROTECTED_VM): one value, not a mask (RFC 7.26)."""

    ENABLE = 0
    INFO = 1


class ExitReason(IntEnum):
    """kvm_run.exit_reason."""

    UNKNOWN = 0
    EXCEPTION = 1
    HYPERCALL = 3
    DEBUG = 4
    MMIO = 6
    FAIL_ENTRY = 9
    INTR = 10
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    ARM_NISV = 28


class SystemEvent(IntEnum):
    """kvm_run.system_event.type."""

    SHUTDOWN = 1
    RESET = 2
    CRASH = 3
    SUSPEND = 5


class VcpuFeature(IntEnum):
    """Bit numbers of kvm_vcpu_init.features[0]."""

    POWER_OFF = 0
    EL1_32BIT = 1
    PSCI_0_2 = 2
    PMU_V3 = 3
    SVE = 4
    PTRAUTH_ADDRESS = 5
    PTRAUTH_GENERIC = 6
    HAS_EL2 = 7
    HAS_EL2_E2H0 = 8
    PMU_V3_STRICT = 9


class MpState(IntEnum):
    """kvm_mp_state.mp_state."""

    RUNNABLE = 0
    STOPPED = 5


class MemFlag(IntFlag):
    """kvm_userspace_memory_region.flags."""

    LOG_DIRTY_PAGES = 1
    READONLY = 2
    GUEST_MEMFD = 4


TARGET_GENERIC_V8 = 5
MEM_SLOTS_NUM = 32767
VCPU_MMAP_SIZE = 8192
TYPE_PROTECTED = 1 << 31
"""KVM_VM_TYPE_ARM_PROTECTED: the machine type bit that Android and upstream use."""

MEMORY_REGION = struct.Struct("<IIQQQ")
"""kvm_userspace_memory_region: slot, flags, guest_phys_addr, memory_size, userspace_addr."""
MEMORY_REGION2_BYTES = 160
"""kvm_userspace_memory_region2: the same, then what is for guest_memfd alone."""
DIRTY_LOG = struct.Struct("<IIQ")
"""kvm_dirty_log: slot, padding, the bitmap's address."""
CLEAR_DIRTY_LOG = struct.Struct("<IIQQ")
"""kvm_clear_dirty_log: slot, num_pages, first_page, address of the bitmap of num_pages."""
DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1
DIRTY_LOG_INITIALLY_SET = 2
"""args[0] of KVM_ENABLE_CAP(MANUAL_DIRTY_LOG_PROTECT2): pages are clean again when CLEAR_DIRTY_LOG
says so, not when the log is asked for; and a new log says that all are dirty."""
ENABLE_CAP = struct.Struct("<II4Q64x")
"""kvm_enable_cap: cap, flags, args[4], pad."""
ONE_REG = struct.Struct("<QQ")
"""kvm_one_reg: id, addr."""
VCPU_INIT = struct.Struct("<I7I")
"""kvm_vcpu_init: target, features[7]."""
MP_STATE = struct.Struct("<I")
VCPU_EVENTS = struct.Struct("<BBB5xQ12I")
"""kvm_vcpu_events: serror_pending, serror_has_esr, ext_dabt_pending, serror_esr, reserved."""
GUEST_DEBUG = struct.Struct("<II64Q")
"""kvm_guest_debug: control, padding, the breakpoint and watchpoint registers."""
PROTECTED_VM_INFO = struct.Struct("<8Q")
"""kvm_protected_vm_info: firmware_size, then seven reserved words. The first reserved word is
the structure's size when the caller gave one in args[1] (RFC review, question 6)."""


class Run:
    """Offsets in struct kvm_run."""

    IMMEDIATE_EXIT = 1
    EXIT_REASON = 8
    UNION = 32
    MMIO = struct.Struct("<QQIB")
    """phys_addr, data[8] as a little-endian number, len, is_write; at UNION."""
    FAIL_ENTRY = struct.Struct("<QI")
    """hardware_entry_failure_reason, cpu; at UNION."""
    SYSTEM_EVENT = struct.Struct("<II16Q")
    """type, ndata, data; at UNION."""
    INTERNAL_ERROR = struct.Struct("<II")
    """suberror, ndata; at UNION."""


REG_ARM64 = 0x6000_0000_0000_0000
REG_SIZE_U32 = 2 << 52
REG_SIZE_U64 = 3 << 52
REG_SIZE_U128 = 4 << 52
REG_SIZE_MASK = 0xF << 52
REG_ARM_CORE = 0x10 << 16
REG_ARM64_SYSREG = 0x13 << 16
REG_ARM_FW = 0x14 << 16


def core_reg(offset_bytes: int, size: int = 8) -> int:
    """ONE_REG id of a member of struct kvm_regs at `offset_bytes`; `size` is 4, 8 or 16 bytes."""
    size_bits = {4: REG_SIZE_U32, 8: REG_SIZE_U64, 16: REG_SIZE_U128}[size]
    return REG_ARM64 | size_bits | REG_ARM_CORE | offset_bytes // 4


def reg_x(n: int) -> int:
    """ONE_REG id of X0-X30."""
    if not 0 <= n <= 30:
        raise ValueError(f"there is no X{n}")
    return core_reg(8 * n)


REG_SP = core_reg(0xF8)
"""SP_EL0."""
REG_PC = core_reg(0x100)
REG_PSTATE = core_reg(0x108)
REG_SP_EL1 = core_reg(0x110)
REG_ELR_EL1 = core_reg(0x118)
REG_SPSR_EL1 = core_reg(0x120)
"""spsr[0..4]: EL1, ABT, UND, IRQ, FIQ, eight bytes each."""
REG_FP_BASE = 0x150
"""Offset of fp_regs.vregs[0] in struct kvm_regs; 16 bytes each; fpsr at 0x350, fpcr at 0x354."""


def reg_v(n: int) -> int:
    """ONE_REG id of V0-V31 (128 bits)."""
    if not 0 <= n <= 31:
        raise ValueError(f"there is no V{n}")
    return core_reg(REG_FP_BASE + 16 * n, 16)


REG_FPSR = core_reg(0x350, 4)
REG_FPCR = core_reg(0x354, 4)


def sysreg(encoding: int) -> int:
    """ONE_REG id of a 64-bit system register by its 16-bit encoding (`SysReg.one_reg`)."""
    return REG_ARM64 | REG_SIZE_U64 | REG_ARM64_SYSREG | encoding


REG_PSCI_VERSION = REG_ARM64 | REG_SIZE_U64 | REG_ARM_FW | 0
REG_WORKAROUNDS = tuple(REG_ARM64 | REG_SIZE_U64 | REG_ARM_FW | number for number in (1, 2, 3))
"""KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_1 to _3."""
REG_ARM_FW_FEATURES = 0x16 << 16
REG_STD_BMAP, REG_STD_HYP_BMAP, REG_VENDOR_HYP_BMAP, REG_VENDOR_HYP_BMAP_2 = (
    REG_ARM64 | REG_SIZE_U64 | REG_ARM_FW_FEATURES | number for number in range(4)
)
"""Bitmaps of the services that KVM has for guests, by the owner of their function ids."""
REG_DEMUX_CCSIDR = REG_ARM64 | REG_SIZE_U32 | 0x11 << 16
"""CCSIDR_EL1 by the value of CSSELR_EL1, in the low bits."""


class DeviceType(IntEnum):
    """kvm_create_device.type, as far as arm64 has them."""

    ARM_VGIC_V2 = 5
    ARM_VGIC_V3 = 7
    ARM_VGIC_ITS = 8


CREATE_DEVICE_TEST = 1
"""kvm_create_device.flags: say whether the type is there, make nothing."""
CREATE_DEVICE = struct.Struct("<III")
"""kvm_create_device: type, fd (the answer), flags."""
DEVICE_ATTR = struct.Struct("<IIQQ")
"""kvm_device_attr: flags, group, attr, addr (of the value)."""
PVTIME_CTRL = 2
"""kvm_device_attr.group of a vCPU: stolen time (Documentation/virt/kvm/devices/vcpu.rst)."""
PVTIME_IPA = 0
"""Its one attribute; the value is the 64-bit IPA of the structure (`arm64.pvtime`)."""
IRQ_LEVEL = struct.Struct("<II")
"""kvm_irq_level: irq (`irq_number`), level."""
IRQFD = struct.Struct("<IIII16x")
"""kvm_irqfd: fd, gsi, flags, resamplefd."""


class IrqfdFlag(IntFlag):
    """kvm_irqfd.flags."""

    DEASSIGN = 1
    RESAMPLE = 2


class VgicGroup(IntEnum):
    """kvm_device_attr.group of the GICv3 (Documentation/virt/kvm/devices/arm-vgic-v3.rst)."""

    ADDR = 0
    DIST_REGS = 1
    NR_IRQS = 3
    CTRL = 4
    REDIST_REGS = 5
    CPU_SYSREGS = 6
    LEVEL_INFO = 7


class VgicAddr(IntEnum):
    """Attributes of VgicGroup.ADDR; the value is a 64-bit IPA, for REDIST_REGION a
    `redist_region`."""

    DIST = 2
    REDIST = 3
    REDIST_REGION = 5


class VgicCtrl(IntEnum):
    """Attributes of VgicGroup.CTRL."""

    INIT = 0
    SAVE_PENDING_TABLES = 3


VGIC_MPIDR_SHIFT = 32
"""In the attribute of REDIST_REGS, CPU_SYSREGS and LEVEL_INFO: the vCPU's affinity, Aff3 to Aff0 a
byte each; below it the register's offset or encoding."""
VGIC_LEVEL_INTID_MASK = 0x3FF
VGIC_LEVEL_INFO_SHIFT = 10
"""Of LEVEL_INFO: the first of 32 INTIDs, and what is asked: 0, the line's level."""


def redist_region(index: int, base: int, count: int) -> int:
    """The value of VgicAddr.REDIST_REGION: region `index` of `count` redistributors at IPA `base`
    (64 KiB aligned)."""
    return count << 52 | base | index


class IrqType(IntEnum):
    """What kvm_irq_level.irq names."""

    CPU = 0
    """A vCPU's IRQ or FIQ input: without an interrupt controller in the kernel only."""
    SPI = 1
    PPI = 2


def irq_number(kind: IrqType, intid: int, vcpu_id: int = 0) -> int:
    """kvm_irq_level.irq: `intid` as the GIC numbers it (SPIs from 32, PPIs 16 to 31), and of which
    vCPU if it is a PPI."""
    return vcpu_id >> 8 << 28 | kind << 24 | (vcpu_id & 0xFF) << 16 | intid


class DmaCopy:
    """The copy engine's driver, "/dev/dma-copy" of the built-in host: an ioctl that makes the
    device move bytes between two user buffers by DMA, through its stage-2."""

    COPY = 1 << 30 | 24 << 16 | 0xDC << 8 | 0x01
    ARGS = struct.Struct("<QQQ")
    """source, destination, length: user addresses and bytes. EFAULT outside a mapping, EIO when
    the device was stopped by its stage-2."""


class DeviceAssign:
    """Of the built-in host's DMA drivers, "/dev/dma-copy" and "/dev/dma-sg": give the device to a
    protected VM, until that goes. In the dialect `android`."""

    ASSIGN = 1 << 30 | 16 << 16 | 0xDC << 8 | 0x03
    ARGS = struct.Struct("<IIQ")
    """VM descriptor; vSID, by which the guest will know the stream; IPA of the page where it finds
    the registers."""
    PVIOMMU = 0
    """The pvIOMMU that the stream belongs to, for the guest."""


class DmaMove:
    """The scatter-gather engine's driver, "/dev/dma-sg" of the built-in host: the device moves
    bytes between user buffers by DMA, through the SMMU."""

    MAX_PARTS = 16
    HEADER = struct.Struct("<QQ")
    """Number of parts; written back: bytes that were moved, in order."""
    PART = struct.Struct("<QQQ")
    """source, destination, length: user addresses and bytes. EFAULT outside a mapping, EIO when
    the device was stopped."""
    MOVE = 3 << 30 | (HEADER.size + MAX_PARTS * PART.size) << 16 | 0xDC << 8 | 0x02
