# SPDX-License-Identifier: GPL-2.0-or-later
"""How a machine is wired; with a stand-in for the CPU engine, and with the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import pytest

from fakes.smmu_software import CR0, GBPA, SMMUEN, STRTAB_BASE, STRTAB_BASE_CFG, translating
from fakes.stage2_trees import KIB4, RAM, Tree
from pkvm.events import DmaFault, Event, SmmuEvent
from pkvm.machine import dma
from pkvm.machine.clock import counter_ticks
from pkvm.machine.cpu.engine import CpuEngine, StopReason
from pkvm.machine.machine import (
    DMA_BASE,
    DMA_STREAM,
    IPA_BITS,
    PARANGE,
    RAM_BASE,
    SG_BASE,
    SG_STREAM,
    SMMU_BASE,
    Machine,
)
from pkvm.machine.memory import PhysicalMemory

STRTAB = RAM + 0x4_0000


class Log(list[Event]):
    def record(self, event: Event) -> None:
        self.append(event)


class StandInEngine:
    """Counts what the machine asks of an engine; reads the counter while it is being made."""

    def __init__(
        self,
        memory: PhysicalMemory,
        *,
        cpu_model: str,
        count_blocks: bool,
        counter: Callable[[], int] | None,
    ) -> None:
        self.memory = memory
        self.cpu_model = cpu_model
        self.count_blocks = count_blocks
        self.counter = counter
        self.first_count = counter() if counter else None
        self.blocks = 0
        self.forgotten: list[tuple[int, int]] = []
        self.closed = 0

    def invalidate_code(self, pa: int, length: int) -> None:
        self.forgotten.append((pa, length))

    def close(self) -> None:
        self.closed += 1


def make_stand_in(
    memory: PhysicalMemory,
    *,
    cpu_model: str,
    count_blocks: bool,
    counter: Callable[[], int] | None,
) -> CpuEngine:
    return cast(
        CpuEngine,
        StandInEngine(memory, cpu_model=cpu_model, count_blocks=count_blocks, counter=counter),
    )


def machine_with_stand_in(
    *, virtual_clock: bool = False, cpu_model: str = "cortex-a72"
) -> tuple[Machine, StandInEngine]:
    machine = Machine(
        1 << 20,
        virtual_clock=virtual_clock,
        cpu_model=cpu_model,
        recorder=Log(),
        make_engine=make_stand_in,
    )
    return machine, cast(StandInEngine, machine.engine)


def test_the_address_map() -> None:
    machine, _ = machine_with_stand_in()
    assert (IPA_BITS, PARANGE) == (40, 2)
    assert (machine.memory.ram_base, machine.memory.ram_bytes) == (RAM_BASE, 1 << 20)
    windows = [(SMMU_BASE, 0x2_0000), (DMA_BASE, KIB4), (SG_BASE, KIB4)]
    assert [(window.base, window.size) for window in machine.memory.windows] == windows
    assert machine.dma_devices == (
        ("dma-copy", DMA_BASE, KIB4, DMA_STREAM),
        ("dma-sg", SG_BASE, KIB4, SG_STREAM),
    )


@pytest.mark.parametrize("ram_bytes", [0, 1, -4096, 1 << 40, (1 << 40) - RAM_BASE + 4096])
def test_ram_must_be_pages_inside_the_address_space(ram_bytes: int) -> None:
    with pytest.raises(ValueError, match=r"page-aligned|address space"):
        Machine(ram_bytes, recorder=Log(), make_engine=make_stand_in)


def test_with_the_real_clock_the_engine_counts_nothing() -> None:
    machine, engine = machine_with_stand_in(cpu_model="max")
    assert not machine.clock.virtual
    assert not engine.count_blocks
    assert engine.counter is None
    assert engine.cpu_model == "max"
    assert engine.memory is machine.memory


def test_virtual_time_is_the_engines_count_of_blocks_and_its_counter_is_that_time() -> None:
    machine, engine = machine_with_stand_in(virtual_clock=True)
    assert machine.clock.virtual
    assert engine.count_blocks
    assert engine.first_count == 0
    assert engine.counter is not None
    engine.blocks = 5
    assert machine.clock.now_ns() == 80
    assert engine.counter() == 5


def test_writes_of_every_bus_master_reach_the_engines_translations() -> None:
    machine, engine = machine_with_stand_in()
    assert machine.smmu is not None
    machine.smmu.window.write(GBPA, 4, 1 << 31)  # bypass
    machine.host_bus.write(RAM_BASE + 0x800, b"abcd")
    assert engine.forgotten == [(RAM_BASE + 0x800, 4)]
    for register, value in ((dma.SRC, RAM_BASE), (dma.DST, RAM_BASE + KIB4), (dma.LEN, 2 * KIB4)):
        machine.host_bus.write_u64(DMA_BASE + register, value)
    assert len(engine.forgotten) == 1
    machine.host_bus.write_u64(DMA_BASE + dma.CTRL, dma.CTRL_START)
    assert engine.forgotten[1:] == [(RAM_BASE + KIB4, KIB4), (RAM_BASE + 2 * KIB4, KIB4)]
    assert machine.memory.read(RAM_BASE + KIB4 + 0x800, 4) == b"abcd"


def test_the_device_is_held_by_its_own_stage_2() -> None:
    events = Log()
    machine = Machine(1 << 20, recorder=events, make_engine=make_stand_in)
    tree = Tree(machine.memory, RAM)
    tree.page(0, RAM_BASE + 0x8_0000)
    for index, word in enumerate(translating(RAM)):
        machine.memory.write_u64(STRTAB + 64 * DMA_STREAM + 8 * index, word)
    smmu = machine.smmu
    assert smmu is not None
    smmu.window.write(STRTAB_BASE, 8, STRTAB)
    smmu.window.write(STRTAB_BASE_CFG, 4, 6)
    smmu.window.write(CR0, 4, SMMUEN)
    for register, value in ((dma.SRC, 0), (dma.DST, RAM_BASE), (dma.LEN, 8), (dma.CTRL, 1)):
        machine.host_bus.write_u64(DMA_BASE + register, value)
    assert machine.host_bus.read_u64(DMA_BASE + dma.STATUS) == dma.STATUS_FAULT
    assert events == [
        SmmuEvent(DMA_STREAM, "F_TRANSLATION", RAM_BASE, "write"),
        DmaFault("dma-copy", RAM_BASE, "write"),
    ]


def test_at_reset_no_device_reaches_anything() -> None:
    events = Log()
    machine = Machine(1 << 20, recorder=events, make_engine=make_stand_in)
    for register, value in ((dma.SRC, RAM), (dma.DST, RAM + 64), (dma.LEN, 8), (dma.CTRL, 1)):
        machine.host_bus.write_u64(DMA_BASE + register, value)
    assert machine.host_bus.read_u64(DMA_BASE + dma.STATUS) == dma.STATUS_FAULT
    assert events == [DmaFault("dma-copy", RAM, "read")]


def test_without_an_smmu_there_are_no_devices() -> None:
    machine = Machine(1 << 20, recorder=Log(), make_engine=make_stand_in, smmu=False)
    assert machine.smmu is None
    assert machine.dma_devices == ()
    assert machine.memory.windows == ()


def test_close() -> None:
    machine, engine = machine_with_stand_in(virtual_clock=True)
    engine.blocks = 7
    machine.close()
    machine.close()
    assert engine.closed == 1
    assert machine.clock.now_ns() == 7 * 16
    with pytest.raises(RuntimeError, match="closed"):
        _ = machine.engine
    machine.host_bus.write(RAM_BASE, b"x")
    assert engine.forgotten == []


HVC = 0xD400_0002
READ_COUNTER = 0xD53B_E040
"""MRS X0, CNTVCT_EL0"""
CODE = RAM_BASE + 0x4000


def move_to_x0(value: int) -> int:
    """MOVZ X0, #value"""
    return 0xD280_0000 | value << 5


def program(*words: int) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in words)


def run_at(machine: Machine, address: int) -> int:
    """Run from `address` to the first exception to EL2; X0 there."""
    engine = machine.engine
    engine.vector = lambda: False
    engine.pstate = 0x3C5
    engine.pc = address
    assert engine.run() is StopReason.VECTOR
    assert engine.esr_el2 >> 26 == 0x16
    return engine.x[0]


class TestWithUnicorn:
    @pytest.fixture(params=[False, True], ids=["real", "virtual"])
    def machine(self, request: pytest.FixtureRequest) -> Iterator[Machine]:
        machine = Machine(1 << 20, virtual_clock=request.param, recorder=Log())
        yield machine
        machine.close()

    def test_code_that_the_host_or_a_device_replaces_is_not_run_again(
        self, machine: Machine
    ) -> None:
        bus = machine.host_bus
        bus.write(CODE, program(move_to_x0(1), HVC))
        assert run_at(machine, CODE) == 1
        bus.write(CODE, program(move_to_x0(2), HVC))
        assert run_at(machine, CODE) == 2
        bus.write_u64(CODE, HVC << 32 | move_to_x0(3))
        assert run_at(machine, CODE) == 3
        assert machine.smmu is not None
        machine.smmu.window.write(GBPA, 4, 1 << 31)  # bypass
        bus.write(CODE + 0x8000, program(move_to_x0(4), HVC))
        for register, value in ((dma.SRC, CODE + 0x8000), (dma.DST, CODE), (dma.LEN, 8)):
            bus.write_u64(DMA_BASE + register, value)
        bus.write_u64(DMA_BASE + dma.CTRL, dma.CTRL_START)
        assert run_at(machine, CODE) == 4

    def test_the_guests_counter_is_the_machines_clock(self, machine: Machine) -> None:
        machine.host_bus.write(CODE, program(READ_COUNTER, HVC))
        before = counter_ticks(machine.clock.now_ns())
        seen = run_at(machine, CODE)
        assert before <= seen <= counter_ticks(machine.clock.now_ns())


def test_two_virtual_runs_take_the_same_time() -> None:
    times = []
    for _ in range(2):
        machine = Machine(1 << 20, virtual_clock=True, recorder=Log())
        # MOVZ X0, #500; loop: SUBS X0, X0, #1; B.NE loop; then the counter
        loop = program(move_to_x0(500), 0xF100_0400, 0x54FF_FFE1, READ_COUNTER, HVC)
        machine.host_bus.write(CODE, loop)
        start = machine.clock.now_ns()
        counter = run_at(machine, CODE)
        times.append((counter, machine.clock.now_ns() - start))
        machine.close()
    assert times[0] == times[1]
    assert times[0][0] >= 500
    assert times[0][1] >= 500 * 16
