# SPDX-License-Identifier: GPL-2.0-or-later
"""What a protected vCPU's exit shows, byte for byte, and what the host's answer may change.

The guest runs to a first WFI; then the test fills every register with a marked
secret, puts PC on the instruction of interest and fills the host's page.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import pytest

from fakes import a64
from fakes.el2_rig import (
    INCREMENT_PC,
    NOWHERE,
    PENDING_EXCEPTION,
    RAM_IPA,
    El2,
    Guest,
)
from pkvm.arm64 import psci
from pkvm.arm64 import registers as r
from pkvm.arm64.smccc import Function
from pkvm.events import GuestExit
from pkvm.hyp.abi import ExitCode, HostCall, RunResult
from pkvm.hyp.exits import RULES, ExitClass
from pkvm.hyp.policy import ANDROID, RFC, Policy

PAGE = 4096
FILL = 0xA5
SYSREGS = (
    r.TTBR0_EL1, r.TTBR1_EL1, r.ESR_EL1, r.FAR_EL1, r.PAR_EL1,
    r.MAIR_EL1, r.VBAR_EL1, r.CONTEXTIDR_EL1, r.TPIDR_EL1, r.TPIDR_EL0, r.TPIDRRO_EL0,
)  # fmt: skip
MODE_EL1H = 5
VBAR = RAM_IPA + 0x1800
"""Of the vectors that the secrets include: 0x200 past it is `b .`."""
FAR_PAGE_OFFSET = 0x128


def secret(number: int) -> int:
    """Sixteen nibbles that no other register and no host word has."""
    return 0x5EC2_E700_0000_0000 | number << 32 | 0xBEEF_0000 | number * 0x101


class Trigger(NamedTuple):
    """An instruction, the registers it needs, and what the host then may see."""

    kind: ExitClass
    instruction: int
    registers: dict[int, int]
    shown: dict[int, int]
    """Register of `RunResult` -> value; the ESR is given by `esr`."""
    esr: int | None = None
    ipa: int = -1
    pc_moves: int = 0
    """How far PC is from the instruction at the exit."""
    policy: Policy = RFC


UART = NOWHERE + FAR_PAGE_OFFSET
DATA = secret(40)
MODE = {RunResult.PSTATE: MODE_EL1H}
DABT = {
    RunResult.FAR: FAR_PAGE_OFFSET,
    RunResult.HPFAR: NOWHERE >> 8,
    RunResult.SCTLR_EE: 0,
    **MODE,
}


def psci_call(function: int, x1: int = 0, x2: int = 0, x3: int = 0) -> dict[int, int]:
    return {0: function | 1 << 16 | secret(41) << 32 & (1 << 64) - 1, 1: x1, 2: x2, 3: x3}


def hvc(kind: ExitClass, function: int, *args: int, shown: int = 0) -> Trigger:
    """A PSCI call with a dirty upper half of X0 and the SVE hint; `shown` arguments go out."""
    words = {RunResult.X0: function | 1 << 16}
    words |= {RunResult.X1 + n: args[n] for n in range(shown)}
    return Trigger(kind, a64.HVC, psci_call(function, *args), words, 0x5A00_0000, pc_moves=4)


def mmio(size: int, *, write: bool, rt: int = 7) -> Trigger:
    shown = dict(DABT)
    esr = 0x9300_0000 | 1 << 24 | size << 22 | (size == 3) << 15 | write << 6 | 5
    instruction = a64.store(rt, 9, size=size) if write else a64.load(rt, 9, size=size)
    if write:
        shown[RunResult.X0] = (DATA if rt != 31 else 0) & (1 << (8 << size)) - 1
    kind = ExitClass.MMIO_WRITE if write else ExitClass.MMIO_READ
    return Trigger(kind, instruction, {7: DATA, 9: UART}, shown, esr, NOWHERE)


F = psci.Function
GIVEN = RAM_IPA + 0x10_0000
"""A page of a block, for which EL2 needs a table page."""
TRIGGERS = {
    "wfi": Trigger(ExitClass.WFX, a64.WFI, {}, MODE, 0x07E0_0000),
    "read of a host-handled register": Trigger(
        ExitClass.SYSREG_READ, a64.mrs(7, r.CNTP_CTL_EL0), {7: DATA}, MODE
    ),
    "write of a host-handled register": Trigger(
        ExitClass.SYSREG_WRITE,
        a64.msr(r.CNTP_CTL_EL0, 7),
        {7: DATA},
        {**MODE, RunResult.X0: DATA},
    ),
    "write of XZR": Trigger(
        ExitClass.SYSREG_WRITE, a64.msr(r.CNTP_CTL_EL0, 31), {}, {**MODE, RunResult.X0: 0}
    ),
    "CPU_ON": hvc(ExitClass.CPU_ON, F.CPU_ON_64, 1, secret(42), secret(43), shown=1),
    "CPU_SUSPEND": hvc(ExitClass.CPU_SUSPEND, F.CPU_SUSPEND_64, 7, secret(42), secret(43)),
    "CPU_OFF": hvc(ExitClass.CPU_OFF, F.CPU_OFF, secret(42)),
    "SYSTEM_OFF": hvc(ExitClass.SYSTEM_OFF, F.SYSTEM_OFF, secret(42)),
    "SYSTEM_RESET": hvc(ExitClass.SYSTEM_OFF, F.SYSTEM_RESET, secret(42)),
    "SYSTEM_RESET2": hvc(
        ExitClass.SYSTEM_RESET2, F.SYSTEM_RESET2_64, 1 << 31, secret(42), secret(43), shown=2
    ),
    "TRNG": hvc(ExitClass.TRNG, Function.TRNG_RND64, 100, secret(42), secret(43), shown=1),
    "fetch": Trigger(
        ExitClass.IABT, a64.br(9), {9: NOWHERE + 0x124}, {RunResult.HPFAR: NOWHERE >> 8},
        0x8200_0005, NOWHERE, pc_moves=-1,
    ),
    "pair": Trigger(
        ExitClass.DABT, a64.LDP_X0_X1_X2, {2: UART}, DABT, 0x9200_0005, NOWHERE
    ),
    "pair stored": Trigger(
        ExitClass.DABT, a64.STP_X0_X1_X2, {2: UART}, DABT, 0x9200_0045, NOWHERE
    ),
    **{
        f"{'store' if write else 'load'} of {8 << size} bits": mmio(size, write=write)
        for size in range(4)
        for write in (False, True)
    },
    "store of XZR": mmio(3, write=True, rt=31),
    "load to XZR": mmio(3, write=False, rt=31),
    "no table pages": Trigger(
        ExitClass.HYP_REQ,
        a64.HVC,
        {0: Function.MEM_SHARE, 1: RAM_IPA + 0x10_0000, 2: 1, 3: 0},
        {RunResult.REQ_TYPE: 1, RunResult.REQ_PAGES: 1},
    ),
    "page given up": Trigger(
        ExitClass.MEM_RELINQUISH, a64.HVC, {0: Function.MEM_RELINQUISH, 1: GIVEN, 2: 0, 3: 0},
        {RunResult.X0: Function.MEM_RELINQUISH, RunResult.X1: GIVEN}, 0x5A00_0000,
        pc_moves=4, policy=ANDROID,
    ),
    "interrupt": Trigger(ExitClass.IRQ, a64.LOOP, {}, {}),
    "unhandled": Trigger(ExitClass.ILLEGAL, a64.BRK, {}, {}),
}  # fmt: skip


class Scene:
    """A guest with secrets everywhere, about to execute a trigger."""

    def __init__(self, trigger: Trigger) -> None:
        self.trigger = trigger
        self.el2 = El2(ram_bytes=32 << 20, policy=trigger.policy)
        vectors = [a64.NOP] * ((VBAR - RAM_IPA) // 4)
        vectors[:2] = [a64.WFI, trigger.instruction]
        vectors += [a64.LOOP] * 0x200
        self.guest = Guest(self.el2, vectors, vcpus=2, block=True, tables=3)
        assert self.guest.run() == ExitCode.TRAP
        if trigger.kind == ExitClass.MEM_RELINQUISH:
            page = self.el2.link([self.el2.pages()])
            self.el2.call(HostCall.TOPUP_MEMCACHE, self.guest.handle, page, 1)
        engine = self.el2.engine
        self.pc = RAM_IPA + 4
        engine.pc = self.pc
        for number in range(31):
            engine.x[number] = secret(number)
        for number, value in trigger.registers.items():
            engine.x[number] = value
        for number, register in enumerate(SYSREGS):
            engine.write_sysreg(register, secret(50 + number))
        engine.write_sysreg(r.VBAR_EL1, VBAR)
        engine.set_sp(0, secret(80))
        engine.set_sp(1, secret(81))
        engine.set_elr_el1(secret(82))
        engine.set_fp_registers(struct.pack("<64QII", *map(secret, range(100, 164)), 0, 0))
        engine.pstate = 0xA000_0000 | r.PSTATE_RESET
        if trigger.kind == ExitClass.ILLEGAL:
            engine.write_sysreg(r.MDCR_EL2, r.MDCR.encode(TDE=1))
        self.el2.bus.write(self.guest.vcpus[0], bytes([FILL]) * PAGE)

    def leave(self) -> ExitCode:
        if self.trigger.kind == ExitClass.IRQ:
            self.el2.engine.interrupt()
        return self.guest.run()

    def host_page(self) -> bytes:
        return self.el2.bus.read(self.guest.vcpus[0], PAGE)

    def registers(self) -> dict[str, object]:
        """Everything that the guest could notice."""
        engine = self.el2.engine
        found: dict[str, object] = {f"X{number}": engine.x[number] for number in range(31)}
        found |= {"PC": engine.pc, "PSTATE": engine.pstate}
        found |= {"SP0": engine.sp(0), "SP1": engine.sp(1)}
        found |= {"ELR": engine.elr_el1(), "SPSR": engine.spsr_el1()}
        found |= {register.name: engine.read_sysreg(register) for register in SYSREGS}
        found["SCTLR"] = engine.read_sysreg(r.SCTLR_EL1)
        found["FP"] = engine.fp_registers()
        return found

    def lie(self) -> None:
        """Fill the host's page with lies."""
        lies = b"".join(
            (0x11E5_0000_0000_0000 | n * 0x1_0003).to_bytes(8, "little") for n in range(512)
        )
        self.el2.bus.write(self.guest.vcpus[0], lies)

    def enter(self, flags: int, x0: int) -> dict[str, tuple[object, object]]:
        """Enter with lies; what the guest has that it had not before, at its first instruction."""
        before = self.registers()
        self.lie()
        seen: dict[str, object] = {}
        engine = self.el2.engine
        run, engine.run = engine.run, None  # type: ignore[method-assign, assignment]

        def look() -> object:
            seen.update(self.registers())
            engine.interrupt()
            return run()

        engine.run = look  # type: ignore[method-assign, assignment]
        try:
            code = self.guest.run(flags=flags, x0=x0)
            assert code in (ExitCode.IRQ, ExitCode.ILLEGAL)
        finally:
            engine.run = run  # type: ignore[method-assign]
        return {name: (value, seen[name]) for name, value in before.items() if seen[name] != value}


def scene(name: str) -> Scene:
    one = Scene(TRIGGERS[name])
    one.leave()
    return one


@pytest.mark.parametrize("name", TRIGGERS)
def test_the_host_sees_what_the_class_publishes_and_nothing_else(name: str) -> None:
    trigger = TRIGGERS[name]
    one = Scene(trigger)
    assert one.leave() == RULES[trigger.kind].code
    vcpu = one.guest.vcpu()
    assert vcpu.exit_class == trigger.kind
    shown = dict(trigger.shown)
    if trigger.esr is not None:
        shown[RunResult.ESR] = trigger.esr
    elif RULES[trigger.kind].esr:
        shown[RunResult.ESR] = one.el2.machine.engine.esr_el2 & ~(0x1F << 5)
    if trigger.kind == ExitClass.MEM_RELINQUISH:
        shown[RunResult.X2] = one.guest.ram + GIVEN - RAM_IPA
    code = int(RULES[trigger.kind].code)
    registers = [0, code, *(shown.get(n, 0) for n in range(2, RunResult.COUNT))]
    assert [*one.guest.shown] == registers
    assert one.host_page() == bytes([FILL]) * PAGE
    event = one.el2.events(GuestExit)[-1]
    assert (event.reason, event.ipa) == (RULES[trigger.kind].reason, trigger.ipa)
    esr = 0 if trigger.kind == ExitClass.HYP_REQ else shown.get(RunResult.ESR, 0)
    assert event.esr == esr
    one.el2.sound()


def test_every_class_of_a_protected_vcpu_is_triggered() -> None:
    assert {trigger.kind for trigger in TRIGGERS.values()} == set(RULES) - {ExitClass.NONPROTECTED}


ALL_FLAGS = 0xFFFF_FFFF_FFFF_FFFC
"""Every flag but the two that mean something."""
RETRIED = (
    "wfi", "read of a host-handled register", "write of a host-handled register", "fetch", "pair",
    "load of 64 bits", "store of 8 bits", "no table pages", "interrupt",
)  # fmt: skip


@pytest.mark.parametrize("name", RETRIED)
def test_without_a_flag_no_lie_gets_in(name: str) -> None:
    assert scene(name).enter(ALL_FLAGS, secret(90)) == {}


@pytest.mark.parametrize("name", ["fetch", "pair", "no table pages", "interrupt"])
def test_increment_pc_is_for_instructions_that_the_host_emulates(name: str) -> None:
    assert scene(name).enter(ALL_FLAGS | INCREMENT_PC, secret(90)) == {}


@pytest.mark.parametrize("name", ["wfi", "no table pages", "interrupt"])
def test_no_exception_where_none_can_be(name: str) -> None:
    changes = scene(name).enter(PENDING_EXCEPTION, secret(90))
    assert changes == {}


@pytest.mark.parametrize(
    "name",
    ["wfi", "write of a host-handled register", "store of XZR", "store of 8 bits", "load to XZR"],
)
def test_increment_pc_alone(name: str) -> None:
    one = scene(name)
    assert one.enter(INCREMENT_PC, secret(90)) == {"PC": (one.pc, one.pc + 4)}


def test_giving_up_a_page_succeeds_whatever_the_host_says() -> None:
    one = scene("page given up")
    assert one.el2.bus.read(one.guest.ram + GIVEN - RAM_IPA, PAGE) == bytes(PAGE)
    changes = one.enter(ALL_FLAGS | INCREMENT_PC | PENDING_EXCEPTION, secret(90))
    assert changes == {"X0": (Function.MEM_RELINQUISH, 0), "X1": (GIVEN, 0)}


def test_a_register_read_gets_the_hosts_x0() -> None:
    one = scene("read of a host-handled register")
    changes = one.enter(INCREMENT_PC, secret(90))
    assert changes == {"PC": (one.pc, one.pc + 4), "X7": (DATA, secret(90))}


LOADS = {
    "ldrb": (a64.load(7, 9, size=0), 0x9A, 0x9A),
    "ldrh": (a64.load(7, 9, size=1), 0x9A9A, 0x9A9A),
    "ldr w": (a64.load(7, 9, size=2), 0x9A9A_9A9A, 0x9A9A_9A9A),
    "ldr x": (a64.load(7, 9, size=3), 0x9A9A_9A9A_9A9A_9A9A, 0x9A9A_9A9A_9A9A_9A9A),
    "ldrsb x": (a64.load(7, 9, size=0, signed=True), 0x9A, 0xFFFF_FFFF_FFFF_FF9A),
    "ldrsb w": (a64.load(7, 9, size=0, signed=True, to_w=True), 0x9A, 0xFFFF_FF9A),
    "ldrsh x": (a64.load(7, 9, size=1, signed=True), 0x9A9A, 0xFFFF_FFFF_FFFF_9A9A),
    "ldrsh w": (a64.load(7, 9, size=1, signed=True, to_w=True), 0x9A9A, 0xFFFF_9A9A),
    "ldrsw": (a64.load(7, 9, size=2, signed=True), 0x9A9A_9A9A, 0xFFFF_FFFF_9A9A_9A9A),
    "ldrsh of a positive number": (a64.load(7, 9, size=1, signed=True), 0x1A9A, 0x1A9A),
}


@pytest.mark.parametrize("name", LOADS)
def test_a_load_gets_data_of_its_size_extended_as_it_says(name: str) -> None:
    instruction, data, value = LOADS[name]
    one = Scene(mmio(0, write=False)._replace(instruction=instruction))
    one.leave()
    above = 0x77 << 8 * max(1, data.bit_length() + 7 >> 3) if data < 1 << 56 else 0
    changes = one.enter(INCREMENT_PC, data | above)
    assert changes == {"PC": (one.pc, one.pc + 4), "X7": (DATA, value)}


@pytest.mark.parametrize("name", ["CPU_SUSPEND", "SYSTEM_RESET2"])
def test_a_call_that_the_host_serves_returns_its_x0(name: str) -> None:
    one = scene(name)
    before = one.registers()
    changes = one.enter(ALL_FLAGS | INCREMENT_PC | PENDING_EXCEPTION, secret(90))
    assert changes.pop("X0") == (before["X0"], secret(90))
    assert {name: new for name, (_, new) in changes.items()} == {
        f"X{n}": 0 for n in (1, 2, 3) if before[f"X{n}"]
    }


@pytest.mark.parametrize("name", ["SYSTEM_OFF", "SYSTEM_RESET"])
def test_a_vm_that_ended_itself_learns_that_it_did_not(name: str) -> None:
    changes = scene(name).enter(0, 0)
    assert changes["X0"][1] == psci.INTERNAL_FAILURE


def test_a_vcpu_that_is_off_does_not_run() -> None:
    one = scene("CPU_OFF")
    before = one.registers()
    one.lie()
    page = one.host_page()
    assert one.guest.run() == ExitCode.ILLEGAL
    assert one.registers() == before
    assert one.host_page() == page


EXCEPTIONS = {
    "read of a host-handled register": (0x0200_0000, None),
    "write of a host-handled register": (0x0200_0000, None),
    "fetch": (0x8600_0010, NOWHERE + 0x124),
    "pair": (0x9600_0010, UART),
    "load of 64 bits": (0x9600_0010, UART),
    "store of 8 bits": (0x9600_0010, UART),
}


@pytest.mark.parametrize("flags", [PENDING_EXCEPTION, PENDING_EXCEPTION | INCREMENT_PC])
@pytest.mark.parametrize("name", EXCEPTIONS)
def test_a_pending_exception_is_the_one_of_the_class_and_wins(name: str, flags: int) -> None:
    esr, far = EXCEPTIONS[name]
    one = scene(name)
    before = one.registers()
    changes = one.enter(flags, secret(90))
    assert changes.pop("ESR_EL1")[1] == esr
    if far is not None:
        assert changes.pop("FAR_EL1")[1] == far
    assert changes.pop("PC")[1] == VBAR + 0x200
    assert changes.pop("ELR")[1] == (before["PC"])
    assert changes.pop("SPSR")[1] == before["PSTATE"]
    assert changes == {}


def test_an_answer_is_taken_once() -> None:
    one = scene("wfi")
    assert one.enter(INCREMENT_PC, 0)
    assert one.enter(INCREMENT_PC, 0) == {}


def test_an_abort_at_el0_is_one_from_a_lower_level() -> None:
    one = scene("pair")
    one.el2.engine.pstate = r.PSTATE_EL0T
    changes = one.enter(PENDING_EXCEPTION, 0)
    assert changes["ESR_EL1"][1] == 0x9200_0010
    assert changes["PC"][1] == VBAR + 0x400


def test_an_abort_on_a_table_walk_shows_no_register() -> None:
    """The guest's own stage 1 in a page that it has not: S1PTW, and no syndrome of the access."""
    trigger = Trigger(ExitClass.DABT, a64.load(7, 9, size=3), {9: RAM_IPA}, {})
    one = Scene(trigger)
    engine = one.el2.engine
    engine.write_sysreg(r.TTBR0_EL1, NOWHERE)
    engine.write_sysreg(r.TCR_EL1, 25)
    engine.write_sysreg(r.SCTLR_EL1, r.SCTLR_EL1_RESET | 1)
    assert one.leave() == ExitCode.TRAP
    assert one.guest.shown[RunResult.HPFAR] == NOWHERE >> 8
    assert one.guest.esr() & 1 << 7
    assert not one.guest.esr() & 1 << 24


@pytest.mark.parametrize("where", ["data", "idle"])
def test_aarch32_ends_the_vcpu(where: str) -> None:
    """The guest drops itself to AArch32 EL0: at the next exit of any kind it is over."""
    el2 = El2()
    user = RAM_IPA + 0x1000
    code = [
        *a64.mov(1, user),
        a64.msr(r.SysReg(3, 0, 4, 0, 1), 1),  # ELR_EL1
        *a64.mov(1, r.PSTATE_NRW),
        a64.msr(r.SysReg(3, 0, 4, 0, 0), 1),  # SPSR_EL1
        *a64.mov(1, NOWHERE),
        a64.ERET,
    ]
    code += [0] * (0x400 - len(code))
    code += [a64.A32_LDR_R0_R1 if where == "data" else a64.A32_LOOP, a64.A32_LOOP]
    guest = Guest(el2, code)
    if where == "idle":
        _interrupt_when_in_aarch32(el2)
    el2.bus.write(guest.vcpus[0] + 8 * 31, bytes([FILL]) * (PAGE - 8 * 31))
    before = el2.bus.read(guest.vcpus[0], PAGE)
    assert guest.run() == ExitCode.ILLEGAL
    assert el2.bus.read(guest.vcpus[0], PAGE) == before
    assert el2.refusals()[-1].why == "the guest is in AArch32 state"
    assert guest.run() == ExitCode.ILLEGAL
    assert guest.vcpu().exit_class == ExitClass.ILLEGAL
    el2.sound()


def _interrupt_when_in_aarch32(el2: El2) -> None:
    import threading

    def later() -> None:
        while not el2.engine.pstate & r.PSTATE_NRW:
            pass
        el2.engine.interrupt()

    threading.Thread(target=later, daemon=True).start()


def test_illegal_exit_leaves_power_to_the_guest() -> None:
    one = scene("unhandled")
    assert one.guest.run() == ExitCode.ILLEGAL
    assert one.guest.vcpu().power == psci.Affinity.ON
    assert one.el2.x1(HostCall.VCPU_PUT) == 0
