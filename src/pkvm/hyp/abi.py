# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's side of EL2's door, as numbers only: hypercalls, exit codes, shared structures.

The one module of `hyp` that the host may import. The convention is facts §9.1:
HVC #0 with X0 = HOST_CALL_BASE + n and arguments from X1; EL2 returns X0 = 0
(SUCCESS) or -1 (NOT_SUPPORTED) and the result in X1, a value or a negative
errno. Numbers below 64 are Linux 7.3's where the call is the same one; from 64
on they are pkvm's own, for what the RFC needs and upstream does not have.

Shared structures are pages that the host shares with EL2 (`HOST_SHARE_HYP`)
and names by physical address. Every word is a little-endian u64. EL2 copies
what it needs once and never trusts what it has not copied.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from pkvm.arm64 import registers as r

HOST_CALL_BASE = 0xC600_0000
SMCCC_SUCCESS = 0
SMCCC_NOT_SUPPORTED = -1


class HostCall(IntEnum):
    """Hypercall numbers n. Arguments in order; pfn and gfn are PA and IPA >> 12."""

    GIC_CONFIG = 6
    """() -> ICH_VTR_EL2: how many list registers there are."""
    VCPU_RUN = 9
    """(flags, x0, nr_lrs) -> the registers of RunResult; X1 is -EINVAL if no vCPU is loaded.
    `flags` are VcpuFlag, `x0` is what the host gives a protected vCPU (the transfer value); both
    are the answer to the last exit and count for this entry alone. `nr_lrs` list registers stand
    in the vCPU's page (`HostVcpu.VGIC_LR`), at most as many as there are; after the run that is
    where they are."""
    HOST_SHARE_HYP = 29
    """(pfn) -> 0: share one page with EL2."""
    HOST_UNSHARE_HYP = 30
    """(pfn) -> 0; -EBUSY while EL2 has it pinned."""
    HOST_DONATE_GUEST = 31
    """(pfn, gfn, nr) -> 0: give pages to the loaded protected vCPU's VM."""
    HOST_SHARE_GUEST = 32
    """(pfn, gfn, nr, prot) -> 0: map host pages into the loaded non-protected vCPU's VM."""
    HOST_UNSHARE_GUEST = 33
    """(handle, gfn, nr) -> 0: take pages back from a non-protected VM."""
    RELAX_PERMS_GUEST = 34
    """(gfn, prot) -> 0: add permissions to a page of the loaded non-protected vCPU's VM."""
    WRPROTECT_GUEST = 35
    """(handle, gfn, nr) -> 0: a non-protected VM may not write there any more."""
    TEST_CLEAR_YOUNG_GUEST = 36
    """(handle, gfn, nr, mkold) -> 1 if a non-protected VM has used a page there since it was last
    made old, else 0; makes it old if mkold is not 0."""
    MKYOUNG_GUEST = 37
    """(gfn) -> 0: a page of the loaded non-protected vCPU's VM is in use."""
    RESERVE_VM = 38
    """() -> handle."""
    UNRESERVE_VM = 39
    """(handle) -> 0."""
    INIT_VM = 40
    """(host_vm_pa, vm_area_pa, pgd_pa) -> 0: donate VM_AREA_BYTES at vm_area_pa and the stage-2
    root at pgd_pa (PGD_INFO bytes, aligned to that), create the VM."""
    INIT_VCPU = 41
    """(handle, host_vcpu_pa, vcpu_area_pa) -> 0: donate VCPU_AREA_BYTES, create the vCPU."""
    VCPU_IN_POISON_FAULT = 42
    """() -> 1 if the loaded protected vCPU's last exit was a fault on a page that the host took by
    force, 0 if on another page."""
    FORCE_RECLAIM_GUEST_PAGE = 43
    """(pa) -> 0: take the protected guest's private page at pa, zeroed; the guest never gets
    anything there again. Not in every dialect."""
    RECLAIM_DYING_GUEST_PAGE = 44
    """(handle, gfn) -> 0."""
    START_TEARDOWN_VM = 45
    """(handle) -> 0."""
    FINALIZE_TEARDOWN_VM = 46
    """(handle) -> 0; EL2's pages come back through HostVm.TEARDOWN_HEAD/NR."""
    VCPU_LOAD = 47
    """(handle, index, hcr): hcr gives HCR_EL2.TWI and TWE only. Silent when refused."""
    VCPU_PUT = 48
    """()."""
    VCPU_SYNC_STATE = 49
    """(): write the loaded non-protected vCPU's whole state to its host page."""
    TLB_FLUSH_VMID = 50
    """(handle) -> 0: flush a non-protected VM's TLB entries."""
    TOPUP_MEMCACHE = 64
    """(handle, head_pa, nr) -> pages taken: donate a linked list of pages (next PA in the first
    word of each) to the VM's table-page cache. -ENOMEM after the first page that EL2 refuses."""
    SET_FIRMWARE = 65
    """(handle, ipa, bytes) -> 0: the guest firmware goes to this IPA range, its rest zeroed, when
    the range is donated (Android: page by page); the primary starts there. Not in every
    dialect."""
    DONATE_GUEST_SGLIST = 66
    """(handle, list_pa, nr) -> 0: give many ranges to a protected VM, all or none. The list is
    host memory, nr entries of three u64: pfn, gfn, number of pages."""
    RECLAIM_DYING_GUEST_RANGE = 67
    """(handle, gfn, nr) -> pages reclaimed; gfns with nothing mapped are passed over."""
    PGD_INFO = 68
    """() -> bytes of a guest's stage-2 root, which is also its alignment."""
    FIRMWARE_INFO = 69
    """() -> bytes of the guest firmware that EL2 holds, 0 if none."""
    VCPU_TIMER = 70
    """(handle, index) -> 1 if the vCPU's virtual timer asserts its output now, else 0; -ENOENT if
    there is no such vCPU."""
    SPLIT_GUEST = 71
    """(gfn, nr) -> 0: have pages in place of a block of nr = 512 of the loaded vCPU's VM. Not in
    every dialect."""
    VCPU_FEATURES = 72
    """() -> the KVM_ARM_VCPU_PTRAUTH_* features that a vCPU may ask for on this CPU, a mask."""

    IOMMU_ALLOC_DOMAIN = 80
    """(domain, root_pa) -> 0: make the DMA address space `domain`, 1 to MAX_DOMAINS; PGD_INFO bytes
    at root_pa, aligned to that, are donated. The IOMMU calls exist on a host in protected mode
    with an SMMU."""
    IOMMU_FREE_DOMAIN = 81
    """(domain) -> PA of the first of the pages that return, each with the next one's PA in its
    first word. What is mapped is unpinned. -EBUSY while a stream is attached."""
    IOMMU_TOPUP = 82
    """(domain, head_pa, nr) -> pages taken: as TOPUP_MEMCACHE, for the domain's tables."""
    IOMMU_ATTACH = 83
    """(domain, stream) -> 0: from the identity domain."""
    IOMMU_DETACH = 84
    """(domain, stream) -> 0: back to the identity domain."""
    IOMMU_MAP = 85
    """(domain, iova, pa, bytes, prot) -> 0: pages of the host's own, all or none; each is pinned
    until it is unmapped. `prot` is DmaProt."""
    IOMMU_UNMAP = 86
    """(domain, iova, bytes) -> bytes that were mapped there."""
    IOMMU_EVENTS = 87
    """(page_pa) -> n: the events of the host's devices, oldest first, in a page that is shared with
    EL2 (HostSmmuEvents)."""
    ASSIGN_DEVICE = 88
    """(handle, pa, pviommu, vsid) -> 0: give the device with its registers at `pa` to a protected
    VM, which will know its stream by the last two numbers. The host loses the registers, the device
    reaches nothing, and is reset. Until the VM's teardown starts. Not in every dialect."""
    MAP_DEVICE_GUEST = 89
    """(handle, pa, gfn) -> 0: let the VM at one page of the registers of a device it was given."""


class DmaProt(IntFlag):
    """What a domain's devices may do with a page (facts §10)."""

    READ = 1
    WRITE = 2
    CACHE = 4
    """Coherent; here everything is."""
    NOEXEC = 8
    """Here nothing is executable."""
    MMIO = 16
    """The page is a device's registers."""
    PRIV = 32
    """For privileged transactions; only a guest says so, and here it changes nothing."""


MAX_DOMAINS = 64
MAX_GUEST_DOMAINS = 8
"""Of each VM."""
SMMU_EVENT_WORDS = 4
SMMU_EVENTS_A_CALL = 64


class HostSmmuEvents:
    """Offsets in the page of IOMMU_EVENTS."""

    OVERFLOWS = 0x000
    """How often, since the start, events were lost because nobody took them."""
    RECORDS = 0x008
    """SMMU_EVENTS_A_CALL records of four words: event number (SMMUv3), StreamID, 1 for a read or 0
    for a write, address."""


class ExitCode(IntEnum):
    """VCPU_RUN's answer when not a negative errno (facts §A)."""

    IRQ = 0
    EL1_SERROR = 1
    TRAP = 2
    """A synchronous exception; RunResult says which, as far as §5.4 lets."""
    ILLEGAL = 3
    """The vCPU cannot run: powered off, in AArch32 state, or an exit that nobody may handle."""
    HYP_REQ = 4
    """EL2 wants something first: RunResult.REQ_TYPE and REQ_PAGES."""


class HypRequest(IntEnum):
    """RunResult.REQ_TYPE."""

    NONE = 0
    MEMCACHE = 1
    """TOPUP_MEMCACHE with REQ_PAGES pages, then run again; the guest's HVC is executed again."""
    MAP = 2
    """HOST_DONATE_GUEST of the page at REQ_IPA, then run again likewise."""


class RunResult:
    """VCPU_RUN's results: numbers of the registers X1 to X7. What the exit's class does not show
    (facts §5.4) is 0."""

    CODE = 1
    """ExitCode, or a negative errno; then there are no further results."""
    ESR = 2
    X0 = 3
    """The universal transfer register: X0 of a call, the data of a store."""
    FAR = 4
    HPFAR = 5
    PSTATE = 6
    """Of a protected vCPU the mode alone."""
    SCTLR_EE = 7
    """SCTLR_EL1 bits EE and E0E of a protected guest at a data abort; nothing else of it."""
    X1 = 4
    X2 = 5
    """Arguments of a protected guest's call."""
    REQ_TYPE = 2
    REQ_PAGES = 3
    REQ_IPA = 4
    """For ExitCode.HYP_REQ."""
    COUNT = 8


class VcpuFlag(IntFlag):
    """VCPU_RUN's flags."""

    INCREMENT_PC = 1
    PENDING_EXCEPTION = 2
    DIRTY = 4
    """Not if EL2 keeps the registers: the host changed those in its page."""
    DIRTY_X = 8
    """Likewise: of those X0-X30 alone."""


class HostVm:
    """Offsets in the page that stands for the host's `struct kvm`."""

    HANDLE = 0x00
    PROTECTED = 0x08
    CREATED_VCPUS = 0x10
    TEARDOWN_HEAD = 0x18
    """Written by FINALIZE_TEARDOWN_VM: PA of the first returned page; each links to the next in
    its first word, 0 at the end. All other bytes of the pages are zero."""
    TEARDOWN_NR = 0x20


CONTEXT_SYSREGS = (
    r.SCTLR_EL1, r.ACTLR_EL1, r.CPACR_EL1, r.TTBR0_EL1, r.TTBR1_EL1, r.TCR_EL1, r.ESR_EL1,
    r.AFSR0_EL1, r.AFSR1_EL1, r.FAR_EL1, r.PAR_EL1, r.MAIR_EL1, r.AMAIR_EL1, r.VBAR_EL1,
    r.CONTEXTIDR_EL1, r.TPIDR_EL1, r.TPIDR_EL0, r.TPIDRRO_EL0, r.CNTKCTL_EL1,
)  # fmt: skip
"""System registers of HostVcpu.SYSREGS, in order."""


class HostVcpu:
    """Offsets in the page that stands for the host's `struct kvm_vcpu`.

    EL2 reads it when a vCPU is made and when it starts; what a protected vCPU does later it
    never writes there.
    """

    X = 0x000
    """X0-X30."""
    SP_EL0 = 0x0F8
    PC = 0x100
    PSTATE = 0x108
    VSESR = 0x128
    VCPU_ID = 0x138
    """Written by the host before INIT_VCPU; EL2 reads it once."""
    VCPU_IDX = 0x140
    FEATURES = 0x148
    """Bit mask of KVM_ARM_VCPU_* features; read once by INIT_VCPU."""
    MP_STATE = 0x150
    ENTROPY = 0x158
    """Three words of the host's randomness, for the answer to TRNG_RND32 and TRNG_RND64."""
    SP_EL1 = 0x170
    ELR_EL1 = 0x178
    SPSR_EL1 = 0x180
    SYSREGS = 0x200
    """One word for each of CONTEXT_SYSREGS."""
    FP = 0x400
    """V0-V31 (512 bytes), FPSR and FPCR (u32 each)."""
    VGIC_HCR = 0x880
    """ICH_HCR_EL2. The host's: the enables of maintenance interrupts, which count only beside list
    registers. After a run, EL2's: the same and EOIcount, which is told once. Like all words of the
    interface it is written only if the guest changed any of them: the host clears EOIcount when
    it has taken it."""
    VGIC_VMCR = 0x888
    """ICH_VMCR_EL2 after a run; 0 until the guest has changed it means as reset."""
    VGIC_MISR = 0x890
    """ICH_MISR_EL2 after a run; says something only after an exit for an interrupt."""
    VGIC_LR = 0x8C0
    """ICH_LR0_EL2 on (room for 16)."""


VM_AREA_BYTES = 0x1000
VCPU_AREA_BYTES = 0x4000
"""EL2's own vCPU: the saved CPU context and what EL2 keeps beside it."""
MAX_VCPUS = 512
MAX_VMS = 255
HANDLE_BASE = 0x1000
SGLIST_ENTRY_BYTES = 24

PROT_R = 1
PROT_W = 2
PROT_X = 4
PROT_RWX = PROT_R | PROT_W | PROT_X
