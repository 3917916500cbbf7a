# SPDX-License-Identifier: GPL-2.0-or-later
"""What a scenario's host does with memory that a guest has, recorded: system calls, changes."""

from __future__ import annotations

from pkvm.check.scenarios.bench import PAGE, Bench, Guest
from pkvm.check.scenarios.observation import Outcome
from pkvm.kvm.kernel import Memory
from pkvm.uapi.memory import Backing, Change, Forced, SystemCall

_INSTRUCTION_BYTES = 4


def memory(
    bench: Bench, name: str, pages: int, backing: Backing = Backing.ANONYMOUS
) -> Memory | None:
    """Memory of that kind, called `name`; recorded. None if the kernel does not give it."""
    made = bench.call(
        "mmap",
        f"{pages} pages, {backing.words}",
        lambda: bench.kvm.kernel.mmap(pages * PAGE, backing),
        lambda made: f"{made.length // PAGE} pages",
    )
    if made is not None:
        bench.name(name, made)
        bench.keep(made)
    return made


def change(
    bench: Bench, memory: Memory, what: Change, offset: int = 0, length: int | None = PAGE
) -> None:
    """munmap, mprotect, madvise, ... of a part of memory; `length` None: to its end."""
    size = memory.length - offset if length is None else length
    where = f"{bench.user(memory.address + offset)}, {size:#x}"
    bench.call(what.value, where, lambda: memory.change(what, offset, length))


def system_call(
    bench: Bench, memory: Memory, what: SystemCall, offset: int = 0, length: int = 8
) -> None:
    """A system call with a part of memory as its buffer."""
    where = f"{bench.user(memory.address + offset)}, {length}"
    bench.call(what.words, where, lambda: memory.system_call(what, offset, length))


def forced_read(
    bench: Bench, memory: Memory, offset: int = 0, length: int = 8, way: Forced = Forced.PROC_MEM
) -> None:
    """The kernel reads a part of memory for itself."""
    where = f"{bench.user(memory.address + offset)}, {length}"
    bench.call(
        f"read by {way.value}",
        where,
        lambda: memory.forced_read(offset, length, way),
        lambda data: Outcome("ok", host=data.hex(" ", -8)),
    )


def forced_write(
    bench: Bench, memory: Memory, data: bytes, offset: int = 0, way: Forced = Forced.PROC_MEM
) -> None:
    """The kernel writes a part of memory for itself."""
    where = f"{bench.user(memory.address + offset)}, {data.hex()}"
    bench.call(f"write by {way.value}", where, lambda: memory.forced_write(offset, data, way))


def device_read(bench: Bench, memory: Memory, offset: int = 0) -> None:
    """A disk reads a page by DMA; the first 8 bytes that it saw are recorded."""
    bench.call(
        f"read by {Forced.DEVICE.value}",
        bench.user(memory.address + offset),
        lambda: memory.forced_read(offset, PAGE, Forced.DEVICE),
        lambda data: Outcome("ok", host=data[:8].hex()),
    )


def device_write(bench: Bench, memory: Memory, data: bytes, offset: int = 0) -> None:
    """A disk writes a page by DMA, `data` and zeroes."""
    bench.call(
        f"write by {Forced.DEVICE.value}",
        f"{bench.user(memory.address + offset)}, {data.hex()}",
        lambda: memory.forced_write(offset, data.ljust(PAGE, b"\0"), Forced.DEVICE),
    )


def fork(bench: Bench) -> None:
    """fork(2) of the host's process."""
    bench.call("fork", "", bench.kvm.kernel.fork)


def skip(guest: Guest) -> None:
    """After a failed KVM_RUN: have the guest go on behind the instruction that it stands at, by way
    of PC, which in this dialect is the host's to set. Nothing if the last call did not fail so.
    """
    if isinstance(guest.bench.error, OSError):
        guest.vcpu.set_reg("pc", guest.vcpu.get_reg("pc") + _INSTRUCTION_BYTES)
        guest.resume("behind the instruction", show=1)
