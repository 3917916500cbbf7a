# SPDX-License-Identifier: GPL-2.0-or-later
"""How a machine is wired; with a stand-in for the CPU engine, and with the real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
from stage2_trees import KIB4, RAM, Tree

from pkvm.events import DmaFault, Event
from pkvm.machine import dma
from pkvm.machine.cpu.engine import CpuEngine
from pkvm.machine.machine import DMA_BASE, IPA_BITS, PARANGE, RAM_BASE, Machine
from pkvm.machine.memory import PhysicalMemory


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
    assert [(window.base, window.size) for window in machine.memory.windows] == [(DMA_BASE, KIB4)]


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
    machine.dma_bus.attach(tree.context)
    for register, value in ((dma.SRC, 0), (dma.DST, RAM_BASE), (dma.LEN, 8), (dma.CTRL, 1)):
        machine.host_bus.write_u64(DMA_BASE + register, value)
    assert machine.host_bus.read_u64(DMA_BASE + dma.STATUS) == dma.STATUS_FAULT
    assert events == [DmaFault("dma-copy", RAM_BASE, "write")]


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
