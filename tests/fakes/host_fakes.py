# SPDX-License-Identifier: GPL-2.0-or-later
"""A bus and an EL2 for tests of the host alone: small, and strict about what the host does."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from typing import Any

from pkvm import events
from pkvm.arm64.gic import VTR_VALUE
from pkvm.host.firmware_node import FirmwareRegion
from pkvm.host.kernel import HostKernel
from pkvm.hyp.abi import (
    HANDLE_BASE,
    HOST_CALL_BASE,
    VCPU_AREA_BYTES,
    VM_AREA_BYTES,
    ExitCode,
    HostCall,
    HostVcpu,
    HostVm,
    RunResult,
)
from pkvm.uapi import kvm as uapi

RAM_BASE = 0x8000_0000
RAM_BYTES = 32 << 20
DMA_BASE = 0x1000_0000
PAGE = 4096
BLOCK = 2 << 20
PGD_BYTES = 2 * PAGE
MASK64 = (1 << 64) - 1


class FakeFault(Exception):
    """The host's stage-2 refuses; `ipa` is the first byte refused."""

    def __init__(self, ipa: int, why: str) -> None:
        super().__init__(why)
        self.ipa = ipa


class FakeBus:
    """RAM, and a set of pages that the host lost."""

    def __init__(self) -> None:
        self.ram = bytearray(RAM_BYTES)
        self.lost: set[int] = set()
        self.registers: dict[int, int] = {}
        """The DMA device's."""

    def _check(self, pa: int, length: int) -> int:
        offset = pa - RAM_BASE
        if not 0 <= offset <= RAM_BYTES - length:
            raise FakeFault(pa, f"nothing at {pa:#x}")
        for page in range(pa // PAGE, (pa + max(length, 1) - 1) // PAGE + 1):
            if page in self.lost:
                raise FakeFault(max(pa, page * PAGE), f"PA {page * PAGE:#x} is not the host's")
        return offset

    def read(self, pa: int, length: int) -> bytes:
        offset = self._check(pa, length)
        return bytes(self.ram[offset : offset + length])

    def write(self, pa: int, data: bytes | bytearray | memoryview) -> None:
        done = 0
        while done < len(data):
            step = min(len(data) - done, PAGE - (pa + done) % PAGE)
            offset = self._check(pa + done, step)
            self.ram[offset : offset + step] = data[done : done + step]
            done += step

    def read_u64(self, pa: int) -> int:
        if DMA_BASE <= pa < DMA_BASE + PAGE:
            return self.registers.get(pa - DMA_BASE, 0)
        return int.from_bytes(self.read(pa, 8), "little")

    def write_u64(self, pa: int, value: int) -> None:
        if DMA_BASE <= pa < DMA_BASE + PAGE:
            self.registers[pa - DMA_BASE] = value
            if pa == DMA_BASE + 0x18 and value == 1:
                self._copy()
            return
        self.write(pa, value.to_bytes(8, "little"))

    def _copy(self) -> None:
        source, destination, length = (self.registers[at] for at in (0, 8, 16))
        self.registers[0x20] = 0
        try:
            self.write(destination, self.read(source, length))
        except FakeFault:
            self.registers[0x20] = 1
            self.registers[0x28] = source


Guest = Callable[["FakeVcpu"], Iterator[int]]
"""A guest as a generator of exit codes; before each it publishes what the exit is about."""


class FakeVcpu:
    """EL2's side of a vCPU: `guest` runs when the host runs it."""

    def __init__(self, el2: FakeEl2, page: int, guest: Guest) -> None:
        self.el2 = el2
        self.page = page
        self.code = guest(self)
        self.results: list[int] = []
        """The registers that the VCPU_RUN under way returns."""
        self.flags = 0
        self.x0 = 0
        """The host's answer: the arguments of the VCPU_RUN under way."""
        self.nr_lrs = 0
        self.timer_output = 0
        """VCPU_TIMER's answer."""

    def read(self, offset: int) -> int:
        return self.el2.bus.read_u64(self.page + offset)

    def publish(self, **words: int) -> int:
        """What VCPU_RUN returns, e.g. esr=..., x0=...; X registers go to the host's page too, as
        those of a non-protected guest do. The exit code TRAP."""
        for name, value in words.items():
            if name[0] == "x":
                self.el2.bus.write_u64(self.page + 8 * int(name[1:]), value & MASK64)
            if hasattr(RunResult, name.upper()):
                self.results[getattr(RunResult, name.upper())] = value & MASK64
        return ExitCode.TRAP

    def list_registers(self) -> list[int]:
        """What the host gave for the VCPU_RUN under way."""
        return [self.read(HostVcpu.VGIC_LR + 8 * n) for n in range(self.nr_lrs)]

    def set_list_register(self, number: int, value: int) -> None:
        """What the guest, or the CPU interface, makes of one."""
        self.el2.bus.write_u64(self.page + HostVcpu.VGIC_LR + 8 * number, value)

    def set_vmcr(self, value: int) -> None:
        """ICH_VMCR_EL2 as EL2 shows it."""
        self.el2.bus.write_u64(self.page + HostVcpu.VGIC_VMCR, value)

    def run(self, flags: int, x0: int, nr_lrs: int) -> int:
        self.flags, self.x0, self.nr_lrs = flags, x0, nr_lrs
        self.results = [0] * RunResult.COUNT
        return next(self.code, ExitCode.ILLEGAL)


class FakeVm:
    def __init__(self, page: int, areas: list[int], protected: bool, created: int) -> None:
        self.page = page
        self.pages = areas
        self.protected = protected
        self.created = created
        self.vcpus: dict[int, FakeVcpu] = {}
        self.private: dict[int, int] = {}
        self.shared: dict[int, tuple[int, int]] = {}
        self.dying = False
        self.memcache = 0


class FakeEl2:
    """The door. `refuse[call]` is an errno that the next such call answers, whatever it asks."""

    def __init__(self, bus: FakeBus) -> None:
        self.bus = bus
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.refuse: dict[HostCall, int] = {}
        self.reserved: set[int] = set()
        self.vms: dict[int, FakeVm] = {}
        self.shared: set[int] = set()
        self.guests: dict[int, Guest] = {}
        """By vCPU index, for vCPUs that are yet to be made."""
        self.loaded: FakeVcpu | None = None
        self.has_gic = True
        self.tables_needed = 0
        """HOST_SHARE_GUEST answers ENOMEM while the VM's cache has fewer pages."""
        self.interrupted = threading.Event()

    def __call__(self, function: int, *args: int) -> tuple[int, ...]:
        call = HostCall(function - HOST_CALL_BASE)
        self.calls.append((call.name, args))
        error = self.refuse.pop(call, 0)
        if error:
            return 0, -error
        result = getattr(self, f"_{call.name.lower()}")(*args)
        if call == HostCall.VCPU_RUN and result >= 0:
            assert self.loaded is not None
            return 0, result, *self.loaded.results[RunResult.CODE + 1 :]
        return 0, result

    def names(self) -> list[str]:
        """The calls made so far, but VCPU_RUN, LOAD and PUT."""
        return [name for name, _ in self.calls if not name.startswith("VCPU_")]

    def _take(self, pa: int, nr: int) -> list[int]:
        pages = [pa + PAGE * index for index in range(nr)]
        for page in pages:
            self.bus._check(page, PAGE)
            self.bus.ram[page - RAM_BASE : page - RAM_BASE + PAGE] = bytes(PAGE)
            self.bus.lost.add(page // PAGE)
        return pages

    def _reserve_vm(self) -> int:
        for handle in range(HANDLE_BASE, HANDLE_BASE + 255):
            if handle not in self.reserved and handle not in self.vms:
                self.reserved.add(handle)
                return handle
        return -errno.ENOMEM

    def _unreserve_vm(self, handle: int) -> int:
        self.reserved.remove(handle)
        return 0

    def _vcpu_features(self) -> int:
        return 0

    def _host_share_hyp(self, pfn: int) -> int:
        if pfn in self.shared or pfn in self.bus.lost:
            return -errno.EPERM
        self.shared.add(pfn)
        return 0

    def _host_unshare_hyp(self, pfn: int) -> int:
        pages = {vm.page // PAGE for vm in self.vms.values()}
        pages |= {vcpu.page // PAGE for vm in self.vms.values() for vcpu in vm.vcpus.values()}
        if pfn in pages:
            return -errno.EBUSY
        if pfn not in self.shared:
            return -errno.EPERM
        self.shared.remove(pfn)
        return 0

    def _pgd_info(self) -> int:
        return PGD_BYTES

    def _init_vm(self, page: int, area: int, pgd: int) -> int:
        handle = self.bus.read_u64(page + HostVm.HANDLE)
        if page // PAGE not in self.shared or handle not in self.reserved:
            return -errno.EINVAL
        if pgd % PGD_BYTES:
            return -errno.ENOMEM
        self.reserved.remove(handle)
        areas = self._take(area, VM_AREA_BYTES // PAGE) + self._take(pgd, PGD_BYTES // PAGE)
        protected = bool(self.bus.read_u64(page + HostVm.PROTECTED))
        created = self.bus.read_u64(page + HostVm.CREATED_VCPUS)
        self.vms[handle] = FakeVm(page, areas, protected, created)
        return 0

    def _init_vcpu(self, handle: int, page: int, area: int) -> int:
        vm = self.vms[handle]
        index = self.bus.read_u64(page + HostVcpu.VCPU_IDX)
        if index >= vm.created or index in vm.vcpus or page // PAGE not in self.shared:
            return -errno.EINVAL
        vm.pages += self._take(area, VCPU_AREA_BYTES // PAGE)
        guest = self.guests.pop(index, lambda vcpu: iter(()))
        vm.vcpus[index] = FakeVcpu(self, page, guest)
        return 0

    def _topup_memcache(self, handle: int, head: int, nr: int) -> int:
        vm = self.vms[handle]
        for _ in range(nr):
            following = self.bus.read_u64(head)
            vm.pages += self._take(head, 1)
            vm.memcache += 1
            head = following
        return nr

    def _set_firmware(self, handle: int, ipa: int, size: int) -> int:
        return 0

    def _donate_guest_sglist(self, handle: int, address: int, nr: int) -> int:
        taken: dict[int, int] = {}
        for index in range(nr):
            pfn, gfn, npages = (self.bus.read_u64(address + 24 * index + at) for at in (0, 8, 16))
            for page in range(npages):
                if pfn + page in self.bus.lost or pfn + page in taken.values():
                    return -errno.EPERM
                taken[gfn + page] = pfn + page
        self.vms[handle].private.update(taken)
        self.bus.lost.update(taken.values())
        return 0

    def _host_share_guest(self, pfn: int, gfn: int, nr: int, prot: int) -> int:
        vm = next(vm for vm in self.vms.values() if self.loaded in vm.vcpus.values())
        if vm.memcache < self.tables_needed:
            return -errno.ENOMEM
        if gfn in vm.shared or nr not in (1, 512) or (nr == 512 and (pfn | gfn) % 512):
            return -errno.EINVAL
        vm.shared[gfn] = (nr, prot)
        return 0

    def _host_unshare_guest(self, handle: int, gfn: int, nr: int) -> int:
        if self.vms[handle].shared.pop(gfn, (0, 0))[0] != nr:
            return -errno.ENOENT
        return 0

    def _vcpu_load(self, handle: int, index: int, hcr: int) -> int:
        assert self.loaded is None
        self.loaded = self.vms[handle].vcpus[index]
        return 0

    def _vcpu_put(self) -> int:
        assert self.loaded is not None
        self.loaded = None
        return 0

    def _vcpu_sync_state(self) -> int:
        return 0

    def _vcpu_run(self, flags: int, x0: int, nr_lrs: int = 0) -> int:
        return -errno.EINVAL if self.loaded is None else self.loaded.run(flags, x0, nr_lrs)

    def _gic_config(self) -> int:
        return VTR_VALUE if self.has_gic else -errno.EPERM

    def _vcpu_timer(self, handle: int, index: int) -> int:
        vm = self.vms.get(handle)
        if vm is None or index not in vm.vcpus:
            return -errno.ENOENT
        return vm.vcpus[index].timer_output

    def _start_teardown_vm(self, handle: int) -> int:
        if self.loaded is not None and self.loaded in self.vms[handle].vcpus.values():
            return -errno.EINVAL
        self.vms[handle].dying = True
        return 0

    def _reclaim_dying_guest_range(self, handle: int, gfn: int, nr: int) -> int:
        vm = self.vms[handle]
        frames = [frame for frame in vm.private if gfn <= frame < gfn + nr]
        for frame in frames:
            pfn = vm.private.pop(frame)
            self.bus.lost.discard(pfn)
            at = pfn * PAGE - RAM_BASE
            self.bus.ram[at : at + PAGE] = bytes(PAGE)
        return len(frames)

    def _finalize_teardown_vm(self, handle: int) -> int:
        vm = self.vms.pop(handle)
        assert vm.dying
        assert not vm.private
        assert not vm.shared
        head = 0
        for page in vm.pages:
            self.bus.lost.remove(page // PAGE)
            self.bus.write_u64(page, head)
            head = page
        self.bus.write_u64(vm.page + HostVm.TEARDOWN_HEAD, head)
        self.bus.write_u64(vm.page + HostVm.TEARDOWN_NR, len(vm.pages))
        return 0


class FakeClock:
    def __init__(self, virtual: bool = False) -> None:
        self.virtual = virtual
        self.ns = 0

    def now_ns(self) -> int:
        return self.ns


class FakeCpu:
    """The CPU as a counter of blocks."""

    def __init__(self) -> None:
        self.blocks = 0
        self.slice: int | None = None

    def set_slice(self, blocks: int | None, /) -> None:
        self.slice = blocks


class FakeAlarm:
    def __init__(self, alarms: FakeAlarms, callback: Callable[[], bool]) -> None:
        self.alarms = alarms
        self.callback = callback
        self.deadline: int | None = None
        alarms.all.append(self)

    def set(self, deadline_ns: int) -> None:
        self.deadline = deadline_ns

    def cancel(self) -> None:
        self.deadline = None

    def close(self) -> None:
        self.alarms.all.remove(self)


class FakeAlarms:
    """Alarms that tests, or the jumps of virtual time, let be due."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.all: list[FakeAlarm] = []

    def new(self, callback: Callable[[], bool]) -> FakeAlarm:
        return FakeAlarm(self, callback)

    def jump(self) -> bool:
        alarms = [alarm for alarm in self.all if alarm.deadline is not None]
        if not alarms:
            return False
        first = min(alarms, key=lambda alarm: alarm.deadline or 0)
        assert first.deadline is not None
        self.clock.ns = max(self.clock.ns, first.deadline)
        first.deadline = None
        first.callback()
        return True


class Log:
    def __init__(self) -> None:
        self.events: list[events.Event] = []

    def record(self, event: events.Event, /) -> None:
        self.events.append(event)

    def messages(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, events.Message)]


class Rig:
    """A host kernel on fakes, and short forms of its system calls."""

    def __init__(
        self,
        *,
        protected: bool = True,
        firmware: FirmwareRegion | None = None,
        virtual: bool = False,
        grace_s: float = 0.2,
    ) -> None:
        self.bus = FakeBus()
        self.el2 = FakeEl2(self.bus)
        self.log = Log()
        self.clock = FakeClock(virtual)
        self.cpu = FakeCpu()
        self.alarms = FakeAlarms(self.clock)
        self.kernel = HostKernel(
            self.bus,
            self.el2,
            ram=[(RAM_BASE, RAM_BYTES)],
            bus_faults=(FakeFault,),
            clock=self.clock,
            recorder=self.log,
            interrupt=self.el2.interrupted.set,
            dma_base=DMA_BASE,
            protected=protected,
            counter=self.cpu if virtual else None,
            firmware=firmware,
            grace_s=grace_s,
            alarms=self.alarms,
        )
        self.pages_at_start = self.kernel.free_pages
        self.kvm = self.kernel.open("/dev/kvm")

    def vm(self) -> int:
        return self.kernel.ioctl(self.kvm, uapi.Ioctl.CREATE_VM)

    def vcpu(self, vm: int, vcpu_id: int = 0, *features: uapi.VcpuFeature) -> int:
        fd = self.kernel.ioctl(vm, uapi.Ioctl.CREATE_VCPU, vcpu_id)
        self.init(fd, *features)
        return fd

    def init(self, fd: int, *features: uapi.VcpuFeature) -> None:
        word = sum(1 << feature for feature in {uapi.VcpuFeature.PSCI_0_2, *features})
        argument = bytearray(uapi.VCPU_INIT.pack(uapi.TARGET_GENERIC_V8, word, *[0] * 6))
        self.kernel.ioctl(fd, uapi.Ioctl.ARM_VCPU_INIT, argument)

    def slot(self, vm: int, number: int, ipa: int, size: int, user: int, flags: int = 0) -> None:
        region = bytearray(uapi.MEMORY_REGION.pack(number, flags, ipa, size, user))
        self.kernel.ioctl(vm, uapi.Ioctl.SET_USER_MEMORY_REGION, region)

    def cap(self, vm: int, flags: int, *args: int, cap: int = uapi.Cap.ARM_PROTECTED_VM) -> int:
        words = [*args, 0, 0, 0, 0][:4]
        argument = bytearray(uapi.ENABLE_CAP.pack(cap, flags, *words))
        return self.kernel.ioctl(vm, uapi.Ioctl.ENABLE_CAP, argument)

    def get_reg(self, fd: int, register: int) -> int:
        memory = self.kernel.mmap(PAGE)
        try:
            argument = bytearray(uapi.ONE_REG.pack(register, memory.address))
            self.kernel.ioctl(fd, uapi.Ioctl.GET_ONE_REG, argument)
            size = 1 << (register >> 52 & 0xF)
            return int.from_bytes(memory.read(0, size), "little")
        finally:
            memory.close()

    def set_reg(self, fd: int, register: int, value: int) -> None:
        memory = self.kernel.mmap(PAGE)
        try:
            memory.write(0, value.to_bytes(1 << (register >> 52 & 0xF), "little"))
            argument = bytearray(uapi.ONE_REG.pack(register, memory.address))
            self.kernel.ioctl(fd, uapi.Ioctl.SET_ONE_REG, argument)
        finally:
            memory.close()

    def run(self, fd: int) -> int:
        return self.kernel.ioctl(fd, uapi.Ioctl.RUN)


def errno_of(call: Callable[..., object], *args: Any) -> int:
    """The errno that `call` raises, 0 if none; an error without a text counts as -1."""
    try:
        call(*args)
    except OSError as error:
        return error.errno or -1 if error.strerror else -1
    return 0
