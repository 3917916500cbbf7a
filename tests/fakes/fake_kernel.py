# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel whose guests are Python generators, for tests of what stands above the seam.

A guest yields what it does (`Load`, `Store`, `Stop`, `Block`, `Fail`) and gets
the value of a load back. Protection is a set of pages: memory of slots of a
protected VM is refused but for `shared` pages.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Generator
from typing import NamedTuple

from pkvm.uapi import kvm as uapi
from pkvm.uapi.errors import ProtectedPageError
from pkvm.uapi.memory import Backing, Change, Forced, SystemCall

PAGE = 4096


class Load(NamedTuple):
    address: int
    size: int = 4


class Store(NamedTuple):
    address: int
    value: int
    size: int = 4


class Stop(NamedTuple):
    """KVM_RUN ends with this exit reason and these bytes in the union."""

    reason: int
    union: bytes = b""


class Block(NamedTuple):
    """KVM_RUN blocks until a kick."""


class Fail(NamedTuple):
    """KVM_RUN fails with this errno; `reason` is the exit reason it leaves behind."""

    errno: int
    reason: int = 0


Step = Load | Store | Stop | Block | Fail
Guest = Generator[Step, int, None]


def power_off() -> Stop:
    return Stop(uapi.ExitReason.SYSTEM_EVENT, uapi.Run.SYSTEM_EVENT.pack(1, 1, *[0] * 16))


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def just(*steps: Step) -> Guest:
    """A guest that does this, whatever its loads find."""
    for step in steps:
        _ = yield step


class FakeMemory:
    def __init__(self, kernel: FakeKernel, address: int, length: int) -> None:
        self._kernel = kernel
        self.address = address
        self.length = length
        self.bytes = bytearray(length)
        self.protected = False
        self.shared: set[int] = set()
        """Offsets of pages that may be used although the memory is protected."""
        self.closed = False

    def read(self, offset: int, length: int) -> bytes:
        self.check(offset, length, "load")
        return bytes(self.bytes[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self.check(offset, len(data), "store")
        self.bytes[offset : offset + len(data)] = data

    syscall_read = read
    syscall_write = write

    def system_call(self, what: SystemCall, offset: int, length: int) -> int:
        self.check(offset, length, what.words)
        return length

    def forced_read(self, offset: int, length: int, way: Forced = Forced.PROC_MEM) -> bytes:
        return self.read(offset, length)

    def forced_write(self, offset: int, data: bytes, way: Forced = Forced.PROC_MEM) -> None:
        self.write(offset, data)

    def change(self, what: Change, offset: int = 0, length: int | None = None) -> None:
        raise error(errno.EINVAL)

    def move(self, offset: int = 0, length: int | None = None) -> FakeMemory:
        raise error(errno.EINVAL)

    def alias(self) -> FakeMemory:
        raise error(errno.EINVAL)

    def check(self, offset: int, length: int, access: str) -> None:
        if offset < 0 or offset + length > self.length:
            raise ValueError("outside the mapping")
        for page in range(offset // PAGE * PAGE, offset + length, PAGE):
            if self.protected and page not in self.shared:
                raise ProtectedPageError(self.address + max(page, offset), access)

    def close(self) -> None:
        self.closed = True


class FakeRunPage:
    def __init__(self, length: int) -> None:
        self.view = memoryview(bytearray(length))

    def close(self) -> None:
        pass


class FakeVcpu:
    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.page = FakeRunPage(uapi.VCPU_MMAP_SIZE)
        self.registers: dict[int, int] = {}
        self.init: tuple[int, ...] = ()
        self.mp_state = 0
        self.kicked = threading.Event()
        self.started = False
        self.pending: Step | None = None


class FakeVm:
    def __init__(self, machine_type: int) -> None:
        self.machine_type = machine_type
        self.slots: dict[int, tuple[int, ...]] = {}
        self.protected = False


class FakeKernel:
    """`guest(vcpu_id)` makes the program of each vCPU."""

    def __init__(
        self,
        guest: Callable[[int], Guest] = lambda _: just(power_off()),
        *,
        dma: bool = True,
        firmware_size: int = 8192,
    ) -> None:
        self._guest = guest
        self._dma = dma
        self.firmware_size = firmware_size
        self.fds: dict[int, str | FakeVm | FakeVcpu] = {}
        self.memories: list[FakeMemory] = []
        self.vcpus: list[FakeVcpu] = []
        self.log: list[tuple[str, object]] = []
        self._next_fd = 3
        self._next_address = 0x7000_0000_0000

    def open(self, path: str) -> int:
        if path != "/dev/kvm" and not (path == "/dev/dma-copy" and self._dma):
            raise error(errno.ENOENT)
        return self._new_fd(path)

    def close(self, fd: int) -> None:
        if self.fds.pop(fd, None) is None:
            raise error(errno.EBADF)

    def fork(self) -> None:
        pass

    def limit_memlock(self, limit: int | None) -> None:
        pass

    def mmap(self, length: int, backing: Backing = Backing.ANONYMOUS) -> FakeMemory:
        memory = FakeMemory(self, self._next_address, -(-length // PAGE) * PAGE)
        self._next_address += memory.length + PAGE
        self.memories.append(memory)
        return memory

    def mmap_vcpu(self, fd: int, length: int) -> FakeRunPage:
        vcpu = self.fds[fd]
        assert isinstance(vcpu, FakeVcpu)
        assert length == uapi.VCPU_MMAP_SIZE
        return vcpu.page

    def kick(self, fd: int) -> None:
        vcpu = self.fds[fd]
        assert isinstance(vcpu, FakeVcpu)
        vcpu.kicked.set()

    def at(self, address: int) -> tuple[FakeMemory, int]:
        for memory in self.memories:
            if memory.address <= address < memory.address + memory.length:
                return memory, address - memory.address
        raise error(errno.EFAULT)

    def ioctl(self, fd: int, request: int, arg: int | bytearray = 0) -> int:
        owner = self.fds.get(fd)
        if owner is None:
            raise error(errno.EBADF)
        if request == uapi.Ioctl.RUN:
            assert isinstance(owner, FakeVcpu)
            return self._run(owner)
        if request == uapi.DmaCopy.COPY:
            assert isinstance(arg, bytearray)
            return self._copy(arg)
        name = uapi.Ioctl(request).name
        self.log.append((name, bytes(arg) if isinstance(arg, bytearray) else arg))
        answer: int = getattr(self, f"_{name.lower()}")(owner, arg)
        return answer

    def _new_fd(self, owner: str | FakeVm | FakeVcpu) -> int:
        self._next_fd += 1
        self.fds[self._next_fd] = owner
        return self._next_fd

    def _copy(self, arg: bytearray) -> int:
        source, target, length = uapi.DmaCopy.ARGS.unpack(arg)
        (from_memory, from_at), (to_memory, to_at) = self.at(source), self.at(target)
        try:
            to_memory.write(to_at, from_memory.read(from_at, length))
        except ProtectedPageError:
            raise error(errno.EIO) from None
        return 0

    def _run(self, vcpu: FakeVcpu) -> int:
        view = vcpu.page.view
        vcpu.started = True
        if view[uapi.Run.IMMEDIATE_EXIT]:
            raise error(errno.EINTR)
        step = vcpu.pending
        vcpu.pending = None
        if step is None:
            step = next(vcpu.guest)
        elif isinstance(step, Load):
            data = bytes(view[uapi.Run.UNION + 8 : uapi.Run.UNION + 8 + step.size])
            step = vcpu.guest.send(int.from_bytes(data, "little"))
        elif not isinstance(step, Block):
            step = next(vcpu.guest)
        if not isinstance(step, Fail):
            vcpu.pending = step
        return self._leave(vcpu, step)

    def _leave(self, vcpu: FakeVcpu, step: Step) -> int:
        view = vcpu.page.view
        reason, union = 0, b""
        match step:
            case Block():
                vcpu.kicked.wait()
                vcpu.kicked.clear()
                raise error(errno.EINTR)
            case Load(address, size):
                reason = uapi.ExitReason.MMIO
                union = uapi.Run.MMIO.pack(address, 0, size, 0)
            case Store(address, value, size):
                reason = uapi.ExitReason.MMIO
                union = uapi.Run.MMIO.pack(address, value, size, 1)
            case Stop(reason, union):
                pass
            case Fail(number, reason):
                view[8:12] = reason.to_bytes(4, "little")
                raise error(number)
        view[8:12] = int(reason).to_bytes(4, "little")
        view[uapi.Run.UNION : uapi.Run.UNION + len(union)] = union
        return 0

    def _get_api_version(self, owner: object, arg: int) -> int:
        return uapi.API_VERSION

    def _create_vm(self, owner: object, arg: int) -> int:
        return self._new_fd(FakeVm(arg))

    def _check_extension(self, owner: object, arg: int) -> int:
        return int(arg == uapi.Cap.ARM_PROTECTED_VM)

    def _get_vcpu_mmap_size(self, owner: object, arg: int) -> int:
        return uapi.VCPU_MMAP_SIZE

    def _create_vcpu(self, owner: FakeVm, arg: int) -> int:
        vcpu = FakeVcpu(self._guest(arg))
        self.vcpus.append(vcpu)
        return self._new_fd(vcpu)

    def _set_user_memory_region(self, owner: FakeVm, arg: bytearray) -> int:
        slot, *rest = uapi.MEMORY_REGION.unpack(arg)
        if owner.protected:
            raise error(errno.EPERM)
        owner.slots[slot] = tuple(rest)
        return 0

    def _enable_cap(self, owner: FakeVm, arg: bytearray) -> int:
        cap, flags, *args = uapi.ENABLE_CAP.unpack(arg)
        assert cap == uapi.Cap.ARM_PROTECTED_VM
        if flags == uapi.ProtectedVm.INFO:
            memory, at = self.at(args[0])
            size = args[1] or 64
            known = 64 if args[1] else 0
            info = uapi.PROTECTED_VM_INFO.pack(self.firmware_size, known, *[0] * 6)
            memory.write(at, (info + bytes(size))[:size])
            return 0
        if owner.protected:
            raise error(errno.EPERM)
        owner.protected = True
        for _, _, size, address in owner.slots.values():
            if size:
                self.at(address)[0].protected = True
        return 0

    def _arm_preferred_target(self, owner: FakeVm, arg: bytearray) -> int:
        arg[:] = uapi.VCPU_INIT.pack(uapi.TARGET_GENERIC_V8, *[0] * 7)
        return 0

    def _arm_vcpu_init(self, owner: FakeVcpu, arg: bytearray) -> int:
        owner.init = uapi.VCPU_INIT.unpack(arg)
        return 0

    def _get_one_reg(self, owner: FakeVcpu, arg: bytearray) -> int:
        register, address = uapi.ONE_REG.unpack(arg)
        memory, at = self.at(address)
        size = 1 << ((register >> 52) & 15)
        if register not in owner.registers:
            raise error(errno.ENOENT)
        memory.write(at, owner.registers[register].to_bytes(size, "little"))
        return 0

    def _set_one_reg(self, owner: FakeVcpu, arg: bytearray) -> int:
        register, address = uapi.ONE_REG.unpack(arg)
        memory, at = self.at(address)
        size = 1 << ((register >> 52) & 15)
        owner.registers[register] = int.from_bytes(memory.read(at, size), "little")
        return 0

    def _get_reg_list(self, owner: FakeVcpu, arg: bytearray) -> int:
        ids = sorted(owner.registers)
        room = int.from_bytes(arg[:8], "little")
        arg[:8] = len(ids).to_bytes(8, "little")
        if room < len(ids):
            raise error(errno.E2BIG)
        arg[8 : 8 + 8 * len(ids)] = b"".join(i.to_bytes(8, "little") for i in ids)
        return 0

    def _get_mp_state(self, owner: FakeVcpu, arg: bytearray) -> int:
        arg[:] = uapi.MP_STATE.pack(owner.mp_state)
        return 0

    def _set_mp_state(self, owner: FakeVcpu, arg: bytearray) -> int:
        owner.mp_state = uapi.MP_STATE.unpack(arg)[0]
        return 0
