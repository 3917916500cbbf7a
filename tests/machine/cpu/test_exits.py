# SPDX-License-Identifier: GPL-2.0-or-later
"""What reaches EL2's vector, with which syndrome (Arm ARM D24.2.40)."""

from __future__ import annotations

import ctypes

import pytest

from fakes.cpu_fixtures import MakeGuest
from fakes.cpu_guest import (
    CODE,
    DATA,
    HCR,
    PAGE_RWX,
    ROOT,
    UNMAPPED,
    WFE,
    WFI,
    Guest,
    br,
    hvc,
    ldp,
    ldr,
    ldrsb_w,
    mov,
    movz,
    mrs,
    msr,
    set_virtual_irq,
    smc,
    str_,
    strh,
)
from pkvm.arm64 import esr, stage2
from pkvm.arm64 import registers as reg
from pkvm.arm64.esr import EC, hpfar_to_ipa
from pkvm.arm64.registers import SysReg
from pkvm.machine.cpu.engine import StopReason
from pkvm.machine.cpu.errors import EngineError
from pkvm.machine.cpu.library import INTERRUPT_HOOK, Library
from pkvm.machine.cpu.timers import host_counter
from pkvm.machine.cpu.unicorn_engine import UnicornEngine

FAULT = esr.FSC_TRANSLATION + 3


def test_hvc_has_its_immediate_and_returns_behind_itself(guest: Guest) -> None:
    found = guest.run(movz(0, 7), hvc(0xABCD))
    assert found.esr == 0x5A00_ABCD
    assert found.pc == CODE + 8
    assert guest.engine.x[0] == 7


def test_guest_goes_on_after_a_vector_that_returns_true(guest: Guest) -> None:
    guest.run(hvc(1), movz(3, 5), hvc(2), exits=2)
    assert [found.iss for found in guest.exits] == [1, 2]
    assert [found.pc for found in guest.exits] == [CODE + 4, CODE + 12]
    assert guest.engine.x[3] == 5


def test_results_of_a_hypercall_reach_the_guest(guest: Guest) -> None:
    engine = guest.engine
    guest.write(CODE, movz(0, 1), movz(1, 2), movz(2, 3), movz(3, 4), hvc(0), hvc(1))
    seen: list[tuple[int, ...]] = []

    def vector() -> bool:
        seen.append(engine.args())
        engine.set_results(5, 6, 7, (1 << 64) - 1)
        return len(seen) < 2

    engine.vector = vector
    engine.pc = CODE
    assert engine.run() is StopReason.VECTOR
    assert seen == [(1, 2, 3, 4), (5, 6, 7, (1 << 64) - 1)]


def test_firmware_slot_at_zero_runs(guest: Guest) -> None:
    guest.write(0, movz(0, 1), hvc(3))
    guest.engine.vector = lambda: False
    guest.engine.pc = 0
    assert guest.engine.run() is StopReason.VECTOR
    assert (guest.engine.pc, guest.engine.x[0]) == (8, 1)


def test_smc_is_trapped_at_the_instruction(guest: Guest) -> None:
    found = guest.run(smc(3))
    assert (found.ec, found.iss, found.pc) == (EC.SMC64, 3, CODE)


def test_wfi_is_trapped_with_twi_and_a_nop_without(guest: Guest) -> None:
    found = guest.run(WFI)
    assert (found.ec, found.iss & esr.WFX_TI_WFE, found.pc) == (EC.WFX, 0, CODE)
    guest.engine.write_sysreg(reg.HCR_EL2, reg.hcr("VM", "RW"))
    found = guest.run(WFI, WFI, WFE, hvc(4))
    assert (found.ec, found.iss, found.pc) == (EC.HVC64, 4, CODE + 16)


@pytest.mark.parametrize(
    ("trap", "word", "register", "read"),
    [
        ("TID3", mrs(3, reg.ID_AA64PFR0_EL1), reg.ID_AA64PFR0_EL1, 1),
        ("TVM", msr(reg.TTBR0_EL1, 7), reg.TTBR0_EL1, 0),
        ("TACR", mrs(2, reg.ACTLR_EL1), reg.ACTLR_EL1, 1),
        ("TSW", 0xD5087640 | 5, SysReg(1, 0, 7, 6, 2), 0),  # DC ISW, X5
    ],
)
def test_trapped_system_registers(
    guest: Guest, trap: str, word: int, register: SysReg, read: int
) -> None:
    guest.engine.write_sysreg(reg.HCR_EL2, HCR | reg.hcr(trap))
    found = guest.run(word)
    assert (found.ec, found.pc) == (EC.SYS64, CODE)
    assert SysReg.from_iss(found.iss) == register
    assert found.iss & esr.SYS64_READ == read
    assert found.iss >> esr.SYS64_RT_SHIFT & 31 == word & 31


@pytest.mark.parametrize(
    ("word", "offset", "iss"),
    [
        (ldr(3, 1, 8), 8, esr.ISV | 3 << esr.SAS_SHIFT | 3 << esr.SRT_SHIFT | esr.SF),
        (strh(4, 1, 2), 2, esr.ISV | 1 << esr.SAS_SHIFT | 4 << esr.SRT_SHIFT | esr.WNR),
        (ldrsb_w(5, 1, 3), 3, esr.ISV | esr.SSE | 5 << esr.SRT_SHIFT),
        (ldp(4, 5, 1), 0, 0),
    ],
)
def test_data_abort_has_everything_for_mmio(guest: Guest, word: int, offset: int, iss: int) -> None:
    found = guest.run(*mov(1, UNMAPPED), word)
    assert (found.ec, found.iss) == (EC.DABT_LOW, iss | FAULT)
    assert found.far == UNMAPPED + offset
    assert hpfar_to_ipa(found.hpfar) == UNMAPPED
    assert found.pc == CODE + 16


def test_all_that_a_trap_shows_in_one_read(guest: Guest) -> None:
    engine = guest.engine
    found = guest.run(*mov(1, UNMAPPED), str_(2, 1), pstate=0xA000_03C5)
    sctlr = engine.read_sysreg(reg.SCTLR_EL1)
    assert engine.trap_state() == (
        found.esr, CODE + 16, 0xA000_03C5, sctlr, UNMAPPED, found.hpfar
    )  # fmt: skip
    assert hpfar_to_ipa(found.hpfar) == UNMAPPED
    assert sctlr == reg.SCTLR_EL1_RESET


def test_emulated_store_happens_once_and_execution_goes_on_behind_it(guest: Guest) -> None:
    engine = guest.engine
    guest.write(CODE, *mov(1, UNMAPPED), movz(2, 9), str_(2, 1), movz(3, 1), hvc(0))

    def vector() -> bool:
        if guest.note() and guest.exits[-1].ec == EC.DABT_LOW:
            engine.pc += 4
            return True
        return False

    engine.vector = vector
    engine.pc = CODE
    engine.run()
    assert [found.ec for found in guest.exits] == [EC.DABT_LOW, EC.HVC64]
    assert engine.x[3] == 1


def test_fetch_where_nothing_is_mapped(guest: Guest) -> None:
    found = guest.run(*mov(1, UNMAPPED), br(1))
    assert (found.ec, found.iss) == (EC.IABT_LOW, FAULT)
    assert (found.pc, found.far) == (UNMAPPED, UNMAPPED)
    assert hpfar_to_ipa(found.hpfar) == UNMAPPED


@pytest.mark.parametrize(
    ("attributes", "word", "ec", "fsc"),
    [
        (PAGE_RWX & ~stage2.S2AP_W, str_(0, 1), EC.DABT_LOW, esr.FSC_PERMISSION | esr.WNR),
        (PAGE_RWX & ~stage2.S2AP_R, ldr(0, 1), EC.DABT_LOW, esr.FSC_PERMISSION),
        (PAGE_RWX & ~stage2.AF, ldr(0, 1), EC.DABT_LOW, esr.FSC_ACCESS_FLAG),
        (PAGE_RWX | stage2.XN_NONE, br(1), EC.IABT_LOW, esr.FSC_PERMISSION),
    ],
)
def test_permissions_of_a_leaf(guest: Guest, attributes: int, word: int, ec: EC, fsc: int) -> None:
    guest.map(DATA, attributes)
    found = guest.run(*mov(1, DATA), word)
    assert (found.ec, found.iss & (esr.FSC_MASK | esr.WNR)) == (ec, fsc + 3)
    assert hpfar_to_ipa(found.hpfar) == DATA


def test_fault_on_a_stage1_table_walk_names_the_table(guest: Guest) -> None:
    guest.enable_stage1()
    guest.write_bytes(DATA + 0x1000 + 8, (UNMAPPED | 3).to_bytes(8, "little"))
    found = guest.run(*mov(1, 0x20_0000), ldr(0, 1))
    assert found.ec == EC.DABT_LOW
    assert found.iss & esr.S1PTW
    assert hpfar_to_ipa(found.hpfar) == UNMAPPED
    assert found.far == 0x20_0000


def test_stale_translation_stays_until_the_tlb_is_flushed(guest: Guest) -> None:
    engine = guest.engine
    guest.write_bytes(DATA, (0x1234).to_bytes(8, "little"))
    guest.write(CODE, *mov(1, DATA), ldr(2, 1), hvc(0), ldr(3, 1), hvc(1), ldr(4, 1), hvc(2))

    def vector() -> bool:
        match guest.note():
            case 1:
                guest.unmap(DATA)
            case 2:
                engine.flush_tlb()
            case _:
                return False
        return True

    engine.vector = vector
    engine.pc = CODE
    engine.run()
    assert [found.ec for found in guest.exits] == [EC.HVC64, EC.HVC64, EC.DABT_LOW]
    assert engine.x[2] == engine.x[3] == 0x1234


def test_writing_vttbr_flushes(guest: Guest) -> None:
    guest.run(*mov(1, DATA), ldr(2, 1), hvc(0))
    guest.unmap(DATA)
    guest.engine.write_sysreg(reg.VTTBR_EL2, stage2.vttbr(ROOT, vmid=2))
    assert guest.run(*mov(1, DATA), ldr(2, 1), hvc(0)).ec == EC.DABT_LOW


def test_code_changed_from_outside_needs_invalidation(guest: Guest) -> None:
    assert guest.run(movz(0, 1), hvc(0)).ec == EC.HVC64
    changed = movz(0, 2).to_bytes(4, "little")
    guest.memory.write(0x8010_0000 + CODE, changed)
    guest.engine.invalidate_code(0x8010_0000 + CODE, 4)
    guest.engine.pc = CODE
    guest.engine.run()
    assert guest.engine.x[0] == 2


def test_invalidation_outside_ram_is_harmless(guest: Guest) -> None:
    guest.engine.invalidate_code(0, 0x1000)
    guest.engine.invalidate_code(0x7FFF_F000, 0x3000)
    guest.engine.invalidate_code(0x8010_0000, 0)
    guest.run_known_program()


def test_guest_that_changes_its_own_code(guest: Guest) -> None:
    new = movz(5, 77)
    guest.run(*mov(1, CODE + 8 * 4), *mov(2, new | hvc(1) << 32), str_(2, 1), hvc(0), exits=1)
    guest.engine.pc = CODE + 8 * 4
    guest.engine.run()
    assert guest.engine.x[5] == 77
    assert guest.exits[-1].iss == 1


def test_untaken_exception_kinds_never_reach_el3(guest: Guest) -> None:
    guest.engine.write_sysreg(reg.HCR_EL2, reg.hcr("VM", "RW"))
    found = guest.run(smc(0))
    assert found.iss == 0x99
    assert guest.engine.x[21] == esr.IL


def test_exception_in_the_vector_comes_out_of_run(guest: Guest) -> None:
    class PanicError(Exception):
        pass

    def vector() -> bool:
        raise PanicError("EL2")

    guest.write(CODE, hvc(0), hvc(1))
    guest.engine.pc = CODE
    guest.engine.vector = vector
    with pytest.raises(PanicError, match="EL2"):
        guest.engine.run()
    guest.run_known_program()


def test_missing_vector_is_an_engine_error(guest: Guest) -> None:
    engine = UnicornEngine(guest.memory)
    engine.write_sysreg(reg.HCR_EL2, reg.hcr("VM", "RW"))
    with pytest.raises(EngineError, match="never set"):
        engine.run()
    engine.close()


def test_run_inside_the_vector_is_refused(guest: Guest) -> None:
    guest.write(CODE, hvc(0))
    guest.engine.pc = CODE

    def vector() -> bool:
        guest.engine.run()
        return True

    guest.engine.vector = vector
    with pytest.raises(EngineError, match="running already"):
        guest.engine.run()


def test_closed_engine_refuses_to_run_and_survives_everything_else(guest: Guest) -> None:
    engine = guest.engine
    engine.x[3] = 33
    kept = engine.x
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run()
    engine.flush_tlb()
    engine.invalidate_code(0x8010_0000, 4096)
    engine.interrupt()
    set_virtual_irq(engine, level=True)
    assert engine.x[3] == 33
    engine.x[3] = 34
    with pytest.raises(ValueError, match="released"):
        kept[3]
    engine.pc = 4


def test_unknown_model(guest: Guest) -> None:
    with pytest.raises(ValueError, match="cortex-a72, max"):
        UnicornEngine(guest.memory, cpu_model="pentium")


def test_max_model_has_sve_and_pauth_but_no_half_precision(make_guest: MakeGuest) -> None:
    guest = make_guest(cpu_model="max")
    pfr0 = guest.engine.read_sysreg(reg.ID_AA64PFR0_EL1)
    assert pfr0 >> 32 & 0xF == 1
    assert pfr0 >> 16 & 0xFF == 0
    guest.engine.write_sysreg(reg.CPACR_EL1, 0x33_0000)
    guest.engine.write_sysreg(SysReg(3, 0, 1, 2, 0), 15)  # ZCR_EL1
    guest.engine.write_sysreg(reg.HCR_EL2, HCR | reg.hcr("API", "APK"))
    found = guest.run(0x04BF5040, 0xDAC103E1, hvc(1))  # RDVL X0, #2; PACIA X1, XZR
    assert (found.ec, found.iss) == (EC.HVC64, 1)
    assert guest.engine.x[0] == 2 * 256
    assert guest.run(0x7E790BCD).iss == 0x99


def test_load_or_fetch_where_nothing_answers_is_an_external_abort_and_a_store_is_lost(
    guest: Guest,
) -> None:
    engine = guest.engine
    guest.map(DATA, pa=0x1000)
    guest.run(*mov(1, DATA), ldr(2, 1))
    assert engine.x[21] == EC.DABT_CUR << 26 | esr.IL | 1 << 10 | esr.FSC_EXTERNAL
    assert engine.x[23] == CODE + 16
    guest.run(*mov(1, DATA), br(1))
    assert engine.x[21] == EC.IABT_CUR << 26 | esr.IL | esr.FSC_EXTERNAL
    assert engine.x[22] == engine.x[23] == DATA
    guest.run(*mov(1, DATA), str_(2, 1), hvc(0))
    assert guest.exits[-1].pc == CODE + 24
    guest.run_known_program()


def test_counter_of_the_host_is_the_one_that_timers_use(guest: Guest) -> None:
    before = host_counter()
    guest.run(mrs(0, reg.CNTPCT_EL0), hvc(0))
    assert before <= guest.engine.x[0] <= host_counter()


def test_bare_hook_takes_every_exception_until_it_stops(guest: Guest) -> None:
    library = Library()
    numbers = []

    def hook(handle: int, number: int, _data: int) -> None:
        numbers.append(number)
        if len(numbers) == 3:
            library.uc_emu_stop(handle)

    callback = INTERRUPT_HOOK(hook)
    guest.write(CODE, hvc(0), hvc(1), hvc(2), hvc(3))
    guest.engine.pc = CODE
    guest.engine.run_bare(ctypes.cast(callback, ctypes.c_void_p).value or 0)
    assert numbers == [11, 11, 11]
    assert guest.engine.pc == CODE + 12
    guest.run_known_program()
