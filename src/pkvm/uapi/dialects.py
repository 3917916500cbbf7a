# SPDX-License-Identifier: GPL-2.0-or-later
"""The three dialects of protected KVM, as their users see them: one table (facts §2).

`rfc` is the mail of 2021, made to work; `android` what the Android common kernel
made of it; `upstream` what Linux 7.3 has. A host speaks one of them. Each field
of `Dialect` is a row of the table; the built-in host goes by the fields, a VMM
finds out which dialect it meets (`pkvm.kvm.Kvm.dialect`), and docs/dialects.md
is written from `ROWS`. What EL2 does differently stands in `pkvm.hyp.policy`.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from pkvm.uapi.kvm import TYPE_PROTECTED, Cap


class Creation(Enum):
    """How a VM becomes protected."""

    ENABLE_CAP = (
        "KVM_ENABLE_CAP(ARM_PROTECTED_VM) with flags ENABLE, until the first KVM_RUN (then EBUSY)"
    )
    TYPE_BIT = "KVM_CREATE_VM with bit 31 of the machine type"


class Unprotected(Enum):
    """What who wants protection gets on a host that is not in protected mode."""

    CAP_IS_ZERO = "KVM_CHECK_EXTENSION gives 0, ENABLE gives EINVAL"
    EINVAL = "KVM_CREATE_VM gives EINVAL"


class TypeBits(Enum):
    """Which bits of the machine type there are."""

    IPA_SIZE = "bits 0-7 (IPA size); any other: EINVAL"
    IPA_SIZE_AND_PROTECTED = "bits 0-7 (IPA size) and bit 31; any other: EINVAL"


class Firmware(Enum):
    """How guest firmware gets into a VM."""

    SLOT = "a memory slot, named by ENABLE; a VM without firmware does not run"
    ADDRESS = (
        "an IPA, named by SET_FW_IPA until the first KVM_RUN (then EBUSY); its pages come as the "
        "guest touches them; a VM without firmware starts where the VMM says"
    )
    NONE = "there is none"


class Info(Enum):
    """When a VMM can ask for the firmware's size."""

    ANY_TIME = "at any time; a size in args[1] asks for so many bytes of the structure"
    ANY_TIME_WHOLE = "at any time, of a protected VM; args[1] must be 0"
    NONE = "never"


class Primary(Enum):
    """Which vCPU starts by itself."""

    FIRST_TO_ENTER = "the first vCPU to enter; another without POWER_OFF gets EPERM"
    RUNNABLE = (
        "each vCPU that is RUNNABLE when the first one runs; with firmware a second one gets EINVAL"
    )
    ANY = "no vCPU is special: as in any VM of KVM's"


class Calls(Enum):
    """Who answers a protected guest's PSCI, SMCCC and TRNG calls."""

    EL2 = "EL2: PSCI 1.1, SMCCC 1.2, TRNG 1.0"
    HOST = "the host's KVM: PSCI 0.2 to 1.3 as the VMM chooses (1.3), SMCCC 1.1, TRNG 1.0"


class Unknown(Enum):
    """What becomes of a protected guest's call that EL2 does not know."""

    NOT_SUPPORTED = "NOT_SUPPORTED from EL2; the host learns nothing"
    TO_HOST = "it goes to the host, which answers NOT_SUPPORTED"


class Smc(Enum):
    """What becomes of a protected guest's SMC."""

    NOT_SUPPORTED = "NOT_SUPPORTED from EL2"
    AS_HVC = "the host serves it as an HVC, if its immediate is 0"


class Registers(Enum):
    """Whose a protected vCPU's registers are."""

    HIDDEN = "EL2's: the host sees and sets what an exit's class lets"
    VISIBLE = "the host's to read and write; memory alone is protected"


class Setting(Enum):
    """When KVM_SET_ONE_REG of a protected vCPU counts."""

    FIRMWARE_ARGUMENTS = "X0-X14 of the primary, before it enters"
    FIRST_RUN = "before the first run: X0-X14 with firmware, else X0 and PC"
    ALWAYS = "at any time"


class InitAgain(Enum):
    """What a second KVM_ARM_VCPU_INIT of a protected vCPU does."""

    IGNORED = "changes the host's copy; the guest's state is EL2's"
    RESETS = "resets the vCPU"


class Memory(Enum):
    """How and when a protected guest gets its memory."""

    AT_ENABLE = "all memory slots, at ENABLE, in 2 MiB blocks where they fit"
    TOUCHED_BLOCKS = "at its first touch: pinned, 2 MiB blocks where they fit"
    TOUCHED_PAGES = "at its first touch: pinned, page by page"


class Slots(Enum):
    """Which changes of memory slots a protected VM refuses (EPERM)."""

    ALL_AFTER_ENABLE = "every change after ENABLE; READONLY or LOG_DIRTY_PAGES at ENABLE: EINVAL"
    GONE_AFTER_RUN = (
        "delete and move after the first KVM_RUN; READONLY and LOG_DIRTY_PAGES always; adding "
        "is allowed"
    )


class Vcpus(Enum):
    """Until when a protected VM gets vCPUs."""

    ALWAYS = "at any time"
    FIRST_RUN = "until the first KVM_RUN: a later one initialises, and its KVM_RUN gives EINVAL"


class LostPage(Enum):
    """What a kernel access without a fix-up (/proc/self/mem, vmsplice) does to a private page."""

    TAKEN = "the page is taken by force and reads zero; the guest's next touch aborts"
    TAKEN_EFAULT = (
        "the page is taken by force and reads zero; the guest's next touch makes KVM_RUN give "
        "EFAULT"
    )
    OOPS = "the kernel dies (oops); the page stays the guest's"


class Dma(Enum):
    """Whether devices reach a protected guest's private pages."""

    PROMISED = "promised, and so refused"
    DRIVERS = "EL2's IOMMU drivers refuse"
    MISSING = "not implemented there; this machine refuses all the same"


class Filter(Enum):
    """Which capabilities a protected VM's descriptor reports."""

    NONE = "the system's"
    ANDROID = "a list, ARM_PROTECTED_VM in it; any other: 0"
    UPSTREAM = "a list; any other: 0"


class StolenTime(Enum):
    """Whether a protected guest learns how long its vCPUs waited for the CPU (PV_TIME)."""

    NONE = "no: NOT_SUPPORTED from EL2"
    SHARED = "as the VMM arranges it, in a page that the guest has shared"


class Ranges(Enum):
    """How much one MEM_SHARE or MEM_UNSHARE shares."""

    MANY = "a number of granules; done in part, it says how many"
    ONE = "one granule; X2 and X3 must be 0"


class Untouched(Enum):
    """What becomes of MEM_SHARE of a frame that has no page yet."""

    REFUSED = "INVALID_PARAMETER: all memory is there from the start"
    REQUEST = "EL2 asks the host for the page, and the call is made again"
    FAULT = "the host sees a fault there, and the call is made again"


ALWAYS_ASKED = frozenset(
    {
        Cap.USER_MEMORY, Cap.NR_MEMSLOTS, Cap.COALESCED_MMIO, Cap.SYNC_MMU,
        Cap.DESTROY_MEMORY_REGION_WORKS, Cap.IRQ_ROUTING, Cap.JOIN_MEMORY_REGIONS_WORKS,
        Cap.IRQFD, Cap.INTERNAL_ERROR_DATA, Cap.SIGNAL_MSI, Cap.DEVICE_CTRL, Cap.ENABLE_CAP_VM,
        Cap.CHECK_EXTENSION_VM, Cap.MULTI_ADDRESS_SPACE, Cap.IOEVENTFD_ANY_LENGTH,
        Cap.COALESCED_PIO, Cap.MANUAL_DIRTY_LOG_PROTECT2, Cap.HALT_POLL, Cap.DIRTY_LOG_RING,
        Cap.BINARY_STATS_FD, Cap.SYSTEM_EVENT_DATA, Cap.DIRTY_LOG_RING_ACQ_REL,
        Cap.DIRTY_LOG_RING_WITH_BITMAP, Cap.USER_MEMORY2, Cap.GUEST_MEMFD, Cap.GUEST_MEMFD_FLAGS,
    }
)  # fmt: skip
"""Capabilities of KVM itself: no filter of the architecture's is asked about them."""
_PKVM_CAPS = frozenset(
    {
        Cap.IRQCHIP, Cap.ARM_PSCI, Cap.ARM_PSCI_0_2, Cap.NR_VCPUS, Cap.MAX_VCPUS, Cap.MAX_VCPU_ID,
        Cap.MSI_DEVID, Cap.ARM_VM_IPA_SIZE, Cap.ARM_PTRAUTH_ADDRESS, Cap.ARM_PTRAUTH_GENERIC,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Dialect:
    """One dialect. Every field is a row of the table; `ROWS` says what it is about."""

    name: str
    creation: Creation
    capability: int | None
    """The number of KVM_CAP_ARM_PROTECTED_VM; None if there is no such capability."""
    flags: Mapping[str, int]
    """`flags` of KVM_ENABLE_CAP(ARM_PROTECTED_VM): one value each, not a mask."""
    unprotected: Unprotected
    type_bits: TypeBits
    firmware: Firmware
    info: Info
    primary: Primary
    calls: Calls
    unknown_call: Unknown
    smc: Smc
    time_of_day: bool
    """Whether a protected guest can ask for the time of day (KVM_PTP)."""
    stolen_time: StolenTime
    registers: Registers
    set_one_reg: Setting
    vcpu_init_again: InitAgain
    memory: Memory
    slots: Slots
    vcpus: Vcpus
    memlock: bool
    """Whether a guest's pages count as locked by the VMM's process (RLIMIT_MEMLOCK, ENOMEM)."""
    lost_page: LostPage
    relinquish: bool
    """Whether a guest can give a page back (MEM_RELINQUISH)."""
    dma: Dma
    mmio_guard: bool
    """Whether a guest can say where its devices are."""
    ranges: Ranges
    untouched_share: Untouched
    filter: Filter
    caps: frozenset[Cap] | None
    """The filter's list, beside `ALWAYS_ASKED`; None for no filter."""
    taints: bool
    """Whether the first protected VM taints the host kernel."""

    @property
    def type_mask(self) -> int:
        """The bits of KVM_CREATE_VM's machine type that there are."""
        return 0xFF | (TYPE_PROTECTED if self.creation is Creation.TYPE_BIT else 0)

    def offers(self, cap: int) -> bool:
        """Whether the filter lets a protected VM's descriptor report this capability."""
        if self.caps is None or cap == self.capability:
            return True
        return cap in self.caps or cap in ALWAYS_ASKED


RFC = Dialect(
    name="rfc",
    creation=Creation.ENABLE_CAP,
    capability=int(Cap.ARM_PROTECTED_VM),
    flags={"ENABLE": 0, "INFO": 1},
    unprotected=Unprotected.CAP_IS_ZERO,
    type_bits=TypeBits.IPA_SIZE,
    firmware=Firmware.SLOT,
    info=Info.ANY_TIME,
    primary=Primary.FIRST_TO_ENTER,
    calls=Calls.EL2,
    unknown_call=Unknown.NOT_SUPPORTED,
    smc=Smc.NOT_SUPPORTED,
    time_of_day=False,
    stolen_time=StolenTime.NONE,
    registers=Registers.HIDDEN,
    set_one_reg=Setting.FIRMWARE_ARGUMENTS,
    vcpu_init_again=InitAgain.IGNORED,
    memory=Memory.AT_ENABLE,
    slots=Slots.ALL_AFTER_ENABLE,
    vcpus=Vcpus.ALWAYS,
    memlock=False,
    lost_page=LostPage.TAKEN,
    relinquish=False,
    dma=Dma.PROMISED,
    mmio_guard=False,
    ranges=Ranges.MANY,
    untouched_share=Untouched.REFUSED,
    filter=Filter.NONE,
    caps=None,
    taints=False,
)

ANDROID = Dialect(
    name="android",
    creation=Creation.TYPE_BIT,
    capability=0xFFBA_DAB1,
    flags={"SET_FW_IPA": 0, "INFO": 1, "SET_FFA": 2},
    unprotected=Unprotected.EINVAL,
    type_bits=TypeBits.IPA_SIZE_AND_PROTECTED,
    firmware=Firmware.ADDRESS,
    info=Info.ANY_TIME_WHOLE,
    primary=Primary.RUNNABLE,
    calls=Calls.EL2,
    unknown_call=Unknown.NOT_SUPPORTED,
    smc=Smc.NOT_SUPPORTED,
    time_of_day=False,
    stolen_time=StolenTime.NONE,
    registers=Registers.HIDDEN,
    set_one_reg=Setting.FIRST_RUN,
    vcpu_init_again=InitAgain.IGNORED,
    memory=Memory.TOUCHED_BLOCKS,
    slots=Slots.GONE_AFTER_RUN,
    vcpus=Vcpus.FIRST_RUN,
    memlock=True,
    lost_page=LostPage.OOPS,
    relinquish=True,
    dma=Dma.DRIVERS,
    mmio_guard=True,
    ranges=Ranges.MANY,
    untouched_share=Untouched.REQUEST,
    filter=Filter.ANDROID,
    caps=_PKVM_CAPS | {Cap.ARM_PMU_V3, Cap.ARM_SVE},
    taints=False,
)

UPSTREAM = Dialect(
    name="upstream",
    creation=Creation.TYPE_BIT,
    capability=None,
    flags={},
    unprotected=Unprotected.EINVAL,
    type_bits=TypeBits.IPA_SIZE_AND_PROTECTED,
    firmware=Firmware.NONE,
    info=Info.NONE,
    primary=Primary.ANY,
    calls=Calls.HOST,
    unknown_call=Unknown.TO_HOST,
    smc=Smc.AS_HVC,
    time_of_day=True,
    stolen_time=StolenTime.SHARED,
    registers=Registers.VISIBLE,
    set_one_reg=Setting.ALWAYS,
    vcpu_init_again=InitAgain.RESETS,
    memory=Memory.TOUCHED_PAGES,
    slots=Slots.GONE_AFTER_RUN,
    vcpus=Vcpus.FIRST_RUN,
    memlock=True,
    lost_page=LostPage.TAKEN_EFAULT,
    relinquish=False,
    dma=Dma.MISSING,
    mmio_guard=False,
    ranges=Ranges.ONE,
    untouched_share=Untouched.FAULT,
    filter=Filter.UPSTREAM,
    caps=_PKVM_CAPS,
    taints=True,
)

DIALECTS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in (RFC, ANDROID, UPSTREAM)}
"""By name, the oldest first."""
DEFAULT = RFC.name


class Row(NamedTuple):
    """A row of the table: a field of `Dialect`, and what it is about."""

    field: str
    topic: str

    def answer(self, dialect: Dialect) -> str:
        """A dialect's cell, in words."""
        value = getattr(dialect, self.field)
        if value is None:
            return "none"
        if isinstance(value, Enum):
            return str(value.value)
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, int):
            return str(value) if value < 1 << 16 else f"{value:#x}"
        return ", ".join(f"{name} {number}" for name, number in value.items()) or "none"


ROWS = (
    Row("creation", "How a VM becomes protected"),
    Row("capability", "KVM_CAP_ARM_PROTECTED_VM"),
    Row("flags", "Its flags"),
    Row("unprotected", "A host that is not in protected mode"),
    Row("type_bits", "Bits of the machine type"),
    Row("filter", "Capabilities of a protected VM"),
    Row("firmware", "Guest firmware"),
    Row("info", "The firmware's size is told (INFO)"),
    Row("primary", "Who starts"),
    Row("calls", "PSCI, SMCCC and TRNG of a protected guest"),
    Row("unknown_call", "A hypercall that nobody knows"),
    Row("smc", "SMC of a protected guest"),
    Row("time_of_day", "A protected guest asks for the time of day (PTP)"),
    Row("stolen_time", "Stolen time of a protected guest (PV_TIME)"),
    Row("registers", "Registers of a protected vCPU"),
    Row("set_one_reg", "KVM_SET_ONE_REG of a protected vCPU"),
    Row("vcpu_init_again", "KVM_ARM_VCPU_INIT again, after a run"),
    Row("memory", "A protected guest gets its memory"),
    Row("slots", "Memory slots of a protected VM refuse"),
    Row("vcpus", "vCPUs may be added"),
    Row("memlock", "Pages of the guest count for RLIMIT_MEMLOCK (ENOMEM)"),
    Row("lost_page", "The host kernel touches a private page"),
    Row("relinquish", "A guest gives a page back (MEM_RELINQUISH)"),
    Row("dma", "DMA isolation"),
    Row("mmio_guard", "MMIO guard"),
    Row("ranges", "MEM_SHARE and MEM_UNSHARE"),
    Row("untouched_share", "MEM_SHARE of memory that was never touched"),
    Row("taints", "The first protected VM taints the host kernel"),
)
