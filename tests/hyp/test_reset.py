# SPDX-License-Identifier: GPL-2.0-or-later
"""The state in which a protected vCPU starts: exactly the RFC's, whatever was there before."""

from __future__ import annotations

import pytest

from fakes import a64
from fakes.el2_rig import FIRMWARE_BYTES, FIRMWARE_IPA, PAGE, RAM_IPA, SLOT_BYTES, El2, Guest
from pkvm.arm64 import registers as r
from pkvm.arm64.psci import Function
from pkvm.hyp.abi import ExitCode, HostVcpu
from pkvm.machine.cpu.unicorn_layout import EL2_EL3_STATE

ZERO_REGISTERS = (
    r.CPACR_EL1, r.TTBR0_EL1, r.TTBR1_EL1, r.TCR_EL1, r.ESR_EL1, r.FAR_EL1, r.PAR_EL1, r.MAIR_EL1,
    r.VBAR_EL1, r.CONTEXTIDR_EL1, r.TPIDR_EL1, r.TPIDR_EL0, r.TPIDRRO_EL0, r.CNTKCTL_EL1,
    r.MDSCR_EL1, r.CNTV_CTL_EL0, r.CNTP_CTL_EL0,
)  # fmt: skip


def stop_at_entry(el2: El2) -> None:
    """The next run ends before its first instruction."""
    el2.engine.interrupt()


def test_the_primary_starts_as_the_rfc_says() -> None:
    el2 = El2()
    guest = Guest(el2)
    page = bytes(0xA5 for _ in range(PAGE))
    el2.bus.write(guest.vcpus[0], page)
    for number in range(31):
        guest.set(HostVcpu.X + 8 * number, 0x1000 + number)
    stop_at_entry(el2)
    assert guest.run(flags=7, x0=0x666) == ExitCode.IRQ
    engine = el2.engine
    assert [engine.x[n] for n in range(31)] == [0x1000 + n for n in range(15)] + [0] * 16
    assert engine.pc == FIRMWARE_IPA
    assert engine.sp(1) == FIRMWARE_IPA + SLOT_BYTES
    assert engine.sp(0) == 0
    assert engine.pstate == 0x3C5
    assert (engine.elr_el1(), engine.spsr_el1()) == (0, 0)
    assert engine.fp_registers() == bytes(520)
    assert engine.read_sysreg(r.SCTLR_EL1) == 0x00C5_0078
    assert engine.read_sysreg(r.OSLSR_EL1) == 8
    assert engine.read_sysreg(r.MPIDR_EL1) == 1 << 31
    for register in ZERO_REGISTERS:
        assert engine.read_sysreg(register) == 0, register.name


def test_the_mpidr_is_made_of_the_id() -> None:
    el2 = El2()
    guest = Guest(el2, vcpus=0, created_vcpus=1)
    guest.add_vcpu(0, vcpu_id=0x12345)
    guest.run()
    assert el2.engine.read_sysreg(r.MPIDR_EL1) == 1 << 31 | 0x12 << 16 | 0x34 << 8 | 5


@pytest.mark.parametrize("secondary", [False, True])
def test_nothing_of_the_cpu_before_gets_into_a_start(secondary: bool) -> None:
    """Two starts, one on a CPU just reset and one after a guest that used every register, leave
    the same context, byte for byte."""
    clean, dirty = _start(secondary, soiled=False), _start(secondary, soiled=True)
    differ = [hex(at) for at in range(0, len(clean), 8) if clean[at : at + 8] != dirty[at : at + 8]]
    assert differ == []


TURN_ON_1 = [
    word
    for number, value in enumerate((Function.CPU_ON_64, 1, RAM_IPA, 5))
    for word in a64.mov(number, value)
]


def _start(secondary: bool, *, soiled: bool) -> bytes:
    """The context of a vCPU before its first instruction."""
    el2 = El2()
    guest = Guest(el2, [*TURN_ON_1, a64.HVC], vcpus=2, ram_pages=1)
    if secondary:
        assert guest.run() == ExitCode.TRAP
    if soiled:
        _soil(el2)
    stop_at_entry(el2)
    assert guest.run(int(secondary)) == ExitCode.IRQ
    memory, engine = el2.machine.memory, el2.engine
    pa = el2.pages(4)
    engine.save_context(pa)
    context = bytearray(memory.read(pa, engine.context_bytes))
    for at, size in EL2_EL3_STATE:
        context[at : at + size] = bytes(size)
    return bytes(context)


def _soil(el2: El2) -> None:
    """A guest that is over by now leaves something in every register that it can write."""
    guest = Guest(el2, [a64.WFI])
    guest.run()
    engine = el2.engine
    for number in range(31):
        engine.x[number] = 0x5EC2E7 << 8 | number
    for register in (*ZERO_REGISTERS[1:-3], r.CPACR_EL1):
        engine.write_sysreg(register, 0x3C_5EC2_E700)
    engine.set_fp_registers(b"\x5e" * 512 + b"\x1f\0\0\0\0\0\xc0\0")
    for el in (0, 1):
        engine.set_sp(el, 0x5EC2E7)
    engine.set_elr_el1(0x5EC2E7)
    engine.set_spsr_el1(0x5EC2E7)
    engine.pstate = 0xF000_0004
    engine.interrupt()
    guest.run()
    guest.end()


def test_the_firmware_is_in_its_slot_and_the_rest_is_zero() -> None:
    el2 = El2()
    guest = Guest(el2)
    content = el2.machine.memory.read(guest.slot, SLOT_BYTES)
    assert content[:FIRMWARE_BYTES] == el2.image
    assert content[FIRMWARE_BYTES:] == bytes(SLOT_BYTES - FIRMWARE_BYTES)
