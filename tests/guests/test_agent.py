# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent: every command, and that it survives whatever an operation does to it."""

from __future__ import annotations

import zlib

import pytest

from fakes.bare_board import PAYLOAD, RAM_BASE, SLOT_BYTES, BareBoard
from pkvm.arm64 import psci, smccc
from pkvm.arm64 import registers as r
from pkvm.arm64.esr import EC
from pkvm.guests.agent import (
    Agent,
    AgentCommandError,
    AgentExitError,
    GuestExceptionError,
    MmioExit,
    pattern,
)
from pkvm.guests.protocol import ABI, Boot, Command, Info, Op, Sealed, Status
from pkvm.kvm.exits import Intr, Mmio, SystemEvent

NOWHERE = 0x2000_0000
DEVICE = 0x0A00_0000
VECTOR_CURRENT = 0x200
VECTOR_LOWER_64 = 0x400
VECTOR_LOWER_32 = 0x600
LOADS = {
    Op.LDRB: (1, False, 64), Op.LDRH: (2, False, 64), Op.LDR_W: (4, False, 64),
    Op.LDR_X: (8, False, 64), Op.LDRSB_W: (1, True, 32), Op.LDRSB_X: (1, True, 64),
    Op.LDRSH_W: (2, True, 32), Op.LDRSH_X: (2, True, 64), Op.LDRSW: (4, True, 64),
}  # fmt: skip
"""Loads: bytes, sign-extended, to how many bits."""
STORES = {Op.STRB: 1, Op.STRH: 2, Op.STR_W: 4, Op.STR_X: 8}
WITHOUT_SYNDROME = (Op.LDP, Op.STP, Op.LDR_Q0, Op.STR_Q0)
LDR_X1_X0 = 0xF940_0001
VALUE = 0x8182_8384_8586_8788


class Register:
    """A register at DEVICE, in the VMM."""

    def __init__(self) -> None:
        self.value = VALUE
        self.seen: list[MmioExit] = []

    def __call__(self, mmio: MmioExit) -> int:
        self.seen.append(mmio)
        if mmio.is_write:
            self.value = mmio.data
        return self.value


@pytest.fixture
def device() -> Register:
    return Register()


@pytest.fixture
def agent(board: BareBoard, device: Register) -> Agent:
    board.enter("agent")
    agent = Agent(board, on_mmio=device)
    agent.start()
    return agent


@pytest.fixture
def scratch(agent: Agent) -> int:
    return agent.info()[Info.SCRATCH]


def exception(agent: Agent, operation: Op, *x: int) -> GuestExceptionError:
    with pytest.raises(GuestExceptionError) as caught:
        agent.op(operation, *x)
    return caught.value


def test_info_and_entry_state(board: BareBoard) -> None:
    x = {number: 0x100 + number for number in range(31)}
    board.enter("agent", pc=0x4000, sp=SLOT_BYTES - 64, x=x, sysregs={r.TPIDR_EL1: 0x77})
    agent = Agent(board)
    agent.start()
    state = agent.boot_state()
    assert state[: Boot.SP] == tuple(x.values())
    assert state[Boot.SP] == SLOT_BYTES - 64
    assert state[Boot.PC] == 0x4000
    assert state[Boot.TPIDR_EL1] == 0x77
    assert state[Boot.SCTLR_EL1] == r.SCTLR_EL1_RESET
    info = agent.info()
    assert (info[Info.BASE], info[Info.ABI]) == (0x4000, ABI)
    assert info[Info.SCRATCH] % 4096 == 0
    assert 0x4000 < info[Info.SCRATCH] < info[Info.END] < SLOT_BYTES


def test_as_a_payload(board: BareBoard) -> None:
    board.enter(b"", payload="agent", sp=0)
    board.engine.pc = PAYLOAD
    agent = Agent(board)
    agent.start()
    assert agent.info()[Info.BASE] == PAYLOAD
    assert agent.load(RAM_BASE) == 0


@pytest.mark.parametrize("operation", LOADS)
def test_load(agent: Agent, scratch: int, device: Register, operation: Op) -> None:
    size, signed, bits = LOADS[operation]
    agent.store(scratch, VALUE)
    raw = (VALUE & (1 << 8 * size) - 1).to_bytes(size, "little")
    wanted = int.from_bytes(raw, "little", signed=signed) & (1 << bits) - 1
    assert agent.op(operation, scratch)[1] == wanted
    assert agent.op(operation, DEVICE + 0x10)[1] == wanted
    assert device.seen == [Mmio(DEVICE + 0x10, size, 0, False)]


@pytest.mark.parametrize("operation", STORES)
def test_store(agent: Agent, scratch: int, device: Register, operation: Op) -> None:
    size = STORES[operation]
    agent.op(operation, scratch, VALUE)
    assert agent.load(scratch) == VALUE & (1 << 8 * size) - 1
    agent.op(operation, DEVICE, VALUE)
    assert device.seen == [Mmio(DEVICE, size, VALUE & (1 << 8 * size) - 1, True)]


def test_zero_register(agent: Agent, device: Register) -> None:
    agent.op(Op.STR_XZR, DEVICE)
    assert device.value == 0
    agent.op(Op.LDR_XZR, DEVICE)
    assert [mmio.is_write for mmio in device.seen] == [True, False]


@pytest.mark.parametrize("operation", WITHOUT_SYNDROME)
def test_access_without_syndrome(
    agent: Agent, scratch: int, device: Register, operation: Op
) -> None:
    agent.op(operation, scratch, 1, 2)
    error = exception(agent, operation, NOWHERE, 1, 2)
    assert (error.esr >> 26, error.far, error.vector) == (EC.DABT_CUR, NOWHERE, VECTOR_CURRENT)
    assert error.x == (NOWHERE, 1, 2)
    assert device.seen == []


def test_pairs_and_post_index(agent: Agent, scratch: int) -> None:
    agent.op(Op.STP, scratch, 11, 22)
    assert agent.op(Op.LDP, scratch)[1:3] == (11, 22)
    assert agent.op(Op.LDR_POST, scratch)[:2] == (scratch + 8, 11)
    assert agent.op(Op.STR_POST, scratch + 8, 33)[0] == scratch + 16
    assert agent.op(Op.LDAR, scratch + 8)[1] == 33
    agent.op(Op.STLR, scratch, 44)
    assert agent.op(Op.LDXR, scratch)[1] == 44


def test_calls(agent: Agent, board: BareBoard) -> None:
    board.calls[0xC600_0077] = (1, 2, 3, 4)
    assert agent.hvc(0xC600_0077, *range(101, 116)) == (1, 2, 3, 4, 104, 105, 106, 107)
    assert board.hypercalls == [(0xC600_0077, 101, 102, 103)]
    assert agent.smc(psci.Function.PSCI_VERSION)[0] == smccc.NOT_SUPPORTED
    error = exception(agent, Op.SVC)
    assert (error.esr >> 26, error.vector) == (EC.SVC64, VECTOR_CURRENT)


def test_end_of_the_machine(agent: Agent) -> None:
    with pytest.raises(AgentExitError) as caught:
        agent.hvc(psci.Function.SYSTEM_OFF)
    assert caught.value.exit == SystemEvent("shutdown")


def test_exit_elsewhere_is_the_tests(board: BareBoard) -> None:
    board.enter("agent")
    agent = Agent(board)
    agent.start()
    with pytest.raises(AgentExitError) as caught:
        agent.load(DEVICE, 4)
    assert caught.value.exit == Mmio(DEVICE, 4, 0, False)
    with pytest.raises(RuntimeError, match="does not wait"):
        agent.info()
    board.complete(Mmio(DEVICE, 4, 0, False), 0xABCD)
    assert agent.resume().results[1] == 0xABCD


def test_execute(agent: Agent) -> None:
    add = 0x8B01_0000
    assert agent.execute(add, x=(2, 3))[0] == 5
    assert agent.execute(add, add, add, add, x=(2, 3))[0] == 14
    with pytest.raises(GuestExceptionError) as caught:
        agent.execute(0xD420_0020)
    assert caught.value.esr == EC.BRK64 << 26 | 1 << 25 | 1
    with pytest.raises(GuestExceptionError) as caught:
        agent.execute(0x0000_0001)
    assert caught.value.esr >> 26 == EC.UNKNOWN
    assert agent.execute()[0] == 0


def test_execute_ruins_what_it_can(agent: Agent) -> None:
    mov_sp_x0, msr_spsel_0, msr_daifclr = 0x9100_001F, 0xD500_40BF, 0xD503_4FFF
    agent.execute(mov_sp_x0, x=(0x123,))
    agent.execute(msr_spsel_0, mov_sp_x0, msr_daifclr, x=(0x123,))
    with pytest.raises(GuestExceptionError) as caught:
        agent.execute(msr_spsel_0, mov_sp_x0, 0xD400_0021, x=(0x77,))
    assert caught.value.vector == 0x000
    assert agent.read_sysreg(*r.SysReg(3, 0, 4, 1, 0)) == 0x77, "SP_EL0"
    assert agent.read_sysreg(3, 3, 4, 2, 1) == 0x3C0, "DAIF"


def test_system_registers(agent: Agent) -> None:
    agent.write_sysreg(*r.TPIDR_EL0, 0x1122_3344_5566_7788)
    assert agent.read_sysreg(*r.TPIDR_EL0) == 0x1122_3344_5566_7788
    assert agent.read_sysreg(*r.MPIDR_EL1) == 0x8000_0000
    with pytest.raises(GuestExceptionError) as caught:
        agent.read_sysreg(*r.HCR_EL2)
    assert caught.value.esr >> 26 == EC.UNKNOWN


def test_branch(agent: Agent, scratch: int) -> None:
    agent.store(scratch, 0x8B01_0000, 4)
    agent.store(scratch + 4, 0xD65F_03C0, 4)
    assert agent.branch(scratch, 20, 22)[0] == 42
    for address in (NOWHERE, DEVICE):
        with pytest.raises(GuestExceptionError) as caught:
            agent.branch(address)
        assert (caught.value.esr >> 26, caught.value.elr) == (EC.IABT_CUR, address)
    with pytest.raises(GuestExceptionError) as caught:
        agent.branch(scratch + 2)
    assert caught.value.elr == scratch + 2


def test_el0(agent: Agent) -> None:
    code = agent.info()[Info.CODE]
    back = agent.eret(0x3C0)
    assert (back.esr >> 26, back.vector, back.elr) == (EC.SVC64, VECTOR_LOWER_64, code + 20)
    back = agent.eret(0x3C0, 0x8B01_0000, x=(1, 2))
    assert back.x == (3, 2, 0)
    back = agent.eret(0x3C0, 0xD500_4FDF)
    assert back.esr >> 26 in (EC.UNKNOWN, EC.SYS64), "MSR DAIFSet at EL0"


@pytest.mark.parametrize(("spsr", "instruction"), [(0x1D0, 0xE3A0_0007), (0x1F0, 0x2007_2007)])
def test_aarch32_el0(agent: Agent, spsr: int, instruction: int) -> None:
    back = agent.eret(spsr, instruction)
    assert (back.esr >> 26, back.vector, back.x[0]) == (0x11, VECTOR_LOWER_32, 7)
    assert agent.hvc(psci.Function.PSCI_VERSION)[0] == psci.VERSION_1_1


def test_simd(agent: Agent) -> None:
    agent.op(Op.V_SET, 0, 1, 2)
    agent.op(Op.V_SET, 31, VALUE, ~VALUE)
    agent.hvc(psci.Function.PSCI_VERSION)
    assert agent.op(Op.V_GET, 31)[:2] == (VALUE, ~VALUE & (1 << 64) - 1)
    assert agent.op(Op.V_GET, 0)[:2] == (1, 2)
    assert agent.op(Op.V_GET, 1)[:2] == (0, 0)


def test_memory_operations(agent: Agent, board: BareBoard, scratch: int) -> None:
    agent.op(Op.MEM_FILL, scratch, 4096, 9)
    content = board.read(scratch, 4096)
    assert content == b"".join(pattern(9, n).to_bytes(8, "little") for n in range(512))
    assert agent.op(Op.MEM_CHECK, scratch, 4096, 9)[:2] == (0, 0)
    assert agent.op(Op.MEM_CRC, scratch, 4096)[0] == zlib.crc32(content)
    board.write(scratch + 100, b"\0\0")
    assert agent.op(Op.MEM_CHECK, scratch, 4096, 9)[:2] == (1, scratch + 96)
    agent.op(Op.MEM_SET, scratch, 16, VALUE)
    assert agent.op(Op.MEM_CHECK, scratch, 4096, 9)[:2] == (3, scratch)


def test_sealed(agent: Agent, device: Register) -> None:
    version = agent.sealed(Op.HVC, psci.Function.PSCI_VERSION, seed=5)
    assert version.x == 0b1110, "the callee's X1-X3"
    assert (version.v, version.system) == (0, Sealed(0))
    assert version.results == (psci.VERSION_1_1, 0, 0, 0)
    load = agent.sealed(Op.LDR_W, DEVICE, seed=6)
    assert (load.x, load.first) == (0b10, VALUE & 0xFFFF_FFFF)
    assert agent.sealed(Op.STR_X, DEVICE, 1, seed=7).x == 0
    assert device.value == 1
    assert agent.sealed(Op.WFI).x == 0


def test_sealed_tells_what_changed(agent: Agent, board: BareBoard) -> None:
    """An EL2 and a VMM that do not leave a CPU alone."""

    def meddle(mmio: MmioExit) -> int:
        board.engine.x[19] ^= 1
        board.engine.x[29] = 0
        board.engine.write_sysreg(r.TPIDR_EL0, 0)
        board.engine.set_elr_el1(0)
        registers = bytearray(board.engine.fp_registers())
        registers[16 * 7] ^= 1
        registers[16 * 31 + 15] ^= 1
        board.engine.set_fp_registers(bytes(registers))
        return 0

    agent.on_mmio = meddle
    found = agent.sealed(Op.STR_X, DEVICE, 0, seed=8)
    assert found.x == 1 << 19 | 1 << 29
    assert found.first == pattern(8, 19) ^ 1
    assert found.v == 1 << 7 | 1 << 31
    assert found.system == Sealed.TPIDR_EL0 | Sealed.ELR_EL1


def test_mmu(agent: Agent, scratch: int, device: Register) -> None:
    agent.store(scratch, VALUE)
    tables = agent.op(Op.MMU_ON)[0]
    assert tables == agent.info()[Info.TABLES]
    assert agent.read_sysreg(*r.SCTLR_EL1) == r.SCTLR_EL1_RESET | 1
    assert agent.load(scratch) == VALUE
    assert agent.load(DEVICE) == VALUE
    back = agent.eret(0x3C0, LDR_X1_X0, x=(scratch,))
    assert (back.esr >> 26, back.esr & 0x3F) == (EC.DABT_LOW, 0x0C | 2), "no access for EL0"
    assert exception(agent, Op.LDR_X, 1 << 39).esr & 0x3F == 0x04 | 0, "above TCR_EL1.T0SZ"
    agent.op(Op.MMU_OFF)
    assert agent.read_sysreg(*r.SCTLR_EL1) == r.SCTLR_EL1_RESET


def test_rubbish_tables(agent: Agent) -> None:
    agent.op(Op.MMU_ON)
    for seed in range(4):
        agent.op(Op.MMU_RUBBISH, seed)
        faults = 0
        for gigabyte in range(1, 32):
            answer = agent.call(Command.RUN, (1, Op.LDR_X), (gigabyte << 30,))
            if answer.status == Status.EXCEPTION:
                faults += 1
                assert answer.results[0] >> 26 == EC.DABT_CUR
        assert faults
    agent.op(Op.MMU_OFF)
    assert agent.hvc(psci.Function.PSCI_VERSION)[0] == psci.VERSION_1_1


@pytest.mark.parametrize("operation", [Op.WFI, Op.WFE])
def test_wait(agent: Agent, operation: Op) -> None:
    agent.op(operation)


def test_count(agent: Agent) -> None:
    assert agent.op(Op.COUNT, 100_000)[0] == 0


def test_spin(agent: Agent, board: BareBoard) -> None:
    board.engine.interrupt()
    with pytest.raises(AgentExitError) as caught:
        agent.op(Op.SPIN)
    assert caught.value.exit == Intr()


@pytest.mark.parametrize(
    ("command", "args"),
    [
        (99, ()),
        (Command.RUN, (0, 7 + Op.DC_IVAC)),
        (Command.RUN, (17, Op.HVC)),
        (Command.RUN, (0, 1 << 63)),
        (Command.SEALED, (0, Op.MEM_FILL)),
        (Command.EXECUTE, (17,)),
        (Command.BOOT, (57,)),
        (Command.BOOT, ((1 << 64) - 1,)),
    ],
)
def test_bad_commands(agent: Agent, command: int, args: tuple[int, ...]) -> None:
    assert agent.call(command, args).status == Status.BAD_COMMAND
    assert agent.info()[Info.ABI] == ABI


def test_bad_operation_is_raised(agent: Agent) -> None:
    with pytest.raises(AgentCommandError, match="BAD_COMMAND"):
        agent.sealed(Op.MEM_FILL)
    with pytest.raises(ValueError, match="do not fit"):
        agent.hvc(*range(17))


def test_no_command_is_asked_again(agent: Agent) -> None:
    agent.call(Command.NONE)
    assert agent.info()[Info.ABI] == ABI
