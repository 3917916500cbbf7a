# SPDX-License-Identifier: GPL-2.0-or-later
"""The CPU models, and how a CPU is set up before EL2 gets it.

EL3 has no software here: what firmware would do is done once. The guest starts
in non-secure EL1 and nothing it does leads to EL3.
"""

from __future__ import annotations

import ctypes

from unicorn import arm64_const
from unicorn import unicorn_const as uc

from pkvm.arm64 import registers as reg
from pkvm.machine.cpu.library import CTL_WRITE_ONE, Library
from pkvm.machine.cpu.sysregs import SystemRegisters
from pkvm.machine.cpu.unicorn_layout import UnicornLayout
from pkvm.machine.memory import PAGE_SIZE, PhysicalMemory

CPU_MODELS = {
    "cortex-a72": arm64_const.UC_CPU_ARM64_A72,
    "max": arm64_const.UC_CPU_ARM64_MAX,
}
TRANSLATION_BUFFER = 128 << 20
"""Bytes of host code that translations may take before all are dropped."""

SCR_EL3 = 1 << 0 | 1 << 7 | 1 << 8 | 1 << 10
"""NS, SMD, HCE, RW."""
SCR_EL3_PAUTH = 1 << 16 | 1 << 17
"""APK, API."""
CPTR_EL3_EZ = 1 << 8
ZCR_EL2 = reg.SysReg(3, 4, 1, 2, 0)
ZCR_EL3 = reg.SysReg(3, 6, 1, 2, 0)
ZCR_LONGEST = 15
ISAR1_PAUTH = 0xFF0
"""ID_AA64ISAR1_EL1.APA and API: address authentication by either algorithm."""
PFR0_SVE = 0xF << 32
PFR0_FP16 = 1 << 16 | 1 << 20
"""ID_AA64PFR0_EL1: FP and AdvSIMD with half precision (0 is without, 0xF is none at all)."""


def require(cpu_model: str) -> None:
    """Raise ValueError if there is no such CPU model."""
    if cpu_model not in CPU_MODELS:
        raise ValueError(f"no CPU model {cpu_model!r}; there are {', '.join(CPU_MODELS)}")


def open_machine(library: Library, cpu_model: str, memory: PhysicalMemory) -> ctypes.c_void_p:
    """A libunicorn engine with this CPU and all of RAM as one region; its handle. Raises
    EngineError if libunicorn refuses."""
    handle = ctypes.c_void_p()
    status = library.uc_open(uc.UC_ARCH_ARM64, uc.UC_MODE_ARM, ctypes.byref(handle))
    library.check(status, "make an AArch64 engine")
    try:
        _configure(library, handle, CPU_MODELS[cpu_model])
        status = library.uc_mem_map_ptr(
            handle, memory.ram_base, memory.ram_bytes, uc.UC_PROT_ALL, memory.host_address
        )
        library.check(status, f"map {memory.ram_bytes:#x} bytes of RAM at {memory.ram_base:#x}")
    except BaseException:
        library.uc_close(handle)
        raise
    return handle


def _configure(library: Library, handle: ctypes.c_void_p, model: int) -> None:
    """What must be chosen before the first register access, which makes the machine."""
    for control, value in (
        (uc.UC_CTL_CPU_MODEL, model),
        (uc.UC_CTL_UC_PAGE_SIZE, PAGE_SIZE),
        (uc.UC_CTL_TCG_BUFFER_SIZE, TRANSLATION_BUFFER),
        (uc.UC_CTL_UC_USE_EXITS, 1),
    ):
        code = CTL_WRITE_ONE | control
        library.check(library.uc_ctl(handle, code, ctypes.c_uint32(value)), "be configured")
    pc = ctypes.c_uint64()
    status = library.uc_reg_read(handle, arm64_const.UC_ARM64_REG_PC, ctypes.byref(pc))
    library.check(status, "make the CPU")


def hide_half_precision(address: int) -> None:
    """Take FEAT_FP16 out of the ID_AA64PFR0_EL1 at `address`, keeping FP and AdvSIMD."""
    pfr0 = ctypes.c_uint64.from_address(address)
    if pfr0.value & PFR0_FP16 == PFR0_FP16:
        pfr0.value &= ~PFR0_FP16


def shrink_unused_tlbs(env: int, layout: UnicornLayout) -> None:
    """Leave one TLB entry to each translation regime that no guest has: libunicorn looks at every
    entry of every regime whenever it translates a block of code, 4 % of a Linux boot. Nothing is
    done if the TLBs are not as expected."""
    size = (layout.tlb_entries - 1) * layout.tlb_entry_bytes
    masks = [
        ctypes.c_uint64.from_address(env + layout.tlb_masks + 16 * mode)
        for mode in range(layout.tlb_modes)
    ]
    if any(mask.value != size for mask in masks):
        return
    for mode, mask in enumerate(masks):
        if mode not in layout.tlb_guest_modes:
            mask.value = 0


def program_reset_state(registers: SystemRegisters) -> None:
    """EL3 as firmware leaves it, EL2 with EL1 in AArch64 and nothing trapped."""
    has_pauth = bool(registers.read(reg.ID_AA64ISAR1_EL1) & ISAR1_PAUTH)
    registers.write(reg.SCR_EL3, SCR_EL3 | (SCR_EL3_PAUTH if has_pauth else 0))
    registers.write(reg.HCR_EL2, reg.hcr("RW") | (reg.hcr("API", "APK") if has_pauth else 0))
    registers.write(reg.CPTR_EL3, CPTR_EL3_EZ)
    registers.write(reg.CPTR_EL2, reg.CPTR_RES1)
    if registers.read(reg.ID_AA64PFR0_EL1) & PFR0_SVE:
        registers.write(ZCR_EL2, ZCR_LONGEST)
        registers.write(ZCR_EL3, ZCR_LONGEST)
