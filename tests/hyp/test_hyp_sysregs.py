# SPDX-License-Identifier: GPL-2.0-or-later
"""System registers as a protected guest finds them: its own CPU, nothing more."""

from __future__ import annotations

import pytest

from fakes import a64
from fakes.el2_rig import INCREMENT_PC, PENDING_EXCEPTION, RAM_IPA, El2, Guest
from pkvm.arm64 import registers as r
from pkvm.events import GuestTrap
from pkvm.hyp.abi import ExitCode, RunResult
from pkvm.hyp.id_registers import LIMITS, Limit, guest_id_registers
from pkvm.hyp.sysregs import RAZ_WI

VECTOR = 0x800
STAMP = 0x5EC2E7
DC_ISW = r.SysReg(1, 0, 7, 6, 2)
LORC_EL1 = r.SysReg(3, 0, 10, 4, 3)
PMUSERENR_EL0 = r.SysReg(3, 3, 9, 14, 0)
PMCCNTR_EL0 = r.SysReg(3, 3, 9, 13, 0)
IMPLEMENTATION_DEFINED = r.SysReg(3, 0, 11, 0, 0)
AT_S12E1R = r.SysReg(1, 4, 7, 8, 4)


class Prober:
    """A guest that executes one instruction after the other; an exception ends in its vector."""

    def __init__(self, *, cpu_model: str = "cortex-a72") -> None:
        self.el2 = El2(cpu_model=cpu_model)
        self.guest = Guest(self.el2, [a64.WFI])
        assert self.guest.run() == ExitCode.TRAP
        code = [0] * 0x400
        code[VECTOR // 4 + 0x80] = a64.WFI
        code[VECTOR // 4 + 0x100] = a64.WFI
        self.code = code

    def execute(self, instruction: int, *, x5: int = STAMP, el0: bool = False) -> ExitCode:
        """Execute one instruction with X5, then WFI."""
        self.code[:3] = [instruction, a64.WFI, a64.LOOP]
        memory, engine = self.el2.machine.memory, self.el2.engine
        memory.write(self.guest.ram, a64.code(self.code))
        engine.invalidate_code(self.guest.ram, 0x1000)
        engine.write_sysreg(r.VBAR_EL1, RAM_IPA + VECTOR)
        engine.write_sysreg(r.ESR_EL1, 0)
        engine.pstate = r.PSTATE_EL0T if el0 else r.PSTATE_RESET
        engine.pc = RAM_IPA
        engine.x[5] = x5
        return self.guest.run()

    def read(self, register: r.SysReg) -> int:
        assert self.execute(a64.mrs(5, register)) == ExitCode.TRAP
        assert self.el2.engine.pc == RAM_IPA + 4, register.name
        return self.el2.engine.x[5]

    def write(self, register: r.SysReg, value: int) -> None:
        assert self.execute(a64.msr(register, 5), x5=value) == ExitCode.TRAP
        assert self.el2.engine.pc == RAM_IPA + 4, register.name

    def undefined(self, instruction: int, *, el0: bool = False) -> None:
        """Assert that the instruction is UNDEFINED, delivered as the architecture says."""
        assert self.execute(instruction, el0=el0) == ExitCode.TRAP
        engine = self.el2.engine
        assert engine.pc == RAM_IPA + VECTOR + (0x400 if el0 else 0x200), hex(instruction)
        assert engine.read_sysreg(r.ESR_EL1) == 1 << 25
        assert engine.elr_el1() == RAM_IPA
        assert engine.spsr_el1() == (r.PSTATE_EL0T if el0 else r.PSTATE_RESET)
        assert engine.x[5] == STAMP


@pytest.fixture(scope="module")
def prober() -> Prober:
    return Prober()


def test_id_registers_have_no_more_than_the_limits(prober: Prober) -> None:
    engine = prober.el2.engine
    for crm in range(1, 8):
        for op2 in range(8):
            register = r.SysReg(3, 0, 0, crm, op2)
            value = prober.read(register)
            hardware = _hardware(engine, register)
            if register in (r.ID_AA64DFR0_EL1, r.ID_AA64MMFR4_EL1, r.ID_AA64ISAR0_EL1):
                continue
            allowed = {limit.lo: limit for limit in LIMITS.get(register, ())}
            for lo in range(0, 64, 4):
                field = value >> lo & 0xF
                expected = allowed[lo].of(hardware) >> lo if lo in allowed else 0
                assert field == expected, (register.name, lo)


def _hardware(engine: object, register: r.SysReg) -> int:
    try:
        value: int = engine.read_sysreg(register)  # type: ignore[attr-defined]
    except KeyError:
        return 0
    return value


def test_constants(prober: Prober) -> None:
    assert prober.read(r.ID_AA64DFR0_EL1) == 0x000F_00F0_0000_0000
    assert prober.read(r.ID_AA64MMFR4_EL1) == 0x0F00_0000
    assert prober.read(r.ID_PFR0_EL1) == 0
    assert prober.read(r.ID_AA64PFR0_EL1) & 0xFF == 0x11
    assert prober.read(r.ID_AA64MMFR0_EL1) & 0xF == 2


@pytest.mark.parametrize("register", [r.ID_AA64DFR0_EL1, r.ID_AA64PFR0_EL1, r.ID_PFR0_EL1])
def test_id_registers_cannot_be_written(prober: Prober, register: r.SysReg) -> None:
    prober.undefined(a64.msr(register, 5))


@pytest.mark.parametrize("register", RAZ_WI)
def test_read_as_zero_write_ignored(prober: Prober, register: r.SysReg) -> None:
    if register in (r.OSLAR_EL1,):
        prober.write(register, 1)
        return
    if register.crm in (3, 4, 5) and register.crn == 5:
        prober.undefined(a64.mrs(5, register))  # this CPU has no RAS registers, nor a trap for them
        return
    assert prober.read(register) == 0
    if register is not r.OSLSR_EL1:
        prober.write(register, STAMP)
        assert prober.read(register) == 0


@pytest.mark.parametrize(
    "register",
    [r.PMCR_EL0, PMCCNTR_EL0, r.ACTLR_EL1, r.SysReg(2, 0, 0, 1, 4), LORC_EL1,
     IMPLEMENTATION_DEFINED, r.CCSIDR2_EL1, r.GMID_EL1, r.SMIDR_EL1, r.HCR_EL2, r.SCR_EL3],
)  # fmt: skip
def test_everything_else_is_undefined(prober: Prober, register: r.SysReg) -> None:
    prober.undefined(a64.mrs(5, register))


def test_set_way_maintenance_and_el2_instructions_are_undefined(prober: Prober) -> None:
    prober.undefined(a64.system(DC_ISW, 5))
    prober.undefined(a64.system(AT_S12E1R, 5))


def test_user_space_gets_its_exception_at_its_kernel(prober: Prober) -> None:
    prober.el2.engine.write_sysreg(PMUSERENR_EL0, 1)
    prober.undefined(a64.mrs(5, r.PMCR_EL0), el0=True)
    prober.undefined(a64.mrs(5, r.ID_AA64PFR0_EL1), el0=True)


@pytest.mark.parametrize("register", [r.MIDR_EL1, r.CTR_EL0, r.CLIDR_EL1, r.REVIDR_EL1, r.AIDR_EL1])
def test_the_hardwares_own(prober: Prober, register: r.SysReg) -> None:
    assert prober.read(register) == prober.el2.engine.read_sysreg(register)


def test_mpidr_is_the_vcpus(prober: Prober) -> None:
    assert prober.read(r.MPIDR_EL1) == 1 << 31


def test_cache_selection_works_and_is_masked(prober: Prober) -> None:
    sizes = set()
    for level in (0, 1, 2):
        prober.write(r.CSSELR_EL1, level | 0xFFFF_0000)
        assert prober.read(r.CSSELR_EL1) == level
        sizes.add(prober.read(r.CCSIDR_EL1))
    assert len(sizes) == 3
    prober.undefined(a64.msr(r.CCSIDR_EL1, 5))


def test_the_counter_can_be_read_the_physical_timer_is_the_hosts(prober: Prober) -> None:
    first = prober.read(r.CNTPCT_EL0)
    assert prober.read(r.CNTVCT_EL0) >= first > 0
    for register in (r.CNTP_CTL_EL0, r.CNTP_CVAL_EL0, r.CNTP_TVAL_EL0):
        assert prober.execute(a64.mrs(5, register)) == ExitCode.TRAP
        assert prober.guest.ec() == 0x18
        assert prober.el2.engine.pc == RAM_IPA
        assert prober.guest.run(flags=INCREMENT_PC, x0=0x77) == ExitCode.TRAP
        assert prober.el2.engine.x[5] == 0x77
    assert prober.execute(a64.msr(r.CNTP_CTL_EL0, 5)) == ExitCode.TRAP
    assert prober.guest.shown[RunResult.X0] == STAMP
    assert prober.guest.run(flags=PENDING_EXCEPTION) == ExitCode.TRAP
    assert prober.el2.engine.read_sysreg(r.ESR_EL1) == 1 << 25


def test_a_read_into_xzr_changes_nothing(prober: Prober) -> None:
    assert prober.execute(a64.mrs(31, r.ID_AA64PFR0_EL1)) == ExitCode.TRAP
    assert prober.el2.engine.pc == RAM_IPA + 4


def test_what_el2_serves_is_announced(prober: Prober) -> None:
    prober.read(r.ID_AA64PFR0_EL1)
    assert prober.el2.events(GuestTrap)[-1].reason == "sysreg"
    prober.undefined(a64.mrs(5, r.PMCR_EL0))
    assert prober.el2.events(GuestTrap)[-1].reason == "undef"


def test_sve_and_pointer_authentication_are_not_there_on_any_cpu() -> None:
    prober = Prober(cpu_model="max")
    assert prober.el2.engine.read_sysreg(r.ID_AA64PFR0_EL1) >> 32 & 0xF, "this CPU has SVE"
    assert prober.read(r.ID_AA64PFR0_EL1) >> 32 & 0xF == 0
    assert prober.read(r.ID_AA64ISAR1_EL1) & 0xFF00_0FF0 == 0
    assert prober.read(r.ID_AA64ZFR0_EL1) == 0
    prober.el2.engine.write_sysreg(r.CPACR_EL1, 3 << 20 | 3 << 16)
    prober.undefined(a64.CNTB_X5)
    prober.undefined(a64.PACGA_X5_X1_X2)


def test_limits() -> None:
    plain, signed = Limit(4, 2), Limit(8, 1, signed=True)
    assert [plain.of(n << 4) >> 4 for n in (0, 1, 2, 3, 15)] == [0, 1, 2, 2, 2]
    assert [signed.of(n << 8) >> 8 for n in (0, 1, 2, 15)] == [0, 1, 1, 15]
    assert Limit(0, 15, signed=True).of(0) == 15


def test_registers_that_this_cpu_lacks_are_zero() -> None:
    class Bare:
        def read_sysreg(self, register: r.SysReg) -> int:
            if register == r.ID_AA64ISAR0_EL1:
                return 5
            raise KeyError(register)

    values = guest_id_registers(Bare())  # type: ignore[arg-type]
    assert values[r.ID_AA64ISAR0_EL1] == 5
    assert r.ID_AA64PFR0_EL1 not in values
