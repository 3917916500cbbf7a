# SPDX-License-Identifier: GPL-2.0-or-later
"""`Machine`: RAM, one physical CPU, the bus masters and the clock, wired together.

The physical address map: RAM from 0x8000_0000 on, the DMA copy engine's
registers at 0x1000_0000, the scatter-gather engine's behind them, the SMMU's at
0x1100_0000. The host CPU (`host_bus`) starts with no stage-2 before it, as at
reset; EL2 puts it behind one. The devices are behind the SMMU, which aborts
until EL2 turns it on. Their registers are on the CPU's bus too, for guests
whose stage-2 maps them. What they write to RAM, the CPU engine forgets its
translations of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from pkvm.arm64.stage2 import PARANGE_BITS
from pkvm.events import Recorder
from pkvm.machine.alarms import Alarm, Alarms
from pkvm.machine.bus import Bus
from pkvm.machine.clock import NS_PER_TICK, RealClock, VirtualClock, counter_ticks
from pkvm.machine.cpu.engine import CpuEngine
from pkvm.machine.dma import CopyEngine
from pkvm.machine.host_cpus import HostCpu, HostCpus
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.scatter import ScatterEngine
from pkvm.machine.smmu import DmaDevice, Smmu

if TYPE_CHECKING:
    from pkvm.arm64.ffa import Registers
    from pkvm.machine.firmware import Firmware

RAM_BASE = 0x8000_0000
DMA_BASE = 0x1000_0000
DMA_STREAM = 1
"""StreamID of the copy engine."""
SG_BASE = 0x1000_1000
SG_STREAM = 2
"""StreamID of the scatter-gather engine."""
SMMU_BASE = 0x1100_0000
PARANGE = 2
"""ID_AA64MMFR0_EL1.PARange."""
IPA_BITS = PARANGE_BITS[PARANGE]
"""Bits of a physical address, and so of every IPA."""


class EngineFactory(Protocol):
    """What makes a CPU engine over a machine's memory."""

    def __call__(
        self,
        memory: PhysicalMemory,
        *,
        cpu_model: str,
        count_blocks: bool,
        counter: Callable[[], int] | None,
    ) -> CpuEngine:
        """Make the engine. `counter` gives CNTVCT_EL0 without its offset; None: real time."""
        ...


class Machine:
    """One machine with `ram_bytes` of RAM, a multiple of the page size.

    `virtual_clock`: time is counted in guest code and a run repeats exactly. `make_engine` makes
    the CPU engine, Unicorn's if None. `smmu` False: the machine has neither an SMMU nor a device
    that would need one. Raises ValueError for a RAM that is not page-aligned or
    leaves the physical address space, MemoryError if the process cannot have it, and EngineError
    if the engine cannot work here.
    """

    def __init__(
        self,
        ram_bytes: int,
        *,
        virtual_clock: bool = False,
        cpu_model: str = "cortex-a72",
        recorder: Recorder,
        make_engine: EngineFactory | None = None,
        smmu: bool = True,
    ) -> None:
        if RAM_BASE + ram_bytes > 1 << IPA_BITS:
            raise ValueError(f"{ram_bytes:#x} bytes of RAM leave a {IPA_BITS}-bit address space")
        if make_engine is None:
            make_engine = _unicorn()
        self.memory = PhysicalMemory(RAM_BASE, ram_bytes)
        self.host_bus = Bus(self.memory, "host")
        self.host_cpus = HostCpus(self.memory, self.host_bus, recorder)
        self._firmware: Firmware | None = None
        self._recorder = recorder
        self.smmu: Smmu | None = None
        self.dma_devices: tuple[DmaDevice, ...] = ()
        if smmu:
            self.smmu = Smmu(self.memory, recorder, base=SMMU_BASE)
            self.memory.add_window(self.smmu.window)
            self.dma_devices = self._add_devices(self.smmu, recorder)
        self.clock: RealClock | VirtualClock = (
            VirtualClock(self._blocks) if virtual_clock else RealClock()
        )
        self._last_blocks = 0
        self._engine: CpuEngine | None = None
        self._engine = make_engine(
            self.memory,
            cpu_model=cpu_model,
            count_blocks=virtual_clock,
            counter=self._counter if virtual_clock else None,
        )
        for cpu in self.host_cpus.cpus:
            cpu.bus.on_write = self._engine.invalidate_code
        self._on_dma_write(self._engine.invalidate_code)
        self.alarms = Alarms(self.clock, self._engine)
        self.on_interrupt: Callable[[], bool | None] | None = None
        """The host's, called from the alarm thread or `Alarms.jump` when a timer of the CPU's is
        due: a vCPU that waits may have an interrupt. True if the CPU need not leave its guest,
        since the host has had it meanwhile."""
        self._virtual_timer = self.new_timer()
        self._engine.on_alarm = self.alarms.fire
        self._engine.on_deadline = self._set_virtual_timer

    @property
    def engine(self) -> CpuEngine:
        """The physical CPU below EL2. Raises RuntimeError after `close`."""
        if self._engine is None:
            raise RuntimeError("the machine is closed")
        return self._engine

    @property
    def firmware(self) -> Firmware:
        """EL3, and the secure world behind it."""
        if self._firmware is None:
            # Imported here: most runs never call the firmware.
            from pkvm.machine.firmware import Firmware
            from pkvm.machine.secure import SecureWorld

            secure = SecureWorld(self.memory, self._recorder, self._invalidate_code)
            self._firmware = Firmware(self.host_cpus, secure)
        return self._firmware

    @property
    def has_firmware(self) -> bool:
        """Whether anybody has called the firmware: before, it holds nothing."""
        return self._firmware is not None

    def smc(self, registers: Registers, immediate: int = 0, cpu: int = 0) -> Registers:
        """The SMC instruction at EL1 of host CPU number `cpu`: X0-X17 before and after; none after
        if it does not return. Raises ValueError for a CPU without power."""
        host_cpu = self.host_cpus.cpus[cpu]
        return self.host_cpus.smc(host_cpu, registers, immediate, self.el3)

    def el3(self, cpu: HostCpu, registers: Registers) -> Registers:
        """EL3's vector for an SMC from EL2, or from an EL1 that EL2 does not trap."""
        return self.firmware.call(cpu, registers)

    def new_timer(self) -> Alarm:
        """An alarm that is a timer of the CPU's: it is announced to `on_interrupt`."""
        return self.alarms.new(self._timer_interrupt)

    def close(self) -> None:
        """Free the CPU engine. RAM goes when nobody refers to it. Idempotent."""
        if self._engine is None:
            return
        for cpu in self.host_cpus.cpus:
            cpu.bus.on_write = None
        self._on_dma_write(None)
        self.alarms.close()
        self._last_blocks = self._engine.blocks
        self._engine.close()
        self._engine = None

    def _add_devices(self, smmu: Smmu, recorder: Recorder) -> tuple[DmaDevice, ...]:
        """Put the DMA-capable devices behind the SMMU and on the bus."""
        copy = CopyEngine(
            smmu.master(DMA_STREAM, "dma-copy"), recorder, base=DMA_BASE, max_bytes=1 << IPA_BITS
        )
        scatter = ScatterEngine(smmu.master(SG_STREAM, "dma-sg"), recorder, base=SG_BASE)
        found = []
        for stream, window in ((DMA_STREAM, copy.window), (SG_STREAM, scatter.window)):
            self.memory.add_window(window)
            found.append(DmaDevice(window.name, window.base, window.size, stream))
        return tuple(found)

    def _on_dma_write(self, told: Callable[[int, int], None] | None) -> None:
        """Have what devices write announced."""
        for master in self.smmu.masters() if self.smmu is not None else ():
            master.on_write = told

    def _blocks(self) -> int:
        """Blocks executed: none while the engine is still being made (its start-up check may read
        the counter, which comes here), and no more once it is gone."""
        return self._last_blocks if self._engine is None else self._engine.blocks

    def _invalidate_code(self, pa: int, nbytes: int) -> None:
        if self._engine is not None:
            self._engine.invalidate_code(pa, nbytes)

    def _timer_interrupt(self) -> bool:
        return self.on_interrupt is not None and bool(self.on_interrupt())

    def _set_virtual_timer(self, count: int | None) -> None:
        if count is None:
            self._virtual_timer.cancel()
        else:
            self._virtual_timer.set(count * NS_PER_TICK)

    def _counter(self) -> int:
        return counter_ticks(self.clock.now_ns())


def _unicorn() -> EngineFactory:
    from pkvm.machine.cpu.unicorn_engine import UnicornEngine  # costs an import of Unicorn

    return UnicornEngine
