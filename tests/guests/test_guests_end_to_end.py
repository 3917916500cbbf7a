# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest programs in whole VMs: our EL2, our host, our VMM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pkvm import guests
from pkvm.arm64 import psci, smccc
from pkvm.arm64 import registers as r
from pkvm.arm64.esr import EC
from pkvm.guests.agent import Agent, AgentExitError, GuestExceptionError
from pkvm.guests.protocol import Boot, Info, Op, Sealed
from pkvm.kvm import Kvm, SystemEvent, Vcpu
from pkvm.system import System
from pkvm.vmm import board as vmm_board
from pkvm.vmm.board import Board
from pkvm.vmm.loader import load_image
from pkvm.vmm.vmm import Vmm

SLOT_BYTES = 2 << 20
RAM_BASE = 0x4000_0000
RAM_BYTES = 8 << 20
DEVICE = 0x0A00_0000


@pytest.fixture(scope="module")
def kvm() -> Iterator[Kvm]:
    with System(64 << 20) as system, system.open() as kvm:
        yield kvm


def console_of(kvm: Kvm, program: str, cpus: int, *, protected: bool) -> str:
    """Run a payload behind the firmware to its power-off; the console."""
    board = Board(ram_bytes=RAM_BYTES, cpus=cpus, command_line="quiet")
    console = bytearray()
    vmm = Vmm(
        kvm,
        board,
        load_image(guests.image(program), board),
        protected=protected,
        firmware=None if protected else guests.image("firmware"),
        console=console.extend,
    )
    try:
        outcome = vmm.run(timeout=60)
        assert vmm.sharing.notes == []
        assert vmm.stray_accesses == 0
    finally:
        vmm.close()
    text = console.decode()
    assert outcome.kind == "powered-off", text
    assert "BAD" not in text
    return text


@pytest.mark.parametrize("protected", [True, False])
def test_hello(kvm: Kvm, protected: bool) -> None:
    console = console_of(kvm, "hello", 1, protected=protected)
    assert console.endswith("hello from the guest\nhello: arguments: quiet\n")
    assert ("KVM, protected VM" in console) == protected


@pytest.mark.parametrize("protected", [True, False])
def test_sharing(kvm: Kvm, protected: bool) -> None:
    console = console_of(kvm, "sharing", 1, protected=protected)
    assert console.endswith("sharing: my private pages are as I left them\n")
    assert ("sharing: shared the page at " in console) == protected


@pytest.mark.parametrize("protected", [True, False])
@pytest.mark.parametrize("cpus", [1, 2, vmm_board.MAX_VCPUS])
def test_smp(kvm: Kvm, cpus: int, protected: bool) -> None:
    console = console_of(kvm, "smp", cpus, protected=protected)
    lines = console[console.index("smp: ") :].splitlines()
    assert lines == [
        f"smp: {cpus} CPUs, this is 0x0",
        *(f"smp: CPU {cpu:#x} is up" for cpu in range(1, cpus)),
        "smp: all others are off again",
    ]


@pytest.fixture(scope="module")
def agent_kvm() -> Iterator[Kvm]:
    """A machine whose guest firmware is the agent."""
    with System(64 << 20, firmware=guests.image("agent")) as system, system.open() as kvm:
        yield kvm


@pytest.fixture
def vcpus(agent_kvm: Kvm) -> Iterator[tuple[Vcpu, Vcpu]]:
    """Two vCPUs of a protected VM, the agent in its firmware slot."""
    with agent_kvm.create_vm() as vm:
        ram, slot = agent_kvm.mmap(RAM_BYTES), agent_kvm.mmap(SLOT_BYTES)
        vm.set_user_memory_region(0, RAM_BASE, ram)
        vm.set_user_memory_region(1, 0, slot)
        vm.protect(1)
        with vm.create_vcpu(0) as first, vm.create_vcpu(1) as second:
            first.init()
            second.init(power_off=True)
            first.set_reg("x0", RAM_BASE)
            first.set_reg("x14", 14)
            first.set_reg("x15", 15)
            first.set_reg("x20", 20)
            yield first, second
        ram.close()
        slot.close()


@pytest.fixture
def agent(vcpus: tuple[Vcpu, Vcpu]) -> Agent:
    agent = Agent(vcpus[0], on_mmio=lambda mmio: 0x1234_5678_9ABC_DEF0)
    agent.start()
    return agent


def test_agent_sees_the_hand_over(agent: Agent) -> None:
    state = agent.boot_state()
    assert state[Boot.X0 : Boot.SP] == (RAM_BASE, *[0] * 13, 14, *[0] * 16)
    assert (state[Boot.PC], state[Boot.SP]) == (0, SLOT_BYTES)
    assert state[Boot.SCTLR_EL1] == r.SCTLR_EL1_RESET
    assert (state[Boot.CURRENT_EL], state[Boot.DAIF], state[Boot.SPSEL]) == (4, 0x3C0, 1)


def test_agent_memory_and_exceptions(agent: Agent) -> None:
    agent.store(RAM_BASE, 0x1122_3344_5566_7788)
    assert agent.load(RAM_BASE, 4) == 0x5566_7788
    assert agent.load(DEVICE, 2, signed=True) == 0xFFFF_FFFF_FFFF_DEF0
    with pytest.raises(GuestExceptionError) as caught:
        agent.execute(0xD420_0000)
    assert caught.value.esr >> 26 == EC.BRK64
    assert agent.eret(0x3C0).esr >> 26 == EC.SVC64


def test_agent_registers_survive_exits(agent: Agent) -> None:
    """Neither a hypercall nor an MMIO access changes what is not its result."""
    call = agent.sealed(Op.HVC, smccc.Function.HYP_MEMINFO, 0, 0, 0, seed=1)
    assert (call.x, call.v, call.system) == (0, 0, Sealed(0))
    assert call.results[0] == 4096
    load = agent.sealed(Op.LDR_X, DEVICE, seed=2)
    assert (load.x, load.v, load.system) == (1 << 1, 0, Sealed(0))
    assert load.results[:2] == (DEVICE, 0x1234_5678_9ABC_DEF0)
    store = agent.sealed(Op.STR_X, DEVICE, 1, seed=3)
    assert (store.x, store.v, store.system) == (0, 0, Sealed(0))


def test_agent_on_a_second_cpu(agent: Agent, vcpus: tuple[Vcpu, Vcpu]) -> None:
    entry = agent.info()[Info.SECONDARY]
    assert agent.hvc(psci.Function.CPU_ON_64, 1, entry, 0xC0DE)[0] == psci.SUCCESS
    second = Agent(vcpus[1], cpu=1)
    second.start()
    state = second.boot_state()
    assert state[Boot.X0 : Boot.SP + 1] == (0xC0DE, *[0] * 31)
    assert (state[Boot.PC], state[Boot.MPIDR_EL1] & 0xFF) == (entry, 1)
    agent.store(RAM_BASE, 77)
    assert second.load(RAM_BASE) == 77
    assert agent.hvc(psci.Function.CPU_ON_64, 1, entry, 0)[0] == psci.ALREADY_ON


def test_agent_ends_the_machine(agent: Agent) -> None:
    with pytest.raises(AgentExitError) as caught:
        agent.hvc(psci.Function.SYSTEM_OFF)
    assert isinstance(caught.value.exit, SystemEvent)
    assert caught.value.exit.kind == "shutdown"
