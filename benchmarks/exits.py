# SPDX-License-Identifier: GPL-2.0-or-later
"""What it costs a protected guest to leave: to EL2 and back, and through host and VMM and back.

The unit is the least that an exception to Python can cost on the engine: a bare
ctypes function as libunicorn's interrupt hook, on the same HVC loop. Times are CPU times of the
process, so that what else the computer does counts for neither side.
"""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Iterator

from common import Result, median_ratio
from pkvm.arm64.smccc import Function
from pkvm.events import NullRecorder
from pkvm.machine.cpu.library import INTERRUPT_HOOK, Library
from pkvm.machine.cpu.unicorn_engine import UnicornEngine
from pkvm.machine.memory import PhysicalMemory
from pkvm.system import System
from pkvm.vmm import board
from pkvm.vmm.loader import load_image
from pkvm.vmm.vmm import Vmm

CALLS = 20_000
STORES = 20_000
PAIRS = 7

_HVC = 0xD400_0002
_BRK = 0xD420_0000
_EXCP_HVC = 11
"""QEMU's number of the exception, as the hook gets it."""
_SUBS_X9 = 0xF100_0529  # subs x9, x9, #1
_STR_W1_X10 = 0xB900_0141  # str w1, [x10]


def mov(register: int, value: int) -> list[int]:
    """MOVZ and MOVK of a 32-bit value."""
    return [
        0xD280_0000 | (value & 0xFFFF) << 5 | register,
        0xF2A0_0000 | (value >> 16) << 5 | register,
    ]


def b_ne(back: int) -> int:
    """B.NE to `back` instructions before this one."""
    return 0x5400_0001 | (-back & 0x7FFFF) << 5


def program(*words: int) -> bytes:
    """Instructions as bytes."""
    return struct.pack(f"<{len(words)}I", *words)


def hypercall_loop(function: int, count: int, end: list[int]) -> bytes:
    """`count` times HVC with X0 = `function` and X1-X3 = 0, then `end`."""
    body = [*mov(0, function), *(word for n in (1, 2, 3) for word in mov(n, 0)), _HVC, _SUBS_X9]
    return program(*mov(9, count), *body, b_ne(len(body)), *end)


def store_loop(address: int, count: int) -> bytes:
    """`count` word stores to `address`, then PSCI SYSTEM_OFF."""
    off = [*mov(0, 0x8400_0008), _HVC]
    return program(
        *mov(9, count), *mov(10, address), *mov(1, 0x40), _STR_W1_X10, _SUBS_X9, b_ne(2), *off
    )


def bare_hook() -> float:
    """Seconds of one HVC into the bare hook and back."""
    memory = PhysicalMemory(0x8000_0000, 1 << 20)
    memory.write(0x8000_0000, hypercall_loop(int(Function.HYP_MEMINFO), CALLS, [_BRK]))
    engine = UnicornEngine(memory)
    stop = Library().uc_emu_stop

    def hook(handle: int, number: int, _data: int) -> None:
        if number != _EXCP_HVC:
            stop(handle)

    callback = INTERRUPT_HOOK(hook)
    try:
        engine.pc = 0x8000_0000
        start = time.process_time()
        engine.run_bare(ctypes.cast(callback, ctypes.c_void_p).value or 0)
        seconds = time.process_time() - start
        if engine.x[9]:
            raise RuntimeError("the bare loop did not run to its end")
        return seconds / CALLS
    finally:
        engine.close()


def guest_seconds(image: bytes, *, smmu: bool = True) -> float:
    """Seconds from the start to SYSTEM_OFF of a protected VM whose firmware is `image`, with the
    recorder that does nothing and without what it takes to make and end the VM."""
    with System(memory=64 << 20, firmware=image, recorder=NullRecorder(), smmu=smmu) as system:
        kvm = system.open()
        small = board.Board(ram_bytes=8 << 20)
        vmm = Vmm(kvm, small, load_image(bytes(4096), small), console=lambda data: None)
        start = time.process_time()
        outcome = vmm.run()
        seconds = time.process_time() - start
        vmm.close()
        if outcome.kind != "powered-off":
            raise RuntimeError(f"the guest did not power off: {outcome}")
        return seconds


def measure() -> Iterator[Result]:
    """Both figures; the fixed cost of a run is taken off by a run that does nothing."""
    off = program(*mov(0, 0x8400_0008), _HVC)
    off_words = list(struct.unpack("<3I", off))
    calls = hypercall_loop(int(Function.HYP_MEMINFO), CALLS, off_words)
    stores = store_loop(board.UART_BASE, STORES)

    def meminfo() -> float:
        return (guest_seconds(calls) - guest_seconds(off)) / CALLS

    def store() -> float:
        return (guest_seconds(stores) - guest_seconds(off)) / STORES

    ratio, ours, unit = median_ratio(meminfo, bare_hook, PAIRS)
    yield Result("hyp-meminfo", ratio, 6, f"{ours * 1e6:.2f} us, bare hook {unit * 1e6:.2f} us")
    ratio, ours, unit = median_ratio(store, bare_hook, PAIRS)
    yield Result("mmio-store", ratio, 40, f"{ours * 1e6:.2f} us, bare hook {unit * 1e6:.2f} us")
