# SPDX-License-Identifier: GPL-2.0-or-later
"""The host kernel at its system calls: open, ioctl, mmap, close (`pkvm.kvm.kernel.Kernel`).

Any thread may call. Every call takes the kernel lock, KVM_RUN gives it away
while it waits; a load or store to a `HostMemory` is no call and takes none.
Whatever the arguments are, a call raises nothing but OSError, with Linux's
errno and words.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from pkvm.events import Ioctl as IoctlEvent
from pkvm.events import Recorder
from pkvm.host.assignment import Assignment
from pkvm.host.dma import CopyDriver
from pkvm.host.el2 import El2
from pkvm.host.files import DmaFile, File, KvmFile, VcpuFile, VmFile
from pkvm.host.firmware_node import FirmwareRegion
from pkvm.host.host import Host
from pkvm.host.irqfd import Irqfds
from pkvm.host.memlock import Memlock
from pkvm.host.memory import HostMemory
from pkvm.host.mm import Mapped, UserSpace
from pkvm.host.pages import PageAllocator
from pkvm.host.ports import PAGE_MASK, PAGE_SIZE, Alarms, Bus, BusFaults, Clock, Door
from pkvm.host.scheduler import GRACE_S, BlockCounter, Scheduler
from pkvm.host.shown_cpu import ReadRegister, ShownCpu, no_registers
from pkvm.host.timer import Timers
from pkvm.host.vcpu import Vcpu
from pkvm.host.vm import Vm
from pkvm.hyp.abi import HostCall
from pkvm.uapi.dialects import RFC, Dialect, LostPage
from pkvm.uapi.errors import HostOopsError
from pkvm.uapi.kvm import VCPU_MMAP_SIZE, DmaCopy, DmaMove, Ioctl
from pkvm.uapi.memory import Backing, Change

if TYPE_CHECKING:
    from pkvm.host.cpus import HostCpus, Smc
    from pkvm.host.ffa import FfaDriver
    from pkvm.host.scatter import ScatterDriver

FFA_VERSION = 0x1_0002
"""FF-A 1.2, what the driver asks for."""
FIRST_FD = 3
MAX_FDS = 1024
"""RLIMIT_NOFILE."""
_RUN = int(Ioctl.RUN)
_INTERRUPTED = -errno.EINTR
_REQUEST_MASK = 0xFFFF_FFFF
_REQUEST_NAMES = {int(request): request.name for request in Ioctl} | {
    DmaCopy.COPY: "DMA_COPY",
    DmaMove.MOVE: "DMA_MOVE",
}


class HostRunPage:
    """A vCPU's mmapped struct kvm_run (`pkvm.kvm.kernel.RunPage`)."""

    def __init__(self, vcpu: Vcpu, length: int, unmap: Callable[[HostRunPage], None]) -> None:
        self.vcpu = vcpu
        self._view = memoryview(vcpu.run)[:length]
        self._unmap = unmap
        self._closed = False

    @property
    def view(self) -> memoryview:
        """The bytes, writable, shared with the kernel."""
        return self._view

    def close(self) -> None:
        """munmap. Idempotent."""
        if not self._closed:
            self._closed = True
            self._unmap(self)


class HostKernel:
    """The host kernel. Handed to it, and all it has of the machine and of EL2:

    `bus` and the exception types `bus_faults` that it raises; EL2's `door`; the usable `ram` as
    (base PA, bytes) ranges, without EL2's carve-out and the guest firmware; `clock`; `interrupt`,
    which interrupts the CPU from any thread; with a virtual clock the CPU, as the block `counter`;
    `dma_base` and `sg_base`, the PAs of the copy and the scatter-gather engine's registers, None if
    the machine has none; whether it booted in `protected` mode; the
    guest `firmware` that it found at boot (`firmware_node.guest_firmware`). `misalign` makes
    memory that no 2 MiB block can map. `alarms` are the machine's timers; without them nothing
    ends a guest's wait for its physical timer. `dialect` is what protected KVM it speaks,
    `memlock` the VMM's RLIMIT_MEMLOCK in bytes (None: unlimited), `entropy` gives random bytes.
    `smc` is the SMC instruction of each host CPU, `cpu_buses` their ways to memory, `cpu_register`
    reads an ID register of theirs.
    """

    def __init__(
        self,
        bus: Bus,
        door: Door,
        *,
        ram: Sequence[tuple[int, int]],
        bus_faults: BusFaults,
        clock: Clock,
        recorder: Recorder,
        interrupt: Callable[[], None],
        dma_base: int | None,
        protected: bool,
        counter: BlockCounter | None = None,
        firmware: FirmwareRegion | None = None,
        misalign: bool = False,
        grace_s: float = GRACE_S,
        alarms: Alarms | None = None,
        dialect: Dialect = RFC,
        memlock: int | None = None,
        entropy: Callable[[int], bytes] = os.urandom,
        smc: Smc | None = None,
        cpu_buses: Sequence[Bus] = (),
        sg_base: int | None = None,
        cpu_register: ReadRegister = no_registers,
    ) -> None:
        pages = PageAllocator(bus, ram, misalign=misalign)
        users = UserSpace(bus, bus_faults, pages)
        self._sched = Scheduler(clock, interrupt, counter, grace_s)
        self._lock = self._sched.lock
        self._record = recorder.record
        self._bus_faults = bus_faults
        el2 = El2(door, bus, pages, recorder)
        self._host = Host(
            bus,
            bus_faults,
            pages,
            users,
            el2,
            self._sched,
            recorder,
            protected,
            firmware,
            Timers(self._sched, el2, clock, alarms),
            Irqfds(self._lock),
            dialect,
            Memlock(memlock),
            clock,
            entropy,
            ShownCpu(cpu_register),
        )
        users.on_change = self._host.invalidate
        self._memlock = memlock
        self._pages = pages
        self._dma_base, self._sg_base = dma_base, sg_base
        self._scatter: ScatterDriver | None = None
        self._files: dict[int, File] = {}
        self._run_pages: set[HostRunPage] = set()
        self._down = False
        self._bus = bus
        self._smc = smc
        self._cpu_buses = cpu_buses
        self._ffa: FfaDriver | None = None
        self._ffa_pages: int | None = None

    @property
    def firmware(self) -> FirmwareRegion | None:
        """The guest firmware that the host's boot firmware left."""
        return self._host.firmware

    @property
    def dialect(self) -> Dialect:
        """What protected KVM this host speaks."""
        return self._host.dialect

    @property
    def memlock(self) -> Memlock:
        """RLIMIT_MEMLOCK of the VMM's process, and what counts for it."""
        return self._host.memlock

    @property
    def free_pages(self) -> int:
        """Pages of RAM that nobody uses."""
        return self._host.pages.free_pages

    @contextmanager
    def inside(self) -> Iterator[Host]:
        """The kernel's own state, under its lock: for code that runs in the kernel, as a hostile
        host's does."""
        self._lock.enter()
        try:
            yield self._host
        finally:
            self._lock.leave()

    def pa(self, address: int, length: int = 1) -> int:
        """PA of a byte of the VMM's memory, as pagemap tells it to root; `length` bytes from there
        are contiguous. Raises EFAULT."""
        return self._host.users.pa(address, length)

    def smc(self, registers: tuple[int, ...], immediate: int = 0, cpu: int = 0) -> tuple[int, ...]:
        """The kernel's SMC on a host CPU: X0-X17 before and after; none after if it does not
        return. Raises ENODEV without firmware, ValueError for a CPU without power."""
        if self._smc is None:
            raise OSError(errno.ENODEV, "the machine has no firmware to call")
        self._lock.enter()
        try:
            return self._smc(registers, immediate, cpu)
        finally:
            self._lock.leave()

    @property
    def cpus(self) -> HostCpus:
        """The host's CPUs, to turn on and off."""
        from pkvm.host.cpus import HostCpus  # most hosts leave them as they are

        return HostCpus(self.smc, self._cpu_buses)

    def ffa(self, version: int = FFA_VERSION) -> FfaDriver:
        """The FF-A driver, with its buffers mapped. The first call makes it, and `version` counts
        for that one alone. Raises ENODEV without firmware, ENOMEM, `ffa.FfaCallError`."""
        from pkvm.host.ffa import FfaDriver  # most hosts do not talk to the secure world

        if self._ffa is None:
            if self._ffa_pages is None:
                self._lock.enter()
                try:
                    self._ffa_pages = self._host.pages.alloc(2)
                finally:
                    self._lock.leave()
            tx = self._ffa_pages
            driver = FfaDriver(self.smc, self._bus, tx, tx + PAGE_SIZE, version)
            driver.map_buffers()
            self._ffa = driver
        return self._ffa

    def interrupt(self) -> bool:
        """A timer of the CPU's is due: a vCPU that waits may have an interrupt. From the machine's
        alarm thread; with the virtual clock from where a guest runs or time jumps. True if the
        CPU need not leave its guest for it."""
        return self._host.timers.interrupt()

    def open(self, path: str) -> int:
        """open(2): "/dev/kvm", "/dev/dma-copy" or "/dev/dma-sg", else ENOENT. Raises EMFILE."""

        def make() -> int:
            if path == "/dev/kvm":
                return self._install(KvmFile(self._host, self._install))
            if path == "/dev/dma-copy" and self._dma_base is not None:
                driver = CopyDriver(self._bus, self._host.users, self._dma_base)
                assignment = Assignment(self._dma_base, self._vm_of)
                return self._install(DmaFile(driver, self._host.users, assignment))
            if path == "/dev/dma-sg" and self._sg_base is not None:
                return self._install(self._open_scatter(self._sg_base))
            raise OSError(errno.ENOENT, f"the built-in host has no {path!r}")

        return self._call(-1, "open", make)

    def _vm_of(self, fd: int) -> Vm:
        """The VM of a descriptor. Raises EBADF."""
        file = self._files.get(fd)
        if not isinstance(file, VmFile):
            raise OSError(errno.EBADF, f"descriptor {fd} is not a VM's")
        return file.vm

    def _open_scatter(self, base: int) -> File:
        # Imported here: most runs never move anything by it.
        from pkvm.host.scatter import ScatterDriver, ScatterFile

        if self._scatter is None:
            self._scatter = ScatterDriver(self._bus, self._host.users, self._pages, base)
        return ScatterFile(self._scatter, self._host.users, Assignment(base, self._vm_of))

    def ioctl(self, fd: int, request: int, arg: int | bytearray = 0) -> int:
        """ioctl(2); see `pkvm.kvm.kernel.Kernel`. EBADF for a descriptor that is not open."""
        request &= _REQUEST_MASK
        result = _INTERRUPTED
        lock = self._lock
        # `enter` and `leave` spelt out: an exit to the VMM is one ioctl.
        if lock.waiting or not lock.take(False):
            lock.enter()
        try:
            file = self._files.get(fd)
            if file is None:
                raise _bad_fd(fd)
            result = file.ioctl(request, arg)
        except OSError as error:
            result = -(error.errno or errno.EIO)
            raise
        except self._bus_faults as fault:
            result = -errno.EFAULT
            raise OSError(errno.EFAULT, f"the host kernel was refused: {fault}") from fault
        finally:
            self._record(
                _ran(fd)
                if request == _RUN and not result
                else IoctlEvent(fd, _REQUEST_NAMES.get(request) or hex(request), result)
            )
            lock.drop()
            if lock.waiting:
                lock.hand_over()
        return result

    def mmap(self, length: int, backing: Backing = Backing.ANONYMOUS) -> HostMemory:
        """A mapping, all of its pages there at once. Raises EINVAL, ENOMEM."""

        def make() -> Mapped:
            users = self._host.users
            if length > 0 and backing.has_file:
                return users.map_object(length, backing)
            mapping = users.map(length, backing)
            return Mapped(mapping.address, mapping.length)

        return self.place(make, backing)

    def place(self, make: Callable[[], Mapped], backing: Backing) -> HostMemory:
        """mmap(2), mremap(2): the memory that `make` maps. Raises OSError."""
        memory: list[HostMemory] = []

        def call() -> int:
            self._not_down()
            memory.append(HostMemory(self._host.users, self, make(), backing))
            return 0

        self._call(-1, "mmap", call)
        return memory[0]

    def change(self, what: Change, address: int, length: int) -> None:
        """munmap(2), mprotect(2), madvise(2), ... of the VMM's memory. Raises OSError."""

        def call() -> int:
            self._host.users.change(what, address, length)
            return 0

        self._call(-1, what.value.partition(" ")[0], call)

    def mmap_vcpu(self, fd: int, length: int) -> HostRunPage:
        """mmap(2) of a vCPU. Raises EBADF, ENODEV for another file, EINVAL for a length that is 0
        or more than KVM_GET_VCPU_MMAP_SIZE."""
        pages: list[HostRunPage] = []

        def make() -> int:
            file = self._files.get(fd)
            if file is None:
                raise _bad_fd(fd)
            if not isinstance(file, VcpuFile):
                raise OSError(errno.ENODEV, "only a vCPU can be mapped")
            if not 0 < length <= VCPU_MMAP_SIZE:
                raise OSError(errno.EINVAL, f"length {length} is not 1 to {VCPU_MMAP_SIZE}")
            page = HostRunPage(file.vcpu, (length + PAGE_MASK) & ~PAGE_MASK, self._unmap_run)
            file.vcpu.get()
            self._run_pages.add(page)
            pages.append(page)
            return 0

        self._call(fd, "mmap", make)
        return pages[0]

    def close(self, fd: int) -> None:
        """close(2). Raises EBADF. A KVM_RUN under way on a vCPU that is closed gives EINTR."""

        def make() -> int:
            file = self._files.pop(fd, None)
            if file is None:
                raise _bad_fd(fd)
            file.release()
            return 0

        self._call(fd, "close", make)

    def kick(self, fd: int) -> None:
        """End a KVM_RUN under way on a vCPU with EINTR. Raises EBADF, EINVAL for another file.
        Takes no lock that a guest could hold: from any thread, also out of a signal handler."""
        file = self._files.get(fd)
        if file is None:
            raise _bad_fd(fd)
        if not isinstance(file, VcpuFile):
            raise OSError(errno.EINVAL, f"descriptor {fd} is not a vCPU")
        self._sched.kick(file.vcpu.runner)

    def shutdown(self) -> None:
        """Close every descriptor and mapping, and wait for the KVM_RUNs that this interrupts.
        Nothing can be opened or mapped afterwards. Idempotent. Not from a thread in KVM_RUN."""
        vcpus: list[Vcpu] = []

        def close_all() -> int:
            self._down = True
            for vm in self._host.vms:
                vcpus.extend(vm.vcpus.values())
            while self._files:
                self._files.popitem()[1].release()
            while self._run_pages:
                self._run_pages.pop().vcpu.put()
            return 0

        def unmap_all() -> int:
            for mapping in self._host.users.mappings():
                self._host.users.unmap(mapping.address, mapping.length)
            return 0

        self._call(-1, "exit", close_all)
        self._host.irqfds.close()
        for vcpu in vcpus:
            # Whoever ran it lets go of the mutex, then of the kernel lock.
            vcpu.mutex.acquire()
            vcpu.mutex.release()
        self._call(-1, "exit_mmap", unmap_all)
        if self._ffa is not None:
            self._close_ffa(self._ffa)

    def _close_ffa(self, driver: FfaDriver) -> None:
        """Take the FF-A buffers back, if nothing else of EL2's has come to be in them."""
        from pkvm.host.ffa import FfaCallError  # it is there if there is a driver

        pages, self._ffa, self._ffa_pages = self._ffa_pages, None, None
        try:
            driver.unmap_buffers()
        except (FfaCallError, ValueError) as error:
            self._host.el2.say(f"FF-A buffers are leaked: {error}")
            return
        self._lock.enter()
        try:
            if pages is not None:
                self._host.pages.free(pages, 2)
        finally:
            self._lock.leave()

    def _call(self, fd: int, name: str, make: Callable[[], int]) -> int:
        """A system call that is not an ioctl: under the kernel lock, and announced. `fd` -1 means
        that the result is the descriptor."""
        result = -errno.EINTR
        self._lock.enter()
        try:
            result = make()
        except OSError as error:
            result = -(error.errno or errno.EIO)
            raise
        except self._bus_faults as fault:
            result = -errno.EFAULT
            raise OSError(errno.EFAULT, f"the host kernel was refused: {fault}") from fault
        finally:
            self._record(IoctlEvent(fd, name, result))
            self._lock.leave()
        return result

    def _install(self, file: File) -> int:
        """Give a file the lowest free descriptor. Raises EMFILE, ENODEV after `shutdown`."""
        self._not_down()
        fd = FIRST_FD
        while fd in self._files:
            fd += 1
        if fd >= MAX_FDS:
            raise OSError(errno.EMFILE, f"{MAX_FDS - FIRST_FD} descriptors are open")
        self._files[fd] = file
        return fd

    def _not_down(self) -> None:
        if self._down:
            raise OSError(errno.ENODEV, "the host kernel is shut down")

    def unmap(self, address: int, length: int) -> None:
        """munmap(2)."""

        def make() -> int:
            self._host.users.unmap(address, length)
            return 0

        self._call(-1, "munmap", make)

    def fork(self) -> None:
        """fork(2). The child gets copies, made at once, of those private pages that a guest has
        (pinned ones), where MADV_DOFORK was said. Raises HostOopsError."""
        self._call(-1, "fork", lambda: 0)
        for mapping in self._host.users.mappings():
            if mapping.backing.shared or not mapping.to_children:
                continue
            for offset in range(0, mapping.length, PAGE_SIZE):
                try:
                    self._host.bus.read(mapping.pa + offset, 1)
                except self._bus_faults:
                    self.take(mapping.pa + offset, mapping.address + offset)

    def device_read(self, address: int, length: int) -> bytes:
        """O_DIRECT: a device reads the VMM's memory, by DMA. Raises EFAULT, EIO."""
        users = self._host.users
        seen: list[bytes] = []

        def call() -> int:
            buffer = users.map(length)
            try:
                self._copy_by_device(address, buffer.address, length)
                seen.append(users.copy_from_user(buffer.address, length))
            finally:
                users.unmap(buffer.address, buffer.length)
            return length

        self._call(-1, "pwrite", call)
        return seen[0]

    def device_write(self, address: int, data: bytes) -> None:
        """O_DIRECT: a device writes to the VMM's memory, by DMA. Raises EFAULT, EIO."""
        users = self._host.users

        def call() -> int:
            buffer = users.map(len(data))
            try:
                users.copy_to_user(buffer.address, data)
                self._copy_by_device(buffer.address, address, len(data))
            finally:
                users.unmap(buffer.address, buffer.length)
            return len(data)

        self._call(-1, "pread", call)

    def _copy_by_device(self, source: int, destination: int, length: int) -> None:
        """Have the copy engine do it, by user addresses. Raises EFAULT, EIO, ENODEV."""
        if self._dma_base is None:
            raise OSError(errno.ENODEV, "the machine has no copy engine")
        driver = CopyDriver(self._bus, self._host.users, self._dma_base)
        driver.copy(DmaCopy.ARGS.pack(source, destination, length))

    def limit_memlock(self, limit: int | None) -> None:
        """setrlimit(2) of RLIMIT_MEMLOCK; None: as it was at first."""

        def call() -> int:
            self._host.memlock.limit = self._memlock if limit is None else limit
            return 0

        self._call(-1, "setrlimit", call)

    def take(self, pa: int, address: int) -> None:
        """The kernel touched the page at `pa`, without a fix-up: get it back from its guest
        (facts §3.7). Raises HostOopsError."""

        def take() -> int:
            result = -errno.EPERM
            el2, call = self._host.el2, HostCall.FORCE_RECLAIM_GUEST_PAGE
            if self.dialect.lost_page is not LostPage.OOPS:
                result = el2.try_call(call, pa)
            if result == -errno.ENOMEM:
                # The page is part of a block of its guest's.
                for vm in self._host.vms:
                    if vm.has_pinned(pa):
                        vm.topup(1)
                result = el2.try_call(call, pa)
            if result < 0 and result != -errno.EAGAIN:
                why = "access to hypervisor-protected memory"
                raise HostOopsError(address, "access", why)
            return 0

        self._call(-1, "force_reclaim", take)

    def _unmap_run(self, page: HostRunPage) -> None:
        def make() -> int:
            if page in self._run_pages:
                self._run_pages.discard(page)
                page.vcpu.put()
            return 0

        self._call(-1, "munmap", make)


@cache
def _ran(fd: int) -> IoctlEvent:
    """The event of a KVM_RUN that returned with an exit: always the same, and often needed."""
    return IoctlEvent(fd, Ioctl.RUN.name, 0)


def _bad_fd(fd: int) -> OSError:
    return OSError(errno.EBADF, f"descriptor {fd} is not open")
