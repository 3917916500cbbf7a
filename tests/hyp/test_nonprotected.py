# SPDX-License-Identifier: GPL-2.0-or-later
"""Non-protected guests: the host sees and sets everything, except what is EL2's."""

from __future__ import annotations

import errno

import pytest

from fakes import a64
from fakes.el2_rig import (
    DIRTY,
    INCREMENT_PC,
    NOWHERE,
    PENDING_EXCEPTION,
    RAM_IPA,
    SCTLR,
    El2,
    Guest,
)
from pkvm.arm64 import registers as r
from pkvm.hyp.abi import CONTEXT_SYSREGS, ExitCode, HostCall, HostVcpu, RunResult

PAGE = 4096
VECTORS = RAM_IPA + 0x800


def sysreg(register: r.SysReg) -> int:
    return HostVcpu.SYSREGS + 8 * CONTEXT_SYSREGS.index(register)


@pytest.fixture
def el2() -> El2:
    return El2()


def guest_of(el2: El2, *code: int) -> Guest:
    words = [*code, *[a64.LOOP] * (0x400 - len(code))]
    return Guest(el2, words, protected=False)


def test_the_first_entry_takes_the_hosts_registers(el2: El2) -> None:
    guest = guest_of(el2, a64.HVC)
    for number in range(31):
        guest.set(HostVcpu.X + 8 * number, 0x100 + number)
    guest.set(HostVcpu.SP_EL0, 0x77)
    guest.set(HostVcpu.SP_EL1, 0x88)
    assert guest.run() == ExitCode.TRAP
    engine = el2.engine
    assert [engine.x[n] for n in range(31)] == [0x100 + n for n in range(31)]
    assert (engine.sp(0), engine.sp(1)) == (0x77, 0x88)
    assert engine.read_sysreg(r.SCTLR_EL1) == r.SCTLR_EL1_RESET


def test_a_dirty_first_entry_takes_the_whole_page(el2: El2) -> None:
    guest = guest_of(el2, a64.HVC)
    guest.set(sysreg(r.TPIDR_EL1), 0x1234)
    guest.set(sysreg(r.VBAR_EL1), VECTORS)
    guest.set(SCTLR, r.SCTLR_EL1_RESET | r.SCTLR_E0E)
    el2.bus.write(guest.vcpus[0] + HostVcpu.FP, bytes(range(256)) * 2)
    guest.run(flags=DIRTY)
    engine = el2.engine
    assert engine.read_sysreg(r.TPIDR_EL1) == 0x1234
    assert engine.read_sysreg(r.VBAR_EL1) == VECTORS
    assert engine.read_sysreg(r.SCTLR_EL1) == r.SCTLR_EL1_RESET | r.SCTLR_E0E
    assert engine.fp_registers()[:512] == bytes(range(256)) * 2


@pytest.mark.parametrize(
    ("instruction", "ec", "moved"),
    [(a64.HVC, 0x16, 4), (a64.SMC, 0x17, 0), (a64.WFI, 1, 0),
     (a64.mrs(3, r.PMCR_EL0), 0x18, 0), (a64.load(3, 9, size=3), 0x24, 0),
     (a64.br(9), 0x20, None)],
)  # fmt: skip
def test_every_trap_goes_to_the_host_with_everything(
    el2: El2, instruction: int, ec: int, moved: int | None
) -> None:
    guest = guest_of(el2, instruction)
    for number in range(31):
        guest.set(HostVcpu.X + 8 * number, 0x100 + number)
    guest.set(HostVcpu.X + 8 * 9, NOWHERE + 0x128)
    assert guest.run() == ExitCode.TRAP
    assert guest.ec() == ec
    engine = el2.engine
    assert [guest.x(n) for n in range(31)] == [engine.x[n] for n in range(31)]
    pc = NOWHERE + 0x128 if moved is None else RAM_IPA + moved
    assert guest.word(HostVcpu.PC) == pc
    assert guest.word(HostVcpu.PSTATE) == r.PSTATE_RESET
    assert guest.word(SCTLR) == r.SCTLR_EL1_RESET
    if ec in (0x20, 0x24):
        assert guest.shown[RunResult.FAR] == NOWHERE + 0x128
        assert guest.shown[RunResult.HPFAR] & 0xFFFF_FFFF_FFF0 == NOWHERE >> 8
    if ec == 0x24:
        assert guest.esr() >> 16 & 0x1F == 3, "SRT is shown"


def test_the_host_answers_a_load(el2: El2) -> None:
    guest = guest_of(el2, a64.load(3, 9, size=3), a64.HVC)
    guest.set(HostVcpu.X + 8 * 9, NOWHERE)
    guest.run()
    guest.set(HostVcpu.X + 8 * 3, 0xABCD)
    guest.run(flags=DIRTY | INCREMENT_PC)
    assert guest.ec() == 0x16
    assert guest.x(3) == 0xABCD
    assert guest.word(HostVcpu.PC) == RAM_IPA + 8


def test_without_dirty_the_page_does_not_count(el2: El2) -> None:
    guest = guest_of(el2, a64.HVC, a64.HVC)
    guest.run()
    guest.set(HostVcpu.X + 8 * 3, 0xABCD)
    guest.set(HostVcpu.PC, 0)
    guest.run()
    assert guest.x(3) == 0
    assert guest.word(HostVcpu.PC) == RAM_IPA + 8


@pytest.mark.parametrize(
    ("instruction", "esr"),
    [(a64.mrs(3, r.PMCR_EL0), 0x0200_0000), (a64.HVC, 0x0200_0000),
     (a64.load(3, 9, size=3), 0x9600_0010), (a64.br(9), 0x8600_0010)],
)  # fmt: skip
def test_pending_exceptions(el2: El2, instruction: int, esr: int) -> None:
    guest = guest_of(el2, instruction)
    guest.set(HostVcpu.X + 8 * 9, NOWHERE)
    guest.set(sysreg(r.VBAR_EL1), VECTORS)
    guest.run(flags=DIRTY)
    el2.bus.write(guest.ram + 0x800 + 0x200, a64.code([a64.HVC]))
    guest.run(flags=PENDING_EXCEPTION | INCREMENT_PC)
    assert guest.word(sysreg(r.ESR_EL1)) == esr
    assert guest.word(HostVcpu.PC) == VECTORS + 0x204


@pytest.mark.parametrize("mode", [0x8, 0x9, 0xC, 0xD, 0x10, 0x13, 0x1F, 0x1, 0x7])
@pytest.mark.parametrize("first", [True, False])
def test_the_host_cannot_choose_a_mode_that_is_not_the_guests(
    el2: El2, mode: int, first: bool
) -> None:
    guest = guest_of(el2, a64.HVC, a64.HVC)
    if not first:
        guest.run()
    guest.set(HostVcpu.PSTATE, 0x3C0 | mode)
    before = el2.bus.read(guest.vcpus[0], PAGE)
    assert guest.run(flags=DIRTY) == ExitCode.ILLEGAL
    assert el2.refusals()[-1].check == "pstate"
    assert el2.bus.read(guest.vcpus[0], PAGE) == before
    guest.set(HostVcpu.PSTATE, r.PSTATE_RESET)
    assert guest.run(flags=DIRTY) == ExitCode.TRAP


def test_a_page_of_noise_is_survived(el2: El2) -> None:
    guest = guest_of(el2, a64.HVC)
    el2.bus.write(guest.vcpus[0], b"\xff" * PAGE)
    guest.set(HostVcpu.PSTATE, 0xFFFF_FFFF_FFFF_FFE5)
    el2.engine.interrupt()
    assert guest.run(flags=DIRTY) in (ExitCode.IRQ, ExitCode.TRAP)
    el2.sound()


def test_an_interrupt_leaves_the_page_until_it_is_asked_for(el2: El2) -> None:
    guest = guest_of(el2, *a64.mov(3, 0x5555), a64.LOOP)
    guest.load()
    el2.engine.interrupt()
    guest.set(HostVcpu.X + 8 * 3, 0x1111)
    assert el2.call(HostCall.VCPU_RUN) == ExitCode.IRQ
    before = el2.bus.read(guest.vcpus[0], HostVcpu.VCPU_ID)
    el2.engine.interrupt()
    el2.engine.x[3] = 0x2222
    el2.call(HostCall.VCPU_RUN)
    assert el2.bus.read(guest.vcpus[0], HostVcpu.VCPU_ID) == before
    el2.call(HostCall.VCPU_SYNC_STATE)
    assert guest.x(3) == 0x2222
    assert guest.word(HostVcpu.PC) == RAM_IPA


def test_put_makes_the_page_current(el2: El2) -> None:
    guest = guest_of(el2, a64.LOOP)
    el2.engine.interrupt()
    guest.run()
    el2.engine.x[3] = 0x3333
    guest.load()
    el2.engine.interrupt()
    el2.call(HostCall.VCPU_RUN)
    el2.call(HostCall.VCPU_PUT)
    assert guest.x(3) == 0x3333


def test_sync_before_the_first_entry_leaves_the_hosts_page(el2: El2) -> None:
    guest = guest_of(el2, a64.HVC)
    guest.set(HostVcpu.X + 8 * 3, 0x4444)
    guest.load()
    el2.call(HostCall.VCPU_SYNC_STATE)
    assert guest.x(3) == 0x4444
    assert el2.call(HostCall.VCPU_RUN) == ExitCode.TRAP
    assert guest.x(3) == 0x4444


def test_sync_is_for_non_protected_vcpus(el2: El2) -> None:
    guest = Guest(el2)
    guest.load()
    el2.assert_refused(errno.EINVAL, HostCall.VCPU_SYNC_STATE, check_name="vm_kind")
    args = (guest.ram >> 12, 0x50000, 1, 7)
    el2.assert_refused(errno.EINVAL, HostCall.HOST_SHARE_GUEST, *args, check_name="vm_kind")
    args3 = (guest.handle, RAM_IPA >> 12, 1)
    el2.assert_refused(errno.EINVAL, HostCall.HOST_UNSHARE_GUEST, *args3, check_name="vm_kind")


def test_both_kinds_see_the_same_cpu(el2: El2) -> None:
    """A guest that reads its ID registers does not trouble the host for them."""
    registers = (r.ID_AA64PFR0_EL1, r.ID_AA64DFR0_EL1, r.ID_AA64MMFR0_EL1, r.CTR_EL0, r.MIDR_EL1)
    code = [a64.mrs(3 + n, register) for n, register in enumerate(registers)]
    found = []
    for protected in (True, False):
        guest = Guest(el2, [*code, a64.WFI], protected=protected)
        assert guest.run() == ExitCode.TRAP
        assert guest.ec() == 1
        found.append([el2.engine.x[3 + n] for n in range(len(registers))])
        guest.end()
    assert found[0] == found[1]


def test_kinds_share_the_cpu_and_nothing_else(el2: El2) -> None:
    secret = Guest(el2, [*a64.mov(20, 0x5EC2_E75E_C2E7), a64.WFI])
    spy = guest_of(el2, a64.HVC, a64.HVC)
    secret.run()
    spy.run()
    page = el2.bus.read(spy.vcpus[0], PAGE)
    assert (0x5EC2_E75E_C2E7).to_bytes(8, "little") not in page
    secret.run(flags=INCREMENT_PC)
    spy.run()
    assert (0x5EC2_E75E_C2E7).to_bytes(8, "little") not in el2.bus.read(spy.vcpus[0], PAGE)


def test_memory_is_lent_and_comes_back(el2: El2) -> None:
    guest = guest_of(el2, a64.HVC)
    guest.run()
    assert el2.bus.read(guest.ram, 4) == a64.code([a64.HVC])
    args = (guest.handle, RAM_IPA >> 12, 1)
    el2.call(HostCall.HOST_UNSHARE_GUEST, *args)
    el2.assert_refused(errno.ENOENT, HostCall.HOST_UNSHARE_GUEST, *args)
    guest.run()
    assert guest.ec() == 0x20, "the page is gone for the guest, at once"
    guest.load()
    el2.call(HostCall.HOST_SHARE_GUEST, guest.ram >> 12, RAM_IPA >> 12, 1, 7)
    el2.call(HostCall.VCPU_PUT)
    guest.end()
    el2.sound()
