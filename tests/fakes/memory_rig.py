# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine's memory with EL2's memory side in charge, and no CPU: for tests of ownership."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pkvm.arm64.stage2 import ANNOTATION_POISONED, PAGE_SIZE, PageState, guest_annotation
from pkvm.check.invariants import PrivacyWatch, Snapshot, check
from pkvm.check.watch import Watch
from pkvm.events import Event, Transition
from pkvm.hyp.errors import Refused
from pkvm.hyp.mem_protect import MemProtect, carveout_bytes
from pkvm.hyp.memcache import Memcache
from pkvm.hyp.memory_policy import RFC_MEMORY, MemoryPolicy
from pkvm.hyp.pgtable import Stage2
from pkvm.hyp.vmemmap import host_state, hyp_state
from pkvm.machine.bus import Bus
from pkvm.machine.memory import DeviceWindow, PhysicalMemory
from pkvm.machine.smmu import DmaDevice, Smmu

RAM = 0x8000_0000
MIB = 1 << 20
FIRMWARE_BYTES = 0x10000
HANDLE = 0x1000
DEVICE = 0x1000_0000
SMMU = 0x1100_0000
STREAM = 1


@dataclass
class RigVm:
    """A VM's memory."""

    handle: int
    stage2: Stage2
    memcache: Memcache

    @property
    def annotation(self) -> int:
        """As of EL2's `Vm`."""
        return guest_annotation(self.handle, 0)


class EventList:
    """Keeps every event; looks at the pages of each transition."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.watch: Watch | None = None

    def record(self, event: Event, /) -> None:
        self.events.append(event)
        if self.watch is not None and isinstance(event, Transition):
            assert self.watch.look(event) == [], event


class Rig:
    """RAM of `ram_bytes`: host pages from the bottom, then firmware, then EL2's carve-out."""

    def __init__(
        self,
        ram_bytes: int = 32 * MIB,
        *,
        protected: bool = True,
        ram_base: int = RAM,
        policy: MemoryPolicy = RFC_MEMORY,
        smmu: bool = True,
    ) -> None:
        self.memory = PhysicalMemory(ram_base, ram_bytes)
        self.memory.add_window(
            DeviceWindow("device", DEVICE, PAGE_SIZE, lambda at, n: at, lambda at, n, v: None)
        )
        self.host_bus = Bus(self.memory, "host")
        self.recorder = EventList()
        self.smmu = Smmu(self.memory, self.recorder, base=SMMU)
        self.memory.add_window(self.smmu.window)
        self.dma_bus = self.smmu.master(STREAM, "dma")
        self.guest_flushes = 0
        self.code_forgotten: list[tuple[int, int]] = []
        size = carveout_bytes(ram_bytes)
        self.carveout = (self.memory.ram_end - size, size)
        self.firmware = (self.carveout[0] - FIRMWARE_BYTES, FIRMWARE_BYTES)
        self.mem = MemProtect(
            self.memory,
            host_bus=self.host_bus,
            smmu=self.smmu if smmu else None,
            devices=(DmaDevice("device", DEVICE, PAGE_SIZE, STREAM),),
            guest_tlbi=self._guest_tlbi,
            invalidate_code=lambda pa, nbytes: self.code_forgotten.append((pa, nbytes)),
            recorder=self.recorder,
            carveout=self.carveout,
            firmware=self.firmware,
            protected=protected,
            policy=policy,
        )
        self.mem.initialise()
        self.mem.finalise()
        self.first_pfn = ram_base >> 12
        self.host_pages = (self.firmware[0] - ram_base) >> 12
        """Pages of RAM that the host starts with."""
        self._next = self.firmware[0]
        self.vms: list[RigVm] = []
        self.secure: set[int] = set()
        """PFNs that the host shares with the secure world."""
        self._watch = PrivacyWatch()
        self.recorder.watch = Watch(self.mem, self.find_vm, lambda: self.vms)

    def _guest_tlbi(self, vmid: int) -> None:
        self.guest_flushes += 1

    def pages(self, npages: int) -> int:
        """PA of `npages` host pages from the top, aligned to their size."""
        self._next = (self._next - npages * PAGE_SIZE) & -(npages * PAGE_SIZE)
        return self._next

    def link(self, pas: list[int]) -> int:
        """Write a list of pages into host memory, as the host does; its head."""
        for pa, following in zip(pas, [*pas[1:], 0], strict=True):
            self.host_bus.write_u64(pa, following)
        return pas[0]

    def topup(self, vm: RigVm, npages: int) -> None:
        """Give `npages` to a VM's memcache."""
        vm.memcache.topup(self.link([self.pages(1) for _ in range(npages)]), npages)

    def vm(self, handle: int = HANDLE, *, tables: int = 8) -> RigVm:
        """A VM with `tables` pages in its memcache."""
        root = self.pages(self.mem.geometry.root_tables)
        self.mem.host_donate_hyp(root >> 12, self.mem.geometry.root_tables)
        memcache = self.mem.new_memcache()
        vm = RigVm(handle, self.mem.new_guest_stage2(root, handle - 0xFFF, memcache), memcache)
        self.vms.append(vm)
        if tables:
            self.topup(vm, tables)
        return vm

    def end(self, vm: RigVm) -> tuple[int, int]:
        """The end of a VM, as EL2's finalize does it; the host's list of returned pages."""
        vm.stage2.destroy()
        self.vms.remove(vm)
        return vm.memcache.drain()

    def find_vm(self, handle: int) -> RigVm | None:
        """The VM with this handle."""
        return next((vm for vm in self.vms if vm.handle == handle), None)

    def state(self, pfn: int) -> tuple[str, str]:
        """(host's state, EL2's state) of a page, by name."""
        states = self.mem.vmemmap.state[pfn - self.first_pfn]
        return host_state(states).name, hyp_state(states).name

    def guest_state(self, vm: RigVm, gfn: int) -> str:
        """The guest's state of a frame, by name."""
        entry, _ = vm.stage2.leaf(gfn << 12)
        if entry & 1:
            return PageState(entry >> 55 & 3).name
        return "POISON" if entry == ANNOTATION_POISONED else "NOPAGE"

    def sound(self) -> None:
        """Assert every invariant."""
        assert check(self.mem, self.vms, self.secure) == []
        assert self._watch.look(self.mem) == []

    def refused(self, errno: int, check_name: str = "") -> _Refusal:
        """A context that asserts a refusal which changed nothing at all."""
        return _Refusal(self, errno, check_name)


def forget_dma_tlbis(rig: Rig) -> None:
    """From now on EL2 forgets to invalidate single pages in the SMMU."""
    assert rig.mem.smmu is not None
    rig.mem.host._invalidate_dma_page = lambda vmid, ipa: None
    rig.mem.smmu.invalidate_page = lambda vmid, ipa: None  # type: ignore[method-assign]


class _Refusal:
    def __init__(self, rig: Rig, errno: int, check_name: str) -> None:
        self._rig, self._errno, self._check = rig, errno, check_name
        self.refusal: Refused | None = None

    def __enter__(self) -> _Refusal:
        self._before = Snapshot(self._rig.mem, self._rig.vms)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None:
            pytest.fail("nothing was refused")
        if not isinstance(error, Refused):
            return False
        assert error.errno == self._errno, str(error)
        if self._check:
            assert error.check == self._check, str(error)
        assert self._before.differences(Snapshot(self._rig.mem, self._rig.vms)) == []
        self.refusal = error
        return True
