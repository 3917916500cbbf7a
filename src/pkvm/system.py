# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine, its EL2 and its host, put together: the one room with a door to both sides.

`pkvm.open` (`pkvm.opening`) makes one for whoever wants no more than its /dev/kvm.

The order is that of a boot: the machine; its boot firmware, which leaves a
device tree and the guest firmware in memory; the host, early, which reads from
the tree where that firmware is; EL2, which takes its carve-out and the firmware
from the host and closes the door behind it; the host's KVM.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypedDict

from pkvm.check.census import Census, census, private_to_guests, shared_by_guests
from pkvm.events import Message, Recorder
from pkvm.firmware import image as firmware_image
from pkvm.firmware.host_tree import host_device_tree
from pkvm.host.firmware_node import FirmwareRegion, guest_firmware
from pkvm.host.kernel import HostKernel
from pkvm.hyp.hypervisor import Hypervisor
from pkvm.hyp.mem_protect import carveout_bytes
from pkvm.hyp.policy import POLICIES
from pkvm.kvm import Kvm
from pkvm.kvm.kernel import Kernel
from pkvm.machine.dump import dump_stage2
from pkvm.machine.machine import DMA_BASE, RAM_BASE, SG_BASE, Machine
from pkvm.machine.memory import BusError
from pkvm.machine.stage2 import Stage2Context, Stage2Fault
from pkvm.trace.counting import CountingRecorder
from pkvm.uapi.dialects import DEFAULT, DIALECTS, Firmware

if TYPE_CHECKING:
    from pkvm.check.door import CheckedSystem

ClockName = Literal["real", "virtual"]

DEFAULT_MEMORY = 256 << 20
"""Bytes of RAM of the machine: what the host, its VMs and EL2 share."""


class System:
    """One whole machine: RAM, CPU, devices, EL2 and the host kernel.

    `memory` is the machine's RAM in bytes, rounded up to 2 MiB. `protected`: the host boots in
    protected mode (kvm-arm.mode=protected). `firmware` is the guest firmware image that the
    host's boot firmware leaves in memory; None is the built-in one, b"" is none. `host_dtb` is
    the host's device tree; None is one made for this machine. `clock` is "real", or "virtual":
    time is counted in guest code and a run repeats exactly. `misalign` makes host memory that no
    2 MiB block can map. `dialect` is what protected KVM the host and EL2 speak: "rfc", "android"
    or "upstream" (`uapi.dialects`); the last one has no guest firmware, whatever `firmware` is.
    `memlock` is the VMM's RLIMIT_MEMLOCK in bytes; None is unlimited. `check`: all invariants are
    checked at each exit to the host, which ends in `check.door.InvariantError` where one does not
    hold; slow. Raises ValueError for a
    memory that is too small and a dialect that there is not, FirmwareImageError,
    MemoryError, and EngineError if the CPU engine cannot work here.
    """

    def __init__(
        self,
        memory: int = DEFAULT_MEMORY,
        *,
        protected: bool = True,
        firmware: bytes | None = None,
        host_dtb: bytes | None = None,
        clock: ClockName = "real",
        cpu_model: str = "cortex-a72",
        recorder: Recorder | None = None,
        misalign: bool = False,
        dialect: str = DEFAULT,
        memlock: int | None = None,
        check: bool = False,
        smmu: bool = True,
    ) -> None:
        if dialect not in DIALECTS:
            raise ValueError(f"there is no dialect {dialect!r}; there are {', '.join(DIALECTS)}")
        self.dialect = DIALECTS[dialect]
        image = firmware_image.builtin() if firmware is None else firmware
        if self.dialect.firmware is Firmware.NONE:
            image = b""
        if image:
            firmware_image.check(image)
        memory = -(-memory // (2 << 20)) * (2 << 20)
        carveout = carveout_bytes(memory)
        carveout_base = RAM_BASE + memory - carveout
        region_bytes = firmware_image.region_bytes(image)
        if memory < carveout + region_bytes + (4 << 20):
            raise ValueError(
                f"a machine of {memory >> 20} MiB is too small: EL2 takes {carveout >> 20} MiB"
            )
        self.recorder: Recorder = CountingRecorder() if recorder is None else recorder
        self.checked: CheckedSystem | None = None
        """Who checks, if `check` was asked for."""
        if check:
            # Imported here: no other run needs it.
            from pkvm.check.door import CheckedSystem

            self.checked = CheckedSystem(self.recorder)
        recorder = self.checked or self.recorder
        self.protected = protected
        self.machine = Machine(
            memory,
            virtual_clock=clock == "virtual",
            cpu_model=cpu_model,
            recorder=recorder,
            smmu=smmu,
        )
        if host_dtb is None:
            node = (carveout_base - region_bytes, region_bytes) if image else None
            host_dtb = host_device_tree(
                (RAM_BASE, memory), node, (carveout_base, carveout) if protected else None
            )
        region = None
        if self.dialect.firmware is not Firmware.NONE:
            region = guest_firmware(host_dtb, protected, self._say)
        if region is not None:
            region = self._place_firmware(image, region, carveout_base)
        self.hyp = Hypervisor(
            self.machine,
            recorder,
            carveout=(carveout_base, carveout),
            firmware=region,
            protected=protected,
            policy=POLICIES[dialect],
        )
        self.hyp.initialise()
        door, smc = self.hyp.host_call, self.machine.smc
        if self.checked is not None:
            self.checked.attach(self.hyp, self.machine)
            door, smc = self.checked.host_call, self.checked.smc
        counted = clock == "virtual"
        self.host = HostKernel(
            self.machine.host_bus,
            door,
            ram=_without(region, (RAM_BASE, carveout_base - RAM_BASE)),
            bus_faults=(Stage2Fault, BusError),
            clock=self.machine.clock,
            recorder=recorder,
            interrupt=self.machine.engine.interrupt,
            counter=self.machine.engine if counted else None,
            dma_base=DMA_BASE if smmu else None,
            sg_base=SG_BASE if smmu else None,
            protected=protected,
            firmware=region,
            misalign=misalign,
            alarms=self.machine.alarms,
            dialect=self.dialect,
            memlock=memlock,
            entropy=_repeated_bytes() if counted else os.urandom,
            smc=smc,
            cpu_buses=[cpu.bus for cpu in self.machine.host_cpus.cpus],
            cpu_register=self.machine.engine.read_sysreg,
        )
        self.machine.on_interrupt = self.host.interrupt
        self.kernel: Kernel = self.host
        """The host, as a user of the system-call seam sees it."""

    def open(self) -> Kvm:
        """Open /dev/kvm on this system. Closing the `Kvm` leaves the system running."""
        return Kvm(self.kernel)

    def census(self) -> Census:
        """Every page of RAM by owner and state."""
        return census(self.hyp.mem, self.hyp.vms())

    def shared_by_guests(self) -> frozenset[int]:
        """IPAs of the pages that guests share with the host, by EL2's account."""
        return shared_by_guests(self.hyp.mem, self.hyp.vms())

    def private_to_guests(self) -> frozenset[int]:
        """IPAs of the pages that guests have for themselves, by EL2's account."""
        return private_to_guests(self.hyp.mem, self.hyp.vms())

    def tables(self) -> dict[str, Stage2Context]:
        """The stage-2 trees in force by name: "host", "dma" (the identity domain), "domain 1"...
        that the host made for DMA, and "guest 0x1000"... by handle."""
        contexts = {}
        if self.machine.host_bus.context is not None:
            contexts["host"] = self.machine.host_bus.context
        if self.protected and self.machine.smmu is not None:
            dma = self.hyp.mem.host.dma
            contexts["dma"] = Stage2Context(dma.vttbr, dma.vtcr)
        for domain in list(self.hyp.mem.domains.values()):
            tree = domain.stage2
            contexts[f"domain {domain.number}"] = Stage2Context(tree.vttbr, tree.vtcr)
        for vm in self.hyp.vms():
            contexts[f"guest {vm.handle:#x}"] = Stage2Context(vm.stage2.vttbr, vm.stage2.vtcr)
        return contexts

    def dump(self, table: str) -> str:
        """The stage-2 tree of that name in words. Raises KeyError for a name that is not in
        `tables`."""
        return dump_stage2(self.machine.memory, self.tables()[table], table)

    def dump_smmu(self) -> str:
        """What the SMMU does with each stream, in words; "" if there is none."""
        from pkvm.machine.smmu_dump import dump_smmu  # asked for rarely

        smmu = self.machine.smmu
        return "" if smmu is None else dump_smmu(smmu, self.machine.dma_devices)

    def streams(self) -> list[dict[str, object]]:
        """The same as JSON objects."""
        from pkvm.machine.smmu_dump import as_json

        smmu = self.machine.smmu
        return [] if smmu is None else as_json(smmu, self.machine.dma_devices)

    def close(self) -> None:
        """Close every file descriptor, end every VM, free the engine. Idempotent."""
        self.host.shutdown()
        self.machine.close()

    def __enter__(self) -> System:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _place_firmware(
        self, image: bytes, region: FirmwareRegion, carveout_base: int
    ) -> FirmwareRegion | None:
        """The boot firmware's work: put `image` where the tree says. None, with a message, if the
        region cannot hold it."""
        memory = self.machine.memory
        if not memory.is_ram(region.base, region.size) or (
            region.base + region.size > carveout_base
        ):
            self._say("ignoring guest firmware: its memory is not RAM, or EL2 lies there")
            return None
        if len(image) > region.size:
            self._say(
                f"ignoring guest firmware: the image has {len(image)} bytes, its memory "
                f"{region.size}"
            )
            return None
        memory.write(region.base, image)
        return region

    def _say(self, text: str) -> None:
        self.recorder.record(Message("host", text))


class Options(TypedDict, total=False):
    """The keyword arguments of `System`."""

    memory: int
    protected: bool
    firmware: bytes | None
    host_dtb: bytes | None
    clock: ClockName
    cpu_model: str
    recorder: Recorder | None
    misalign: bool
    dialect: str
    memlock: int | None
    check: bool
    smmu: bool


def _repeated_bytes() -> Callable[[int], bytes]:
    """Random bytes that are the same in every run."""
    # Imported here: only a run that is to repeat needs it.
    import random

    return random.Random(0).randbytes


def _without(region: FirmwareRegion | None, ram: tuple[int, int]) -> list[tuple[int, int]]:
    """`ram` (base PA, bytes) without the firmware's region."""
    if region is None:
        return [ram]
    base, size = ram
    end = region.base + region.size
    return [part for part in ((base, region.base - base), (end, base + size - end)) if part[1] > 0]
