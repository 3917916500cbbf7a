# SPDX-License-Identifier: GPL-2.0-or-later
"""Where libunicorn 2.1.4 keeps the state of an AArch64 CPU, as data.

The engine reads and writes a guest's registers in place, in the structures of
the QEMU code inside libunicorn: a call of the public interface costs thirty
times as much, and most of what EL2 needs has no public interface. The offsets
are those of the C headers in the 2.1.4 source package, compiled for a 64-bit
host; `selfcheck` refuses any library in which they do not hold.

`CPUARMState` ("env") is the same on every 64-bit host. What lies behind a
`sigjmp_buf` in its structure moves with the size of that type: offsets marked
*moves* are those of a host where it has 200 bytes, and `selfcheck.find_cpu`
measures by how much to correct them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UnicornLayout:
    """Byte offsets inside libunicorn's structures, and the version they belong to."""

    version: tuple[int, int, int] = (2, 1, 4)

    # struct uc_struct
    uc_cpu: int = 440
    uc_mapped_blocks: int = 1960
    """Pointer to an array of pointers to MemoryRegion; then their number, u32."""
    uc_no_exit_request: int = 2034
    """Byte; 1 keeps translations free of an exit check after every load and store."""

    # MemoryRegion and MemoryRegionOps
    region_ops: int = 16
    region_addr: int = 64
    ops_valid_max: int = 44
    """u32: bytes of the widest access; 0 means 4. The next is that of the widest that is not split.
    """
    ops_impl_max: int = 68

    # CPUState and ARMCPU
    cpu_interrupt_request: int = 28
    cpu_env_pointer: int = 296
    """Moves."""
    cpu_exception_index: int = 33184
    """Moves."""
    cpu_env: int = 41808
    """ARMCPU.env. Moves."""

    # CPUTLB, in front of CPUARMState
    tlb_masks: int = -208
    """Counted from env: for each of `tlb_modes` translation regimes a u64, the number of its TLB
    entries less one, times `tlb_entry_bytes`, and a pointer to them."""
    tlb_modes: int = 12
    tlb_entry_bytes: int = 64
    tlb_entries: int = 256
    """At first."""
    tlb_guest_modes: tuple[int, ...] = (0, 2, 4)
    """EL0, EL1, EL1 with PAN, all non-secure: what a guest uses."""

    # CPUARMState
    xregs: int = 64
    """X0-X30; the 32nd word is the stack pointer in use."""
    pc: int = 320
    pstate: int = 328
    """PSTATE without NZCV, DAIF, BTYPE and nRW, which QEMU keeps apart."""
    aarch64: int = 332
    """u32: 0 in AArch32 state."""
    banked_spsr: int = 352
    flags: int = 520
    """CF, VF, NF, ZF: 16 bytes."""
    elr_el: int = 568
    sp_el: int = 600
    sctlr_el: int = 672
    ttbr0_el1: int = 776
    ttbr1_el1: int = 808
    vttbr_el2: int = 832
    esr_el: int = 984
    far_el: int = 1048
    hpfar_el2: int = 1080
    cntvoff_el2: int = 1384
    c14_timer: int = 1392
    """Five timers (physical, virtual, EL2, secure, EL2 virtual) of CVAL and CTL, u64 each."""
    oslsr_el1: int = 2032
    syndrome: int = 3024
    """u32 of the exception being raised; then its FAR and its target EL."""
    vaddress: int = 3032
    target_el: int = 3040
    irq_line_state: int = 3064
    zregs: int = 3088
    zreg_bytes: int = 256
    exclusive_address: int = 12032
    context_bytes: int = 12336
    """All state that a CPU reset clears, which is all state of one vCPU."""
    env_uc: int = 12728
    """Back pointer to uc_struct, the last field."""
    cp_regs: int = 12736
    """ARMCPU.cp_regs, counted from env, which it follows."""

    isar_id_aa64pfr0: int = 12944
    """ARMCPU.isar.id_aa64pfr0, counted from env: what the decoder believes."""

    # ARMCPRegInfo
    ri_bytes: int = 136
    ri_type: int = 20
    ri_resetvalue: int = 40
    ri_fieldoffset: int = 48
    ri_accessfn: int = 72
    ri_readfn: int = 80
    ri_writefn: int = 88
    ri_raw_readfn: int = 96
    ri_raw_writefn: int = 104

    # Bits of ARMCPRegInfo.type
    type_special: int = 1
    type_const: int = 2
    type_no_raw: int = 0x80
    type_nop: int = 0x101
    """With `type_special`."""

    # Index in banked_spsr
    spsr_el1: int = 1

    # Bits of CPUState.interrupt_request and CPUARMState.irq_line_state
    interrupt_virq: int = 0x40
    interrupt_vfiq: int = 0x200


LAYOUT = UnicornLayout()


EL2_EL3_STATE: tuple[tuple[int, int], ...] = (
    (400, 16),  # SPSR_EL2, SPSR_EL3
    (584, 16),  # ELR_EL2, ELR_EL3
    (616, 16),  # SP_EL2, SP_EL3
    (688, 16),  # SCTLR_EL2, SCTLR_EL3
    (728, 16),  # CPTR_EL2, CPTR_EL3
    (752, 12),  # SDER32_EL3, NSACR
    (784, 16),  # TTBR0_EL2, TTBR0_EL3
    (816, 16),  # TTBR1_EL2
    (832, 8),  # VTTBR_EL2
    (872, 32),  # TCR_EL2, TCR_EL3
    (904, 16),  # VTCR_EL2
    (952, 16),  # HCR_EL2, SCR_EL3
    (1000, 16),  # ESR_EL2, ESR_EL3
    (1064, 32),  # FAR_EL2, FAR_EL3, HPFAR_EL2, HSTR_EL2
    (1200, 16),  # MAIR_EL2, MAIR_EL3
    (1232, 16),  # VBAR_EL2, VBAR_EL3
    (1280, 16),  # CONTEXTIDR_EL2
    (1312, 16),  # TPIDR_EL2, TPIDR_EL3
    (1376, 4),  # CNTHCTL_EL2
    (1384, 8),  # CNTVOFF_EL2
    (1424, 48),  # timers of EL2 and EL3
    (2040, 16),  # MDCR_EL2, MDCR_EL3
    (2824, 16),  # VPIDR_EL2, VMPIDR_EL2
    (3064, 4),  # the interrupt lines: pins, not state
    (12016, 16),  # ZCR_EL2, ZCR_EL3
)
"""(offset in env, bytes) of what a reset of EL1 leaves alone."""
